"""Show a training stage on a terminal: progress and time, the metrics with their curves, and samples of AV.

`panel` reads logged rows only, so `nla train` (`Display`) and `nla watch` (`nla_jax.view.watch`) draw the
same panel. Model output is untrusted: it is drawn as plain text, without markup or escape sequences.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nla_jax.configs import RL_STAGES, RUN_STAGES, STAGES
from nla_jax.util import distributed, metrics_log, progress, terminal_text

LOGGED_STAGES = (*STAGES, *RL_STAGES)
CURVES = (
    ("FVE, held out", "heldout_fve"),
    ("by frozen target", "heldout_fve_frozen_target"),
    ("FVE, shuffled", "heldout_fve_shuffled"),
    ("last word right", "heldout_last_word"),
    ("claims true", "heldout_claim_precision"),
    ("reward", "reward"),
    ("error", "mse"),
    ("loss", "loss"),
    ("KL", "kl"),
    ("tokens written", "length"),
    ("failed", "ok"),  # 1 - ok
    ("gradient norm", "grad_norm"),
    ("gradient of AV", "av_grad_norm"),
    ("gradient of AR", "ar_grad_norm"),
)
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
RECENT = 30  # rows of times that the rate is averaged over
SAMPLE_SECONDS = 10.0  # how long a sample is shown at least


@dataclasses.dataclass(frozen=True)
class Stage:
    """The state of a stage that `panel` draws.

    run: the run's name. name: of the stage. done, total: steps; total is 0 for a stage that logs none.
    rows: of metrics/STAGE.jsonl. times: of times/STAGE.jsonl. sample: the row whose best answer is shown.
    finished: names of finished stages. foot: a last line.
    """

    run: str
    name: str
    done: int
    total: int
    rows: Sequence[dict] = ()
    times: Sequence[dict] = ()
    sample: dict | None = None
    finished: Sequence[str] = ()
    foot: str = ""


def panel(stage: Stage, width: int, ascii_only: bool = False) -> Panel:
    """Draw a stage as a panel, `width` cells wide."""
    parts = [_stages(stage, "+" if ascii_only else "✓")] if stage.name in RUN_STAGES else []
    if stage.total:
        parts += [_bar(stage), _text(format_seconds_per_step(stage.times), "dim")]
    if stage.rows:
        parts += [Text(), _curves(stage.rows, max(width - 56, 8), ascii_only)]
    parts += _skipped_updates(stage.rows[-1]) if stage.rows else []
    if (best := (stage.sample or {}).get("best")) and isinstance(best, dict):
        said = f"step {stage.sample['step']}, the best of one activation's answers"
        reward = number(best.get("reward"))
        said += "" if reward is None else f" (reward {reward:.3g})"
        parts += [Text(), _text(said + ":", "dim"), _text(str(best.get("text", ""))[:400])]
    if stage.foot:
        parts += [Text(), _text(stage.foot, "dim")]
    title = _text(f"{stage.run}: {stage.name}", "bold")
    return Panel(Group(*parts), title=title, title_align="left", width=width, safe_box=True)


def _text(said: str, style: str = "") -> Text:
    return Text(terminal_text.replace_unprintable(said), style)


def _stages(stage: Stage, tick: str) -> Text:
    """Draw the stage's position in the run, with the previous and the next stage."""
    at = RUN_STAGES.index(stage.name)
    line = Text(f"stage {at + 1} of {len(RUN_STAGES)} ", "dim", overflow="ellipsis", no_wrap=True)
    for name in RUN_STAGES[max(at - 1, 0) : at + 2]:
        done, here = name in stage.finished, name == stage.name
        line.append(f"  {name} {tick}" if done else f"  {name}", "bold" if here else "")
    return line


def _bar(stage: Stage) -> Table:
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    seconds = sum(seconds_per_step(stage.times).values())
    told = ""
    if seconds:
        rate = f"{seconds:.3g} s a step" if seconds >= 1 else f"{1 / seconds:.3g} steps a second"
        told = f"{rate}  {progress.format_seconds((stage.total - stage.done) * seconds)} left"
    bar = ProgressBar(total=stage.total, completed=stage.done)
    line.add_row(Text(f"step {stage.done} of {stage.total}"), bar, Text(told))
    return line


def seconds_per_step(times: Sequence[dict]) -> dict[str, float]:
    """Return the mean seconds of a step by phase, over the last RECENT rows; compile time is left out."""
    out, steps = {}, 0
    earlier = [None, *times][-RECENT - 1 : -1] if times else []
    for before, row in zip(earlier, times[-RECENT:], strict=True):
        # A row covers all steps since the previous row. After a resume, its step may be smaller.
        steps += max(row["step"] - before["step"], 1) if before else 1
        for phase, value in row["seconds"].items():
            if phase != "compile" and (found := number(value)) is not None:
                out[phase] = out.get(phase, 0.0) + found
    return {phase: value / steps for phase, value in out.items()}


