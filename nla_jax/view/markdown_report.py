"""Write a finished run as a Markdown page: figures, seconds, curves, and ten unselected samples."""

import json
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.evaluate import figure_table, probe_table
from nla_jax.pipeline import run_directory
from nla_jax.util import metrics_log, path_kinds, paths, writable
from nla_jax.view import curves

COLUMNS = {"warm start": "warm_start", "RL": "rl"}
# (title, lines (stage, metric, name)) of each chart
CURVES = tuple(
    (f"{stage}: {metric}", ((stage, metric, ""),))
    for stage, metric in (
        ("lessons_ar", "loss"), ("lessons_av", "loss"), ("warm_ar", "loss"), ("warm_av", "loss"),
        ("rl", "reward"), ("rl", "mse"), ("rl", "kl"), ("rl", "entropy"), ("rl", "length"), ("rl", "ok"))
) + tuple((title, lines) for title, _, lines in curves.DRIFT)


def write(workdir: str | Path, out: str | Path, command: str) -> Path:
    """Write the page OUT (.md) and its curves (.png in the same directory); return OUT.

    Args:
      command: the command that made the run, printed on the page.

    Raises:
      UserError: the run has no summary yet, or matplotlib is missing.
    """
    workdir, out = paths.path(workdir), paths.path(out)
    writable.check_output(out, makes_directory=True)
    summary = summary_of(workdir)
    out.parent.mkdir(parents=True, exist_ok=True)
    png = out.with_suffix(".png")
    with paths.upload_after(png) as place:
        plot(workdir, place)
    config = json.loads((workdir / "config.json").read_text("utf-8"))
    seconds = summary["seconds"]
    total = sum(seconds.values())
    lines = [
        f"# {out.stem}",
        "",
        "Made by:",
        "",
        f"    {command}",
        f"    nla results {workdir} --out {out}",
        "",
        describe_setup(summary),
        "",
        f"{total / 60:.1f} minutes in all: " + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()) + ".",
        "",
        f"Rows: {_pairs(summary['rows'])}; documents: {_pairs(summary['documents'])} (no document in two "
        f"splits). Explanations: {config['data']['explanation_lines']} lines, cap {config['rl']['max_new']} "
        f"tokens, temperature {config['eval']['temperature']}.",
        "",
    ]
    for split in summary["rl"]:
        both = {name: figures_of(summary, key, split) for name, key in COLUMNS.items()}
        note = summary.get("notes", {}).get(split, "")  # older runs have none
        lines += [f"## {figure_table.split_title(split, note)}", "", *([note, ""] if note else [])]
        lines += [*figure_table.markdown(both), ""]
    if "rl_gain" in summary:
        low, high = summary["rl_gain_interval"]
        apart = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        lines += [f"RL added {summary['rl_gain']:.3f}{apart} of FVE on the same held-out rows (paired).", ""]
    if chosen := _chosen_step(workdir):
        lines += [chosen, ""]
    lines += [f"![curves]({png.name})", "", "## Ten held-out samples, the first ten rows, not selected", ""]
    warm, rl = (run_directory.read_done(workdir, s)["samples"]["heldout"] for s in ("eval_warm", "eval_rl"))
    for a, b in zip(warm, rl, strict=True):
        tail = " ".join(a["text"].split()[-25:])
        lines += [
            f"- … {escape_inline(tail)} ▮",
            f"  - warm start: {escape_inline(a['explanation']) or '(unreadable)'}",
            f"  - RL: {escape_inline(b['explanation']) or '(unreadable)'}",
        ]
    paths.write(out, "\n".join(lines) + "\n")
    return out


def summary_of(workdir: Path) -> dict:
    """Read the summary of a finished run. Raises UserError if there is none."""
    path = workdir / "summary.json"
    if not path.exists():
        unfinished = "let `nla train` finish first"
        hint = unfinished if path_kinds.is_run(workdir) else path_kinds.hint(workdir) or unfinished
        raise UserError(f"{workdir}: no summary.json; {hint}")
    return json.loads(path.read_text("utf-8"))


def describe_setup(summary: dict) -> str:
    """Return device, seed, target and versions as sentences."""
    versions = ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
    return (
        f"Device: {summary['device']}. Seed {summary['seed']}. Target: `{summary['target']}`. {versions}."
    )


def _chosen_step(workdir: Path) -> str:
    """Return which step of RL became the bundle and why, as a sentence; "" if no rule chose one."""
    done = workdir / "done" / "rl.json"
    chosen = json.loads(done.read_text("utf-8")).get("chosen") if done.exists() else None
    return "" if not chosen else f"The bundle is that of step {chosen['step']} of RL: {chosen['why']}."


def plot(workdir: Path, png: Path) -> None:
    """Plot the logged CURVES of a run to a PNG file. Raises UserError if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("matplotlib is missing: pip install 'nla_jax[report]'") from e
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    logs = {stage: metrics_log.read(workdir / "metrics" / f"{stage}.jsonl")
            for stage in {line[0] for _, lines in CURVES for line in lines}}
    found = []
    for title, lines in CURVES:
        points = {name: [(r["step"], r[metric]) for r in logs[stage] if metric in r]
                  for stage, metric, name in lines}
        if points := {name: p for name, p in points.items() if p}:
            found.append((title, points))
    wide = min(len(found), 5) or 1
    tall = -(-len(found) // wide) or 1
    figure, axes = plt.subplots(tall, wide, figsize=(2.8 * wide, 2.5 * tall), squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for ax, (title, points) in zip(axes.flat, found, strict=False):
        ax.set_visible(True)
        for name, p in points.items():
            ax.plot(*zip(*p, strict=True), lw=1.2, label=name, marker="." if len(p) < 20 else "")
        ax.set_title(title, fontsize=9)
        ax.tick_params(labelsize=7)
        if len(points) > 1:
            ax.legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(png, dpi=90)
    plt.close(figure)


def figures_of(summary: dict, key: str, split: str) -> list[probe_table.Figure]:
    """Return the figures of a run's bundle `key` ("warm_start" or "rl") on a split."""
    return [probe_table.Figure(**f) for f in summary[key][split]]


def _pairs(d: dict) -> str:
    return ", ".join(f"{k} {v}" for k, v in d.items())


def escape_inline(text: str) -> str:
    """Escape model output for a Markdown page: one line, without Markdown or HTML syntax."""
    text = " / ".join(text.splitlines())
    return text.translate({ord(char): f"&#{ord(char)};" for char in "&\\`*_[]<>|#!~$"})
