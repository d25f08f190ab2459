"""Write `nla report`: one run, or a comparison of several, as one self-contained HTML file.

The page has no script, and its Content-Security-Policy forbids scripts and requests. The template escapes
every value except the style sheet and the charts; `svg_charts` escapes their texts.
"""

import dataclasses
import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.evaluate import figure_table
from nla_jax.util import paths, writable
from nla_jax.view import curves, run_files, svg_charts
from nla_jax.view.run_files import Run

MOST = 6  # runs on a page, because the style sheet has six colours

# as `curves.DRIFT`
CURVES = (
    *curves.DRIFT,
    ("Reward", "should rise", (("rl", "reward", "reward"),)),
    ("Claims of RL's batches", "should rise if rl.false_claims rewards them",
     (("rl", "claim_precision", "true of their text"),
      ("rl", "claim_precision_shuffled", "true of other documents' texts"))),
    ("FVE of RL's batches by another reader", "should rise", (("rl", "reader_fve", "by the reader"),)),
    ("Error of the reconstruction", "should fall (mean squared, both scaled)", (("rl", "mse", "MSE"),)),
    ("KL to the warm start", "should grow slowly", (("rl", "kl", "KL (nats a token)"),)),
    ("Entropy", "may fall, not to zero", (("rl", "entropy", "nats a token"),)),
    ("Length", "should stay off the cap", (("rl", "length", "tokens written"),)),
    ("Failures", "should fall to zero",
     (("rl", "ok", "1 - unreadable"), ("rl", "truncated", "cut at the cap"))),
    ("Skipped updates", "should stay zero (running total)",
     (("rl", "av_skipped", "AV"), ("rl", "ar_skipped", "AR"))),
    ("Gradient norms", "should have no spikes", (("rl", "av_grad_norm", "AV"), ("rl", "ar_grad_norm", "AR"))),
    ("Warm start of AR: loss", "should fall",
     (("lessons_ar", "loss", "reading lessons"), ("warm_ar", "loss", "explanations"))),
    ("Warm start of AV: loss", "should fall",
     (("lessons_av", "loss", "reading lessons"), ("warm_av", "loss", "explanations"))),
    ("Warm start: gradient norms", "should have no spikes",
     (("warm_ar", "grad_norm", "AR"), ("warm_av", "grad_norm", "AV"))),
)
SHOWN = {(stage, metric) for _, _, found in CURVES for stage, metric, _ in found}
ABOUT = {
    "fve": "through the words",
    "fve_frozen_target": "by the frozen target",
    "fve_shuffled": "another document's",
    "fve_mean_direction": "mean direction",
    "fve_written": "an LLM's words",
}


def write(workdirs: Sequence, out, evaluations: Sequence = (), command: str = "") -> Path:
    """Write the page of the runs to OUT, and return OUT.

    Args:
      evaluations: files of `nla evaluate --json`, in the order of the runs; "" for a run without one.
      command: the command that makes the page, printed at its end.

    Raises:
      UserError: a run does not exist, a file is damaged, or there are more evaluations than runs or more
        than six runs.
    """
    if len(evaluations) > len(workdirs):
        raise UserError(f"{len(evaluations)} evaluations for {len(workdirs)} runs: give them in their order")
    if len(workdirs) > MOST:
        raise UserError(f"{len(workdirs)} runs: a report compares at most {MOST}")
    writable.check_output(out, makes_directory=True)
    given = [*evaluations, *[""] * (len(workdirs) - len(evaluations))]
    found = [run_files.read(w, e) for w, e in zip(workdirs, given, strict=True)]
    out = paths.path(out)
    paths.write(out, render(_disambiguate_names(found), command))
    return out