def read_times(path: Path) -> list[dict]:
    """Return the rows of a times file that have an integer step and seconds by phase."""
    rows = (r for r in metrics_log.read(path) if isinstance(r, dict))
    return [r for r in rows if type(r.get("step")) is int and isinstance(r.get("seconds"), dict)]


def format_seconds_per_step(times: Sequence[dict]) -> str:
    """Format `seconds_per_step`, the longest phase first, and the total compile time."""
    found = sorted(seconds_per_step(times).items(), key=lambda item: -item[1])
    compiled = sum(number(r["seconds"].get("compile")) or 0.0 for r in times)
    said = ["a step: " + ", ".join(f"{p} {s:.3g} s" for p, s in found if s >= 5e-4)] if found else []
    said += [f"compiling {compiled:.3g} s"] if compiled else []
    return "; ".join(said)


def _curves(rows: Sequence[dict], width: int, ascii_only: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for label, metric in CURVES:
        values = [x for r in rows if (x := number(r.get(metric))) is not None]
        if values:
            values = [1 - x for x in values] if metric == "ok" else values
            finite = [x for x in values if math.isfinite(x)]
            between = f"{min(finite):.3g} … {max(finite):.3g}" if finite else ""
            line = sparkline(values, min(width, 48), ASCII_BARS if ascii_only else BARS)
            table.add_row(label, f"{values[-1]:.3g}", Text(line, "cyan"), Text(between, "dim"))
    return table


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """Draw values as at most `width` bars, scaled from the minimum to the maximum.

    With more values than bars, a bar is the mean of consecutive values. Non-finite values are gaps."""
    stretches = [np.array(s) for s in np.array_split(np.array(values, float), min(width, len(values)))]
    means = [float(s[np.isfinite(s)].mean()) if np.isfinite(s).any() else math.nan for s in stretches]
    finite = [m for m in means if math.isfinite(m)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((m - low) * scale)] if math.isfinite(m) else " " for m in means)


def _skipped_updates(row: dict) -> list[Text]:
    found = {name: number(row.get(key)) for name, key in
             (("AV", "av_skipped"), ("AR", "ar_skipped"), ("", "skipped"))}
    said = ", ".join(f"{name} {n:.0f}".strip() for name, n in found.items() if n)
    return [Text(f"skipped updates (gradients are not finite): {said}", "bold red")] if said else []


def number(value) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Lines(progress.Progress):
    """Print progress as lines, with the last metrics at the end of each line."""

    _note = ""

    def saw(self, row: dict, seconds: dict | None = None) -> None:
        """Take the metrics of a step, and its seconds by phase if the step was logged."""
        shown = [k for k in ("reward", "mse", "loss", "ok", "length", "kl") if k in row]
        self._note = "  ".join(f"{k} {row[k]:.3f}" for k in shown)

    def advance(self, n: int = 1, note: str = "") -> None:
        super().advance(n, note or self._note)


class Display:
    """Draw `panel` on a terminal, once a second, in a thread.

    A step only appends numbers that are already on the host to a list, so it never waits for the terminal."""

    def __init__(self, stage: str, total: int, done: int, workdir: Path, console: Console | None = None):
        self._rows = [r for r in metrics_log.read(workdir / "metrics" / f"{stage}.jsonl") if r["step"] < done]
        self._times = read_times(workdir / "times" / f"{stage}.jsonl")
        finished = [s for s in RUN_STAGES if (workdir / "done" / f"{s}.json").exists()]
        self._stage = Stage(workdir.name, stage, done, total, self._rows, self._times, finished=finished)
        self._shown_since = -math.inf
        self._live = Live(self, console=console or Console(stderr=True), refresh_per_second=1)

    def __enter__(self):
        self._live.start()
        return self

    def saw(self, row: dict, seconds: dict | None = None) -> None:
        """Take the metrics of a step, and its seconds by phase if the step was logged."""
        self._rows.append(row)
        if seconds:
            self._times.append({"step": row["step"], "seconds": seconds})
        if "best" in row and time.monotonic() - self._shown_since >= SAMPLE_SECONDS:
            self._shown_since = time.monotonic()
            self._stage = dataclasses.replace(self._stage, sample=row)

    def advance(self, n: int = 1) -> None:
        self._stage = dataclasses.replace(self._stage, done=self._stage.done + n)

    def __rich_console__(self, console: Console, options: ConsoleOptions):
        yield panel(self._stage, options.max_width, options.ascii_only)

    def __exit__(self, *exc):
        self._live.stop()


def display(stage: str, total: int, done: int, workdir: Path) -> Display | Lines:
    """Return the display of a stage of `total` steps: a context manager with `saw` and `advance`.

    It is a panel on a terminal, and lines elsewhere. In a pod, only process 0 shows anything."""
    if distributed.is_first() and progress.is_terminal():
        return Display(stage, total, done, workdir)
    return Lines(stage, total, done)
