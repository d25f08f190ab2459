"""Metrics of a run: JSON lines and TensorBoard, rewound when a stage resumes; progress on a terminal."""

import contextlib
import contextvars
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nla_jax import paths, pod


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
    """

    def __init__(self, directory: Path, stage: str, start: int = 0):
        directory = paths.path(directory)
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


class Clock:
    """Where time goes: `with clock("data"): …` for what has a name, the rest is "other"."""

    def __init__(self):
        self._spent: dict[str, float] = {}
        self._since = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._spent[phase] = self._spent.get(phase, 0.0) + time.monotonic() - began

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap; together they are all the time that has passed."""
        now, spent = time.monotonic(), self._spent
        spent["other"] = max(now - self._since - sum(spent.values()), 0.0)
        self._spent, self._since = {}, now
        return {phase: round(seconds, 5) for phase, seconds in spent.items()}


_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plainly(plain: bool = True) -> Iterator[None]:
    """Inside, progress is told in lines even on a terminal."""
    before = _plain.set(plain)
    try:
        yield
    finally:
        _plain.reset(before)


def on_terminal() -> bool:
    """Whether there is somebody to draw for: standard error is a terminal, and lines were not asked for."""
    return sys.stderr.isatty() and not _plain.get()


class Progress:
    """A bar with rate and time left on a terminal; a line every few seconds elsewhere; nothing at all
    without a label, or on another process than the first.

    Used as a context manager: `with Progress("capture", total, unit="texts") as p: p.advance(16)`.
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "steps", every: float = 10.0):
        self.label, self.total, self.done, self.unit, self.every = label, total, done, unit, every
        self._first, self._bar = done, None
        if not pod.is_first():
            self.label = ""

    def __enter__(self):
        self._began = self._last = time.monotonic()
        if self.label and on_terminal():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:>14}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=self.done, rate="", note=""
            )
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done; `note` is shown at the end of the line."""
        self.done += n
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._began, 1e-9)
        text = f"{rate:.3g} {self.unit}/s"
        if self._bar:
            self._bar.update(self._task, completed=self.done, rate=text, note=note)
        elif self.label and (now - self._last >= self.every or self.done >= self.total):
            self._last = now
            left = (self.total - self.done) / max(rate, 1e-9)
            print(
                f"{self.label:>14}  {self.done}/{self.total}  {text}  {clock_face(left)} left  {note}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exc):
        if self._bar:
            self._bar.stop()


def clock_face(seconds: float) -> str:
    """Such as 0:24, 12:05, or 3:12:05 from an hour on."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes}:{s:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def short(text: str, n: int = 160) -> str:
    """One line of at most n characters, for logs."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= n else text[: n - 1] + "…"


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters (escape sequences begin with one),
    marks that turn the direction of writing, halves of characters. A model may have written it."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
