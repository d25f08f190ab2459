"""Run the training loop: one `fit` for every stage."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from nla_jax.errors import UserError
from nla_jax.training import stage_display, step_trace
from nla_jax.util import checkpoint, distributed, paths
from nla_jax.util.metrics_log import MetricsLog
from nla_jax.util.progress import Clock


def fit(
    stage: str,
    state,
    step: Callable,
    batch: Callable,
    n_steps: int,
    *,
    workdir: Path,
    every: int = 0,
    log_every: int = 1,
    callback: str = "",
    tracker=None,
    profile: str = "",
    max_skipped: int = 10,
    notes: Callable | None = None,
    watch: Callable | None = None,
    watch_every: int = 0,
    minutes: float = 0,
):
    """Run `state, metrics = step(state, batch(i), i)` for i < n_steps, from the newest checkpoint.

    Args:
      state: a pytree, donated to every step. batch: i -> batch, a pure function of i.
      every: steps between checkpoints; 0 saves none.
      callback: "module:function", called for each row of the log (`MetricsLog`), on process 0.
      tracker: of `MetricsLog`. profile: the steps to trace (`step_trace.parse`), or "".
      max_skipped: skipped updates in a row (metric `*skipped_run`) after which the run fails.
      notes: array-valued metrics -> dict of extra fields for the log's JSON line.
      watch: (state, number of steps) -> dict of scalars, logged with the metrics of every `watch_every`-th
        step and of the last one.
      minutes: time limit, counted from the end of the first step, so that compiling does not count. The step
        that is running then is the last; 0: no limit. A resume resets the clock.

    Returns:
      The final state. Its checkpoints are kept until `delete_checkpoints` removes them.

    Raises:
      UserError: `max_skipped` updates in a row were skipped; a checkpoint is damaged or does not fit.
      distributed.Stopped: a process of the pod got SIGTERM. All processes finish the current step, save the
        state, and raise it.
    """
    manager = checkpoint.manager(workdir / "checkpoints" / stage)
    start, state = checkpoint.restore_latest(manager, state)
    log = MetricsLog(workdir, stage, start, callback, tracker) if distributed.is_first() else None
    clock, pending, stop, began = Clock(), None, False, 0.0
    with clock("data"):
        ahead = batch(start) if start < n_steps else None

    def flush(i, metrics, watched=False):
        with clock("device"):  # the conversion to float blocks until the device has finished the step
            scalars = {k: float(v) for k, v in metrics.items() if jnp.ndim(v) == 0}
        if run := [k for k, v in scalars.items() if k.endswith("skipped_run") and v >= max_skipped]:
            raise UserError(
                f"{stage}: {int(scalars[run[0]])} updates in a row were skipped because gradients are not "
                f"finite ({run[0]}, step {i}); lower the learning rate or use dtype float32"
            )
        extra, seconds = {}, None
        if log and (i % log_every == 0 or i == n_steps - 1 or watched):
            extra = notes({k: v for k, v in metrics.items() if jnp.ndim(v)}) if notes else {}
            seconds = clock.lap()
            log.write(i, scalars, seconds, **extra)
        shown.saw({"step": i, **scalars, **extra}, seconds)

    logged = contextlib.closing(log) if log else contextlib.nullcontext()
    with (
        distributed.defer_sigterm() as sigterm,
        logged,
        stage_display.display(stage, n_steps, start, workdir) as shown,
        step_trace.StepTrace(profile, stage, workdir) as trace,
    ):
        for i in range(start, n_steps):
            with trace.step(i), clock("compile" if i == start else "device"):
                state, metrics = step(state, ahead, i)
                if i == start and minutes:
                    jax.block_until_ready(metrics)
                    began = time.monotonic()
            with clock("data"):
                ahead = batch(i + 1) if i + 1 < n_steps else None
            trace.stop_after(i, metrics)
            late = bool(minutes) and distributed.any_process(time.monotonic() - began > 60 * minutes)
            due = late or i + 1 == n_steps or (watch_every and (i + 1) % watch_every == 0)
            watched = bool(watch and watch_every and due)
            if watched:
                with clock("watch"):
                    metrics = {**metrics, **watch(state, i + 1)}
            # Metrics are fetched one step late, so that the host prepares step i + 1 while step i runs.
            if pending:
                flush(*pending)
            pending = (i, metrics, watched)
            shown.advance()
            stop = distributed.any_process(sigterm.asked)
            if stop or (every and (i + 1) % every == 0 and i + 1 < n_steps):
                # Log before saving: a run that resumes from this checkpoint does not repeat this step.
                flush(*pending)
                pending = None
                with clock("save"):
                    if log:
                        log.flush()
                    checkpoint.save(manager, i + 1, state)
            if late and log:
                print(f"{stage}: {minutes} minutes are over after step {i + 1} of {n_steps}", file=sys.stderr)
            if stop or late:
                break
        if pending:
            flush(*pending)
        manager.wait_until_finished()
        manager.close()
    if stop:
        raise distributed.Stopped(f"stopped by SIGTERM, {stage} is saved at step {i + 1}", together=True)
    return state


def delete_checkpoints(stage: str, workdir: Path) -> None:
    """Delete the checkpoints of a stage; call it once the stage's result is saved."""
    if distributed.is_first():
        paths.remove(workdir / "checkpoints" / stage)
