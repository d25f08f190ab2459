"""Metrics of a run: JSON lines and TensorBoard, rewound when a stage resumes."""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

from nla_jax import paths, pod


class MetricsLog:
    """Writes DIR/metrics/STAGE.jsonl and DIR/tensorboard/STAGE.

    Lines at or after `start` are dropped when opened: a stage that resumes at step 50 writes step 50
    again, and the file reads as if it had never stopped. In object storage, where nothing can be appended,
    files appear when `flush` is called.
    """

    def __init__(self, directory: Path, stage: str, start: int = 0):
        directory = paths.path(directory)
        self.path, self._boards = directory / "metrics" / f"{stage}.jsonl", directory / "tensorboard" / stage
        self._text = "".join(json.dumps(r) + "\n" for r in read(self.path) if r["step"] < start)
        paths.write(self.path, self._text)
        self._remote = paths.is_remote(directory)
        self._file = None if self._remote else open(self.path, "a", encoding="utf-8")
        self._scratch = tempfile.TemporaryDirectory() if self._remote else None
        self._board = Board(Path(self._scratch.name) if self._remote else self._boards, start)

    def write(self, step: int, scalars: dict, **extra) -> None:
        """One step's numbers; `extra` (texts, say) goes to the JSON line only."""
        line = json.dumps({"step": step, **scalars, **extra}) + "\n"
        if self._remote:
            self._text += line
        else:
            self._file.write(line)
            self._file.flush()
        self._board.write(step, scalars)

    def flush(self) -> None:
        """Everything written is on disk, or in the bucket."""
        self._board.flush()
        if self._remote:
            paths.write(self.path, self._text)
            paths.copy(Path(self._scratch.name), self._boards)

    def close(self) -> None:
        self.flush()
        self._board.close()
        for opened, close in ((self._file, "close"), (self._scratch, "cleanup")):
            if opened:
                getattr(opened, close)()


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
        if self.label and sys.stderr.isatty():
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
                f"{self.label:>14}  {self.done}/{self.total}  {text}  {_clock(left)} left  {note}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exc):
        if self._bar:
            self._bar.stop()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def short(text: str, n: int = 160) -> str:
    """One line of at most n characters, for logs."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= n else text[: n - 1] + "…"
