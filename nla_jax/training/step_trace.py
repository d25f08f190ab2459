"""Trace some steps of a stage with jax.profiler, for Perfetto and XProf."""

import contextlib
import re
import sys
import tempfile
from pathlib import Path

import jax

from nla_jax.errors import UserError, one_line
from nla_jax.util import paths

FOLDER = "profile"  # RUN/profile/STAGE/process-I


def parse(steps: str) -> tuple[str, int, int]:
    """Return (stage or "", first, end) of "[STAGE:]FIRST:END": the steps FIRST to END - 1, counted from 0.

    Raises UserError for another form, and for an empty range.
    """
    found = re.fullmatch(r"(?:(\w+):)?(\d{1,9}):(\d{1,9})", steps)
    if not found or int(found[2]) >= int(found[3]):
        raise UserError(f"config profile_steps={steps!r}: give FIRST:END, such as 10:13 for the steps 10, 11 "
                        "and 12 of every training stage, or STAGE:FIRST:END, such as rl:10:13")
    return found[1] or "", int(found[2]), int(found[3])


class StepTrace:
    """Writes RUN/profile/STAGE/process-I. Each process of a pod traces its own devices.

    A failure of the profiler gives a warning, and the run goes on. So does a stage that resumes after the
    first of these steps: it traces those that are left.
    """

    def __init__(self, steps: str, stage: str, workdir: Path):
        wanted, self._first, self._end = parse(steps) if steps else ("", 0, 0)
        if wanted not in ("", stage):
            self._first = self._end = 0
        self._out = paths.path(workdir) / FOLDER / stage / f"process-{jax.process_index()}"
        self._scratch, self._running = None, False

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def step(self, step: int) -> contextlib.AbstractContextManager:
        """Return a context for a step. It begins the trace if this step is one of those to trace."""
        if not self._running and self._first <= step < self._end:
            self._start()
        if self._running:
            return jax.profiler.StepTraceAnnotation(self._out.parent.name, step_num=step)
        return contextlib.nullcontext()

    def _start(self) -> None:
        if paths.is_remote(self._out):  # the profiler writes local files
            self._scratch = tempfile.TemporaryDirectory()
        else:
            paths.remove(self._out)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would fill the trace's million of events
        self._running = self._try(lambda: jax.profiler.start_trace(
            self._local, create_perfetto_trace=True, profiler_options=options))

    def stop_after(self, step: int, metrics) -> None:
        """End the trace if `step` was its last one. `metrics` are the step's results, for which it waits."""
        if self._running and step + 1 >= self._end:
            jax.block_until_ready(metrics)
            self._stop()

    @property
    def _local(self) -> str:
        return self._scratch.name if self._scratch else str(self._out)

    def _stop(self) -> None:
        if not self._running:
            return
        self._running, self._end = False, 0
        if self._try(jax.profiler.stop_trace):
            if self._scratch:
                paths.copy(Path(self._scratch.name), self._out)
            print(f"trace: open the file perfetto_trace.json.gz below {self._out} at https://ui.perfetto.dev"
                  f", or pip install xprof and run: xprof --logdir {self._out}", file=sys.stderr)
        if self._scratch:
            self._scratch.cleanup()
            self._scratch = None

    def _try(self, work) -> bool:
        """Return whether `work()` succeeded; if not, print why, and trace nothing more."""
        try:
            work()
            return True
        except Exception as e:
            self._end = 0
            print(f"the profiler failed, and the run goes on without a trace ({type(e).__name__}: "
                  f"{one_line(e)})", file=sys.stderr)
            return False
