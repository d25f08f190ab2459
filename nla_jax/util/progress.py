"""Show progress on a terminal, and measure the time of each phase of a step."""

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator

from nla_jax.util import distributed


class Clock:
    """Measure seconds by phase: `with clock("data"): …`. Time outside every block counts as "other"."""

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
        """Return the seconds of each phase since the last lap. They sum to the elapsed time."""
        now, spent = time.monotonic(), self._spent
        spent["other"] = max(now - self._since - sum(spent.values()), 0.0)
        self._spent, self._since = {}, now
        return {phase: round(seconds, 5) for phase, seconds in spent.items()}


_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_progress(plain: bool = True) -> Iterator[None]:
    """Print progress as lines inside the block, even on a terminal."""
    before = _plain.set(plain)
    try:
        yield
    finally:
        _plain.reset(before)


def is_terminal() -> bool:
    """Return whether to draw: standard error is a terminal, and `plain_progress` is not active."""
    return sys.stderr.isatty() and not _plain.get()


class Progress:
    """Show progress: a bar with rate and remaining time on a terminal, elsewhere a line every few seconds.

    Without a label, and on processes other than process 0, it shows nothing. Use it as a context manager:
    `with Progress("capture", total, unit="texts") as p: p.advance(16)`.

    Args:
      total, done: in `unit`. every: seconds between two lines.
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "steps", every: float = 10.0):
        self.label, self.total, self.done, self.unit, self.every = label, total, done, unit, every
        self._first, self._bar = done, None
        if not distributed.is_first():
            self.label = ""

    def __enter__(self):
        self._began = self._last = time.monotonic()
        if self.label and is_terminal():
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
        """Count `n` more units; show `note` at the end of the line."""
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
                f"{self.label:>14}  {self.done}/{self.total}  {text}  {format_seconds(left)} left  {note}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exc):
        if self._bar:
            self._bar.stop()


def format_seconds(seconds: float) -> str:
    """Format seconds as 0:24, 12:05, or, from one hour, 3:12:05."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes}:{s:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
