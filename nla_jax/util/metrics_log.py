"""Metrics of a run: JSON lines and TensorBoard, rewound when a stage resumes; progress on a terminal."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nla_jax.errors import UserError, one_line
from nla_jax.util import paths
from nla_jax.util.choices import find_function


class JsonLines:
    """A file of JSON lines that is appended to. When opened, rows that `keep` refuses are dropped, and
    what was only half written. In object storage, where nothing can be appended, it appears when `flush` is
    called."""

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

    Metrics at or after `start` are dropped when opened: a stage that resumes at step 50 writes step 50
    again, and the file reads as if it had never stopped. The times stand apart because no two runs have the
    same; they tell what happened, steps that were done twice included.

    callback: "module:function" of your own (docs/howto/own.md), called with (stage, step, numbers) of a row.
    """

    def __init__(self, directory: Path, stage: str, start: int = 0, callback: str = ""):
        directory, self._stage, self._called = paths.path(directory), stage, callback
        self._callback = callback and find_function(callback, "metrics_callback")
        self._rows = JsonLines(directory / "metrics" / f"{stage}.jsonl", lambda r: r["step"] < start)
        self._times = JsonLines(directory / "times" / f"{stage}.jsonl")
        self._boards = directory / "tensorboard" / stage
        self._scratch = tempfile.TemporaryDirectory() if paths.is_remote(directory) else None
        self._board = Board(Path(self._scratch.name) if self._scratch else self._boards, start)

    def write(self, step: int, scalars: dict, seconds: dict | None = None, **extra) -> None:
        """One step's numbers.

        Args:
          seconds: since the last row, by what they went into (`Clock.lap`); they go to the times.
          extra: texts, say, for the JSON line only.
        """
        self._rows.write({"step": step, **scalars, **extra})
        if seconds:
            self._times.write({"step": step, "at": round(time.time(), 3), "seconds": seconds})
        timed = {f"seconds/{name}": value for name, value in (seconds or {}).items()}
        self._board.write(step, {**scalars, **timed})
        if self._callback:
            try:
                self._callback(self._stage, step, dict(scalars))
            except Exception as e:
                why = f"{type(e).__name__}: {one_line(e)}"
                at = f"metrics_callback {self._called!r} failed at {self._stage} step {step}"
                raise UserError(f"{at} ({why}); mend it and start the same command again") from e

    def flush(self) -> None:
        """Everything written is on disk, or in the bucket."""
        self._board.flush()
        self._rows.flush()
        self._times.flush()
        if self._scratch:
            paths.copy(Path(self._scratch.name), self._boards)

    def close(self) -> None:
        self.flush()
        self._board.close()
        self._rows.close()
        self._times.close()
        if self._scratch:
            self._scratch.cleanup()


class Board:
    """TensorBoard's events in a file of a directory.

    Written by the caller: tensorboardX's own writer is a thread, and where the disk is full that thread
    dies and everybody waits for it.
    """

    def __init__(self, directory: Path, start: int = 0, every: float = 10.0):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        # Names end with the second, and with the step: a file of the same second would be written over.
        self._writer = EventsWriter(str(directory / "events"), f".{start}")
        self._every, self._flushed = every, 0.0
        if start:  # what an earlier process wrote about these steps does not count
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
    """The rows of a metrics file; a half-written last line is left out."""
    rows, path = [], paths.path(path)
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
