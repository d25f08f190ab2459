"""Run one job on several processes: join, choose the writer, agree on decisions, stop on SIGTERM.

A pod is P processes that run the same command on one mesh. Each process computes the same host batches
and makes the same decisions. All processes write parameters (Orbax). Process 0 writes every other file of
the run's directory, so that directory must be on a file system that all processes share. In a single
process, no function here communicates.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from nla_jax.errors import UserError
from nla_jax.util import network, paths

COORDINATOR, PROCESSES, PROCESS = "NLA_COORDINATOR", "NLA_PROCESSES", "NLA_PROCESS"


class Stopped(BaseException):
    """SIGTERM stopped the run.

    `together`: every process of the pod raises this at the same step. Like KeyboardInterrupt, it is not an
    Exception, because an `except Exception` would otherwise report it as a failure.
    """

    def __init__(self, message: str, together: bool = False):
        super().__init__(message)
        self.together = together


# --- joining and leaving --------------------------------------------------------------------------


def join() -> None:
    """Join the pod. Call this before any other jax call uses a device.

    On TPU VMs, GKE and Slurm, jax detects the other processes. Elsewhere, set the environment variables
    NLA_COORDINATOR=HOST:PORT (of process 0), NLA_PROCESSES, and NLA_PROCESS (counted from 0).

    Raises UserError when these variables are missing or incomplete, or when process 0 does not answer.
    """
    options = _from_environment(os.environ)
    network.keep_grpc_off_proxies(options.get("coordinator_address", ""))
    # jax's preemption service would replace the SIGTERM handler of `defer_sigterm`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"--distributed: could not join ({reason}); either jax does not detect a TPU VM, GKE or Slurm "
            f"job, or process 0 does not answer: set {COORDINATOR}=HOST:PORT, {PROCESSES} and {PROCESS}, or "
            f"use launch/local_pod.sh{network.hint()}"
        ) from e


def _from_environment(env) -> dict:
    """Return the arguments of `jax.distributed.initialize`; empty if no variable of the pod is set."""
    given = {name: env.get(name, "") for name in (COORDINATOR, PROCESSES, PROCESS)}
    if not any(given.values()):
        return {}
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"--distributed: {missing[0]} is not set, but other variables of the pod are")
    if not re.fullmatch(r"\S+:\d+", given[COORDINATOR]):
        raise UserError(f"--distributed: {COORDINATOR}={given[COORDINATOR]}: must be HOST:PORT")
    n, i = given[PROCESSES], given[PROCESS]
    if not (n.isdecimal() and i.isdecimal() and int(i) < int(n)):
        raise UserError(f"--distributed: {PROCESS}={i} of {PROCESSES}={n}: processes are counted from 0")
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": int(n),
        "process_id": int(i),
        "cluster_detection_method": "deactivate",
    }


def is_in_pod() -> bool:
    """Return whether this process belongs to a pod."""
    return jax.distributed.is_initialized()


def exit_pod(status: int) -> None:
    """Exit at once with this status if this process belongs to a pod.

    Does not wait for the other processes: they may be waiting for this one."""
    if is_in_pod():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --- one decision for all -------------------------------------------------------------------------


def is_first() -> bool:
    """Return whether this process writes files: process 0 of a pod, or a single process."""
    return not is_in_pod() or jax.process_index() == 0


def broadcast_flags(flags) -> np.ndarray:
    """Broadcast process 0's booleans to every process. All processes must call this with the same shape."""
    flags = np.asarray(flags, bool)
    if not is_in_pod():
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(flags), bool)


def any_process(flag: bool) -> bool:
    """Return whether `flag` is true on any process. All processes must call this."""
    if not is_in_pod():
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def barrier() -> None:
    """Wait until every process has called this."""
    any_process(False)


def run_on_first(work: Callable):
    """Run `work()` on process 0 while the other processes wait. Returns its result there, None elsewhere.

    If `work` raises, process 0 raises the same exception, and the other processes raise UserError.
    """
    out, failed = None, None
    if is_first():
        try:
            out = work()
        except Exception as e:
            failed = e
    if broadcast_flags(failed is not None):
        raise failed or UserError("process 0 has failed; see its log for the cause")
    return out


# --- SIGTERM --------------------------------------------------------------------------------------


class DeferredSignal:
    """A signal handler that only records the signal in `asked`."""

    asked = False

    def __call__(self, *_):
        self.asked = True


@contextlib.contextmanager
def _on_sigterm(handler: Callable) -> Iterator[Callable]:
    """Make SIGTERM call `handler` inside the block.

    Outside the main thread this does nothing, because Python delivers signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def raise_on_sigterm() -> contextlib.AbstractContextManager:
    """Make SIGTERM raise `Stopped` in the main thread at once, inside the block."""

    def stop(*_):
        raise Stopped("stopped by SIGTERM")

    return _on_sigterm(stop)


def defer_sigterm() -> contextlib.AbstractContextManager[DeferredSignal]:
    """Make SIGTERM only set `asked` on the handler that the block receives.

    The code inside checks `asked` where it can stop. A nested block receives the handler of the outer one."""
    now = signal.getsignal(signal.SIGTERM)
    return contextlib.nullcontext(now) if isinstance(now, DeferredSignal) else _on_sigterm(DeferredSignal())


def write_json(path: Path, value) -> None:
    """Write `value` as JSON atomically. In a pod, only process 0 writes."""
    if not is_first():
        return
    paths.write(path, json.dumps(value, indent=1, ensure_ascii=False))