def render(found: Sequence[Run], command: str = "") -> str:
    """Return the page as HTML."""
    import jinja2

    here = importlib.resources.files("nla_jax.view") / "static"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"cell": figure_table.cell, "duration": duration}
    page = environment.from_string((here / "report.html").read_text("utf-8")).render(
        runs=found,
        command=command,
        style=(here / "report.css").read_text("utf-8"),
        cards=[_cards(r) for r in found],
        forest=_forest(found),
        curves=_curves(found),
        others=_others(found),
        splits=_splits(found),
        evaluations=[r for r in found if r.evaluation],
        samples=_samples(found),
        differs=_group_settings(found),
        time=[(r, _time(r, i)) for i, r in enumerate(found)],
    )
    # A text may have lone surrogates, which UTF-8 cannot encode.
    return page.encode("utf-8", "replace").decode("utf-8")


def duration(seconds: float) -> str:
    """Format seconds in s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _disambiguate_names(found: list[Run]) -> list[Run]:
    """Rename runs that share a name to their whole paths."""
    names = [r.name for r in found]
    return [dataclasses.replace(r, name=str(r.path)) if names.count(r.name) > 1 else r for r in found]


def _cards(r: Run) -> list[tuple[str, str, str]]:
    """Return (label, value, note) of the figures at the top of the page."""
    out = []
    for name, bundle in (("RL", "RL"), ("warm start", "warm start")):
        if f := r.figure("fve", bundle):
            out.append((f"FVE, {name}", f"{f.value:.2f}", _format_interval(f)))
        if f := r.figure("fve_frozen_target", bundle):
            out.append((f"by the frozen target, {name}", f"{f.value:.2f}", _format_interval(f)))
    for name, said in (("fve_shuffled", "FVE, shuffled"), ("fve_mean_direction", "FVE, mean direction")):
        if f := r.figure(name):
            out.append((said, f"{f.value:.2f}", _format_interval(f)))
    if f := r.figure("ok"):
        out.append(("readable", f"{100 * f.value:.0f} %", f"of {f.n} answers"))
    if r.seconds:
        out.append(("time", duration(sum(r.seconds.values())), r.summary.get("device", "")))
    return [(a, b.replace("-", "−"), c) for a, b, c in out]


def _format_interval(f) -> str:
    return "" if f.low is None else f"{f.low:.2f} to {f.high:.2f}".replace("-", "−")


def _forest(found: Sequence[Run]) -> str:
    """Draw the FVE figures with intervals: for each figure, one row per run."""
    wanted = [("fve", "warm start", "warm start"), *((name, said, "") for name, said in ABOUT.items())]
    dots, many = [], len(found) > 1
    for name, said, bundle in wanted:
        for i, r in enumerate(found):
            if bundle and r.last == bundle:
                continue  # the next row shows it
            if f := r.figure(name, bundle):
                label = f"{r.last}, {said}" if name == "fve" and not bundle else said
                label = f"{label} · {_short(r.name, 30 - len(label))}" if many else label
                dots.append(svg_charts.Dot(label, f.value, f.low, f.high, i if many else 5 * (name != "fve")))
    mean = [f.value for r in found if (f := r.figure("fve_mean_direction"))]
    rows = figure_table.split_title("held-out rows", _note(found, "heldout"))
    return svg_charts.intervals(f"FVE on {rows} with 95 % intervals", dots, marks=mean[:1])


def _note(found: Sequence[Run], split: str) -> str:
    return next((r.notes[split] for r in found if split in r.notes), "")


def _curves(found: Sequence[Run]) -> list[dict]:
    out = []
    for title, hope, wanted in CURVES:
        drawn, names = [], []
        for j, (stage, metric, name) in enumerate(wanted):
            for i, r in enumerate(found):
                points = _points(r, stage, metric, name.startswith("1 - "))
                if points:
                    said = name.removeprefix("1 - ")
                    several = len(found) > 1
                    drawn.append(svg_charts.Line(f"{r.name}, {said}" if several else said, points,
                                                 i if several else j, j if several else 0))
                    names.append((said, 0 if several else j, j if several else 0))
        if svg := svg_charts.lines(title, drawn):
            out.append({"title": title, "hope": hope, "svg": svg, "names": list(dict.fromkeys(names))})
    return out


def _others(found: Sequence[Run]) -> list[dict]:
    """Return the curves of all logged metrics that CURVES does not have."""
    named = dict.fromkeys((s, k) for r in found for s, rows in r.logged.items() for row in rows for k in row)
    out = []
    for stage, metric in named:
        if (stage, metric) in SHOWN or metric == "step":
            continue
        drawn = [svg_charts.Line(r.name, _points(r, stage, metric), i) for i, r in enumerate(found)]
        if svg := svg_charts.lines(f"{stage}: {metric}", drawn):
            out.append({"title": f"{stage}: {metric}", "svg": svg})
    return out


def _points(r: Run, stage: str, metric: str, inverted: bool = False) -> list[tuple[float, float]]:
    rows = ((row["step"], row.get(metric)) for row in r.logged.get(stage, ()))
    kept = [(x, float(y)) for x, y in rows if isinstance(y, int | float) and not isinstance(y, bool)]
    return [(x, 1.0 - y) for x, y in kept] if inverted else kept


def _splits(found: Sequence[Run]) -> list[dict]:
    """Return the figures of the runs' own evaluations: a table per split, with a column per bundle."""
    out = []
    for split in dict.fromkeys(s for r in found for by in r.figures.values() for s in by):
        columns = {
            f"{r.name}, {b}" if len(found) > 1 else b: by[split]
            for r in found for b, by in r.figures.items() if split in by
        }
        names = dict.fromkeys(f.name for fs in columns.values() for f in fs)
        rows = [[next((f for f in fs if f.name == n), None) for fs in columns.values()] for n in names]
        about = [next(f for f in row if f) for row in rows]
        title = figure_table.split_title(split, _note(found, split))
        out.append({"split": title, "columns": list(columns), "rows": list(zip(about, rows, strict=True))})
    return out


