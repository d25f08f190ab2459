"""Show a run in another terminal (`nla watch`), from its files, with the panel of `nla train`."""

import dataclasses
import time

from rich.console import Console, ConsoleOptions
from rich.live import Live

from nla_jax.configs import RUN_STAGES
from nla_jax.training import stage_display
from nla_jax.training.stage_display import SAMPLE_SECONDS, Stage
from nla_jax.util import paths, progress
from nla_jax.view import run_files


def read_stage(workdir) -> Stage:
    """Return the current stage of a run from its files. Raises UserError if there is no run."""
    run = run_files.read(workdir)
    left = [s for s in RUN_STAGES if s not in run.done]
    logged = [s for s in stage_display.LOGGED_STAGES if s in run.logged]
    name = left[0] if left else (logged or [RUN_STAGES[-1]])[-1]
    rows = run.logged.get(name, [])
    times = stage_display.read_times(run.path / "times" / f"{name}.jsonl")
    sample = next((r for r in reversed(rows) if "best" in r), None)
    total = int(run.config[name]["steps"]) if name in stage_display.LOGGED_STAGES else 0
    at = stage_display.number(times[-1].get("at")) if times else None
    foot = "finished" if not left else ""
    if left and rows and at:
        foot = f"last step logged {progress.format_seconds(max(time.time() - at, 0.0))} ago"
    elif left and not rows:
        foot = "nothing is logged of this stage yet" if total else "this stage logs no steps"
    done = rows[-1]["step"] + 1 if rows else 0
    return Stage(run.name, name, done, total, rows, times, sample, list(run.done), foot)


class StageRenderable:
    """The Rich renderable of `follow`; it draws its current `stage`."""

    def __init__(self, stage: Stage):
        self.stage = stage

    def __rich_console__(self, console: Console, options: ConsoleOptions):
        yield stage_display.panel(self.stage, options.max_width, options.ascii_only)


def follow(workdir, every: float = 2.0, console: Console | None = None) -> None:
    """Draw a run from its files every `every` seconds until it is finished; only once without a terminal.

    Raises UserError if there is no run.
    """
    console, shown = console or Console(), StageRenderable(read_stage(workdir))
    if not console.is_terminal:
        console.print(shown)
        return
    since = time.monotonic()
    with Live(shown, console=console, auto_refresh=False) as live:
        while not (paths.path(workdir) / "summary.json").exists():
            time.sleep(every)
            now, before = read_stage(workdir), shown.stage
            if now.name == before.name and time.monotonic() - since < SAMPLE_SECONDS:
                now = dataclasses.replace(now, sample=before.sample)
            else:
                since = time.monotonic()
            shown.stage = now
            live.refresh()
