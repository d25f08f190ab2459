"""Log the metrics of a run as JSON lines and TensorBoard events; truncate them when a stage resumes."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nla_jax.errors import UserError, one_line
from nla_jax.util import paths
from nla_jax.util.choices import find_function


class JsonLines:
    """A file of JSON lines to append to.

    Opening it drops the rows for which `keep` is False and everything after an incomplete line. Objects in
    a bucket cannot be appended to: there, `flush` writes the whole file."""

    def __init__(self, path: Path, keep: Callable[[dict], bool] = lambda row: True):
        self.path = path
        self._text = "".join(json.dumps(r) + "\n" for r in read(path) if keep(r))
        paths.write(path, self._text)
        self._file = None if paths.is_remote(path) else open(path, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        line = json.dumps(row) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._text += line

    def flush(self) -> None:
        if not self._file:
            paths.write(self.path, self._text)

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()


class MetricsLog:
    """Writes DIR/metrics/STAGE.jsonl, DIR/times/STAGE.jsonl and DIR/tensorboard/STAGE.

    Opening drops metrics of steps >= `start`: a stage that resumes at step 50 writes step 50 again, and the
    file equals that of a run that was not interrupted. Times are in a file of their own, because they
    differ between runs. They include the steps that were run twice.

    callback: "module:function" of your own (docs/howto/own.md), called with (stage, step, numbers) of a row.
    tracker: None, or a `wandb_log.WandbLog`. It gets each row, and the texts of the rows at every `flush`.
    """

    def __init__(self, directory: Path, stage: str, start: int = 0, callback: str = "", tracker=None):
        directory, self._stage, self._called = paths.path(directory), stage, callback
        self._tracker = tracker
        self._callback = callback and find_function(callback, "metrics_callback")
        self._rows = JsonLines(directory / "metrics" / f"{stage}.jsonl", lambda r: r["step"] < start)
        self._times = JsonLines(directory / "times" / f"{stage}.jsonl")
        self._boards = directory / "tensorboard" / stage
        self._scratch = tempfile.TemporaryDirectory() if paths.is_remote(directory) else None
        self._board = TensorBoardWriter(Path(self._scratch.name) if self._scratch else self._boards, start)

    def write(self, step: int, scalars: dict, seconds: dict | None = None, **extra) -> None:
        """Write the numbers of one step.

        Args:
          scalars: name -> float, for the JSON line and TensorBoard.
          seconds: phase -> seconds since the last row (`Clock.lap`), for times/STAGE.jsonl and TensorBoard.
          extra: other JSON values, such as texts, for the JSON line only.
        """
        self._rows.write({"step": step, **scalars, **extra})
        if seconds:
            self._times.write({"step": step, "at": round(time.time(), 3), "seconds": seconds})
        timed = {f"seconds/{name}": value for name, value in (seconds or {}).items()}
        self._board.write(step, {**scalars, **timed})
        if self._tracker:
            self._tracker.row(self._stage, step, {**scalars, **timed})
        if self._callback:
            try:
                self._callback(self._stage, step, dict(scalars))
            except Exception as e:
                why = f"{type(e).__name__}: {one_line(e)}"
                at = f"metrics_callback {self._called!r} failed at {self._stage} step {step}"
                raise UserError(f"{at} ({why}); mend it and start the same command again") from e

    def flush(self) -> None:
        """Write everything to disk, or to the bucket."""
        self._board.flush()
        self._rows.flush()
        self._times.flush()
        if self._tracker:
            self._tracker.samples(self._stage, self._rows.path)
        if self._scratch:
            paths.copy(Path(self._scratch.name), self._boards)

    def close(self) -> None:
        self.flush()
        self._board.close()
        self._rows.close()
        self._times.close()
        if self._scratch:
            self._scratch.cleanup()


class TensorBoardWriter:
    """Write TensorBoard events to a file in a directory.

    The calling thread writes. tensorboardX's own writer uses a thread that dies when the disk is full, and
    its callers then wait for ever.
    """

    def __init__(self, directory: Path, start: int = 0, every: float = 10.0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # tensorboardX names files by the second: a resume within it would overwrite a name without the step.
        self._writer = EventsWriter(str(directory / "events"), f".{start}")
        self._every, self._flushed = every, 0.0
        if start:  # TensorBoard then ignores what an earlier process wrote about these steps
            self._writer.write_event(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: dict) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
        if time.monotonic() - self._flushed > self._every:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def read(path: Path) -> list[dict]:
    """Return the rows of a metrics file, up to the first incomplete line; [] if there is no file."""
    rows, path = [], paths.path(path)
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