def _samples(found: Sequence[Run]) -> list[dict]:
    """Return the first held-out rows with each run's explanations; the text identifies a row."""
    by_text: dict[str, dict] = {}
    for r in found:
        for bundle, by in r.samples.items():
            for s in by.get("heldout", ()):
                text = s.get("text", "")
                row = by_text.setdefault(text, {"text": text, "tail": _tail(text), "said": [],
                                                "doc": s.get("doc_id", ""),
                                                "written": s.get("written", "")})
                who = f"{r.name}, {bundle}" if len(found) > 1 else bundle
                row["said"].append((who, s.get("explanation", "")))
    return list(by_text.values())


def _tail(text: str, words: int = 22) -> str:
    """Return the last words of a text."""
    found = text.split()
    return " ".join(found[-words:])


def _group_settings(found: Sequence[Run]) -> dict:
    """Group settings: those that differ between runs, those that differ from the default, the others."""
    default = _flat(configs.default().to_dict())
    flat = [default | _flat(r.config) for r in found]
    keys = list(dict.fromkeys(k for f in flat for k in f))
    rows = [(k, default.get(k, ""), [f.get(k, "") for f in flat]) for k in sorted(keys)]
    between = [row for row in rows if any(v != row[2][0] for v in row[2])]
    changed = [row for row in rows if row not in between and any(v != row[1] for v in row[2])]
    return {"between": between, "changed": changed,
            "others": [row for row in rows if row not in between and row not in changed]}


def _flat(d: dict, prefix: str = "") -> dict:
    out = {}
    for k, v in d.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def _time(r: Run, i: int) -> str:
    total = sum(r.seconds.values())
    rows = [(s, v, f"{duration(v)} · {100 * v / total:.0f} %", i) for s, v in r.seconds.items()
            if total and math.isfinite(v)]
    return svg_charts.bars(f"seconds by stage of {r.name}", rows)


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: max(n - 1, 3)] + "…"
