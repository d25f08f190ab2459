"""The training loop: one `fit` for every stage."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from nla_jax.errors import UserError
from nla_jax.training import stage_display
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
    max_skipped: int = 10,
    notes: Callable | None = None,
    watch: Callable | None = None,
    watch_every: int = 0,
    minutes: float = 0,
):
    """Run `state, metrics = step(state, batch(i), i)` for i < n_steps, resuming where it stopped.

    Args:
      state: a pytree, donated to every step. batch: i -> batch, a pure function of i.
      every: steps between checkpoints; 0 saves none.
      max_skipped: refused updates in a row (metric `*skipped_run`) that stop the run.
      notes: array-valued metrics -> dict of extra fields for the log's JSON line.
      watch: state -> dict of scalars, logged beside the metrics of every `watch_every`-th step.
      minutes: the step under way when so many are over is the last; 0: no limit. They are counted from the
        end of the first step, so that its compilation does not count. A resumed run counts anew.

    Returns:
      The final state. Its checkpoints stay until `finished` removes them.

    Raises:
      distributed.Stopped: after SIGTERM, on any process of a pod: on all of them after the step under way,
        and once its state is saved.
    """
    manager = checkpoint.manager(workdir / "checkpoints" / stage)
    start, state = checkpoint.restore_latest(manager, state)
    log = MetricsLog(workdir, stage, start) if distributed.is_first() else None
    clock, pending, stop, began = Clock(), None, False, 0.0
    with clock("data"):
        ahead = batch(start) if start < n_steps else None

    def flush(i, metrics, watched=False):
        with clock("device"):  # here the host waits for the step's numbers
            scalars = {k: float(v) for k, v in metrics.items() if jnp.ndim(v) == 0}
        if run := [k for k, v in scalars.items() if k.endswith("skipped_run") and v >= max_skipped]:
            raise UserError(
                f"{stage}: {int(scalars[run[0]])} updates in a row were refused, gradients are not "
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
        distributed.sigterm_waits() as sigterm,
        logged,
        stage_display.display(stage, n_steps, start, workdir) as shown,
    ):
        for i in range(start, n_steps):
            with clock("compile" if i == start else "device"):
                state, metrics = step(state, ahead, i)
                if i == start and minutes:
                    jax.block_until_ready(metrics)
                    began = time.monotonic()
            with clock("data"):
                ahead = batch(i + 1) if i + 1 < n_steps else None
            late = bool(minutes) and distributed.anyone(time.monotonic() - began > 60 * minutes)
            watched = bool(watch and watch_every and ((i + 1) % watch_every == 0 or late))
            if watched:
                with clock("watch"):
                    metrics = {**metrics, **watch(state)}
            # One step late, so that the host prepares step i + 1 while the device runs step i.
            if pending:
                flush(*pending)
            pending = (i, metrics, watched)
            shown.advance()
            stop = distributed.anyone(sigterm.asked)
            if stop or (every and (i + 1) % every == 0 and i + 1 < n_steps):
                # Logged first: a run taken up from here does not come back to this step.
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


def finished(stage: str, workdir: Path) -> None:
    """Drop a stage's checkpoints once what it made is saved elsewhere."""
    if distributed.is_first():
        paths.remove(workdir / "checkpoints" / stage)
