"""Many processes, one run: joining, who writes, one decision for all, and leaving when asked to.

A pod is P processes that run the same command on one mesh. Each of them computes the same host batches
and comes to the same decisions. Parameters are written by all of them (Orbax); whatever else there is
in a run's directory, process 0 writes, so the directory must be one that every process sees. In a single
process nothing here talks to anybody.
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
from nla_jax.util import paths

COORDINATOR, PROCESSES, PROCESS = "NLA_COORDINATOR", "NLA_PROCESSES", "NLA_PROCESS"


class Stopped(BaseException):
    """The run was asked to stop by SIGTERM and has saved what it had.

    `together`: every process of the pod raises it at the same point. As KeyboardInterrupt, it is not an
    Exception, so that nothing on the way takes it for a failure.
    """

    def __init__(self, message: str, together: bool = False):
        super().__init__(message)
        self.together = together


# --- joining and leaving --------------------------------------------------------------------------


def join() -> None:
    """Become a process of a pod; before anything asks jax for a device.

    On TPU VMs, GKE and Slurm jax finds out by itself who the others are. Elsewhere the environment
    says it: NLA_COORDINATOR=HOST:PORT (of process 0), NLA_PROCESSES, and NLA_PROCESS from 0.

    Raises UserError when there is no such environment, or half of one, or nobody answers.
    """
    options = _from_environment(os.environ)
    # SIGTERM is `sigterm_waits`'s: jax's own service would take the signal away.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"--distributed: could not join ({reason}); this is no TPU VM, GKE or Slurm job that jax "
            f"knows, or process 0 is not there: set {COORDINATOR}=HOST:PORT, {PROCESSES} and {PROCESS}, or "
            "use launch/local_pod.sh"
        ) from e


def _from_environment(env) -> dict:
    """What to tell `jax.distributed.initialize`; nothing where the environment names no pod."""
    given = {name: env.get(name, "") for name in (COORDINATOR, PROCESSES, PROCESS)}
    if not any(given.values()):
        return {}
    if missing := [name for name, value in given.items() if not value]:
        raise UserError(f"--distributed: {missing[0]} is not set, but other variables of the pod are")
    if not re.fullmatch(r"\S+:\d+", given[COORDINATOR]):
        raise UserError(f"--distributed: {COORDINATOR}={given[COORDINATOR]}: must be HOST:PORT")
    n, i = given[PROCESSES], given[PROCESS]
    if not (n.isdecimal() and i.isdecimal() and int(i) < int(n)):
        raise UserError(f"--distributed: {PROCESS}={i} of {PROCESSES}={n}: they are counted from 0")
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": int(n),
        "process_id": int(i),
        "cluster_detection_method": "deactivate",
    }


def joined() -> bool:
    """Whether this process is one of a pod."""
    return jax.distributed.is_initialized()


def leave(status: int) -> None:
    """End a process of a pod at once with this status: the others are not waited for, who may wait for us."""
    if joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# --- one decision for all -------------------------------------------------------------------------


def is_first() -> bool:
    """Whether this process writes: process 0 of a pod, or the only one."""
    return not joined() or jax.process_index() == 0


def agreed(flags) -> np.ndarray:
    """Process 0's booleans, on every process; all must call, with the same shape."""
    flags = np.asarray(flags, bool)
    if not joined():
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(flags), bool)


def anyone(flag: bool) -> bool:
    """Whether `flag` is true on any process; all must call."""
    if not joined():
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def barrier() -> None:
    """Go on once every process is here."""
    anyone(False)


def on_first(work: Callable):
    """`work()` on process 0, while the others wait: its result there, None elsewhere.

    Raises what `work` raises, and UserError on the other processes.
    """
    out, failed = None, None
    if is_first():
        try:
            out = work()
        except Exception as e:
            failed = e
    if agreed(failed is not None):
        raise failed or UserError("process 0 has stopped; its log says why")
    return out


# --- SIGTERM --------------------------------------------------------------------------------------


class _Later:
    """A signal handler that takes note."""

    asked = False

    def __call__(self, *_):
        self.asked = True


@contextlib.contextmanager
def _on_sigterm(handler: Callable) -> Iterator[Callable]:
    """Inside, SIGTERM calls `handler`; in the main thread, since Python gives signals to no other."""
    if threading.current_thread() is not threading.main_thread():
        yield handler
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def sigterm_stops() -> contextlib.AbstractContextManager:
    """Inside, SIGTERM raises `Stopped`, wherever the main thread is."""

    def stop(*_):
        raise Stopped("stopped by SIGTERM")

    return _on_sigterm(stop)


def sigterm_waits() -> contextlib.AbstractContextManager[_Later]:
    """Inside, SIGTERM only sets `asked` on what this gives: the work inside looks at it where it can stop.
    Inside another one it gives the same."""
    now = signal.getsignal(signal.SIGTERM)
    return contextlib.nullcontext(now) if isinstance(now, _Later) else _on_sigterm(_Later())


def write_json(path: Path, value) -> None:
    """A whole file or none; in a pod, process 0 writes it."""
    if not is_first():
        return
    paths.write(path, json.dumps(value, indent=1, ensure_ascii=False))
