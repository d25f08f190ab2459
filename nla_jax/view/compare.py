"""Compare several finished runs: their settings and their figures."""

import json
from collections.abc import Sequence
from pathlib import Path

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.evaluate import figure_table, probe_table
from nla_jax.util import paths, writable
from nla_jax.util.tables import markdown_table
from nla_jax.view import markdown_report

FIGURES = ("fve", "fve_frozen_target", "fve_greedy", "fve_shuffled", "fve_written", "av_gap", "ok", "tokens",
           "repeated")


def write(workdirs: list[str | Path], out: str | Path, command: str = "", names: Sequence[str] = ()) -> Path:
    """Write OUT, a Markdown table with a row for each run; settings are compared with the first run.

    names: of the figures, one column each; default: FIGURES.

    Figures are those of held-out rows, warm start and RL. Minutes are the sum over all stages, including
    stages that the run reused from another run.

    Raises:
      UserError: a run has not finished, the runs have different numbers of held-out rows, or no run has one
        of the figures.
    """
    workdirs, out = [paths.path(w) for w in workdirs], paths.path(out)
    writable.check_output(out, makes_directory=True)
    runs = [markdown_report.summary_of(p) for p in workdirs]
    stored = [json.loads((p / "config.json").read_text("utf-8")) for p in workdirs]
    for path, run in zip(workdirs, runs, strict=True):
        if run["rows"]["heldout"] != runs[0]["rows"]["heldout"]:
            raise UserError(
                f"{path} was evaluated on {run['rows']['heldout']} held-out rows, {workdirs[0]} on "
                f"{runs[0]['rows']['heldout']}: they cannot be compared"
            )
    for name in names:
        if not any(_figure(run, stage, name) for run in runs for stage in ("warm_start", "rl")):
            raise UserError(f"no run has the figure {name!r}: train with more eval.probes, or omit it")
    names = names or FIGURES
    mean = _figure(runs[0], "warm_start", "fve_mean_direction")
    notes = dict.fromkeys(n for run in runs if (n := run.get("notes", {}).get("heldout")))
    lines = [f"# {out.stem}", ""]
    if command:
        lines += ["Made by:", "", *(f"    {c}" for c in command.splitlines()), ""]
    lines += [
        markdown_report.describe_setup(runs[0]),
        "",
        f"{runs[0]['rows']['heldout']} held-out rows, through text, with 95 % bootstrap intervals over "
        f"documents. The mean direction scores {figure_table.cell(mean)}. "
        f"Settings are compared with `{workdirs[0].name}`.",
        "",
        *(line for note in notes for line in (note, "")),
    ]
    rows = []
    for path, run, config in zip(workdirs, runs, stored, strict=True):
        differ = configs.differences(stored[0], config)
        changed = [f"{d.key} {markdown_report.escape_inline(str(d.present))}" for d in differ]
        stages = ["warm_start", "rl"] if config["rl"]["steps"] else ["warm_start"]
        cells = []
        for name in names:
            found = [figure_table.cell(_figure(run, s, name)) for s in stages]
            cells.append(" → ".join(found) if any(found) else "")
        minutes = sum(run["seconds"].values()) / 60
        taken = run["steps"].get("rl", 0)
        rows.append([path.name, ", ".join(changed), _gain(run), *cells, str(taken), f"{minutes:.1f}"])
    head = ["run", "what differs", "RL's gain, paired", *names, "steps of RL", "min"]
    lines += markdown_table(head, rows)
    paths.write(out, "\n".join(lines) + "\n")
    return out


def _gain(run: dict) -> str:
    low, high = run.get("rl_gain_interval", (None, None))
    return "" if low is None else f"{run['rl_gain']:.3f} [{low:.3f}, {high:.3f}]"


def _figure(run: dict, key: str, name: str) -> probe_table.Figure | None:
    return next((f for f in markdown_report.figures_of(run, key, "heldout") if f.name == name), None)
