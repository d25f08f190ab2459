"""Write the tables of docs/performance.md from the measurements in docs/results/performance.

    python -m benchmarks.performance_page                                   # write the tables
    python -m benchmarks.performance_page --check                           # fail if they are not up to date
    python -m benchmarks.performance_page --add out.json --to xeon_cpu_full --case cpu_full \\
        --command "python -m benchmarks.rl_step --preset cpu --json out.json"

NAME.json is one subject on one machine: title, machine, columns, the names of its rows, and its runs, oldest
first. A run has commit, date, command, versions, and figures by row. The page shows the newest run that has
all rows. goals.json has the goals, the figures that they are about, and what limits each. The tables are
between the lines `<!-- table NAME -->` and `<!-- end -->` of the page.
"""

import argparse
import datetime
import json
import re
import statistics
import subprocess
import textwrap
from pathlib import Path

from nla_jax.errors import UserError, run_main
from nla_jax.util.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "results" / "performance"
BLOCK = re.compile(r"<!-- table (\S+) -->\n.*?<!-- end -->", re.DOTALL)
# Keys of a phase in the JSON of `benchmarks.rl_step` that a run keeps.
KEPT = ("ours_s", "torch_s", "tunix_s", "ratio", "floor_s", "ours_over_floor", "torch_over_floor",
        "ours_samples_per_s", "torch_samples_per_s", "ours_tokens_per_s", "torch_tokens_per_s",
        "tunix_tokens_per_s", "ours_of_peak", "plain_decode_floor_s")


def read_subjects(folder: Path = RESULTS) -> dict[str, dict]:
    """Return {name: subject} of all files but goals.json."""
    files = sorted(folder.glob("*.json"))
    return {p.stem: json.loads(p.read_text("utf-8")) for p in files if p.stem != "goals"}


def shown_run(subject: dict) -> dict | None:
    """Return the newest run that has all rows; None if there is none."""
    whole = [r for r in subject["runs"] if r["figures"].keys() >= subject["rows"].keys()]
    return whole[-1] if whole else None


def subject_table(subject: dict) -> list[str]:
    """Return the table of a subject as lines of Markdown, with its provenance."""
    run = shown_run(subject)
    if run is None:
        return [f"Not measured on {subject['machine']}."]
    head = [subject["row_name"], *(c["head"] for c in subject["columns"])]
    rows = [[label, *(_cell(run["figures"][row].get(c["key"]), c["form"]) for c in subject["columns"])]
            for row, label in subject["rows"].items()]
    return [*markdown_table(head, rows), "", f"{provenance(subject, run)}"]


def provenance(subject: dict, run: dict) -> str:
    """Return where, when and how a run was measured, with the command as a block of code."""
    commit = f"at `{run['commit']}`" if run["commit"] else "at an unknown commit"
    versions = f" with {run['versions']}" if run.get("versions") else ""
    note = f" {run['note']}" if run.get("note") else ""
    said = _wrap(f"Measured on {run['date']} {commit} on {subject['machine']}{versions}.{note}")
    return f"{said}\n\n    {run['command']}"


def _wrap(text: str) -> str:
    return textwrap.fill(text, 108, break_long_words=False, break_on_hyphens=False)


def _cell(value, form: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if form != "s":
        return format(value, form)
    text = f"{value:.3g}"  # seconds
    return text if "." in text or value >= 100 else text + ".0"


def figure_of(run: dict, place: str) -> float | None:
    """Return the figure at "ROW/KEY" of a run; None if it has none."""
    row, _, key = place.partition("/")
    return run["figures"].get(row, {}).get(key)


def reached(value: float, goal: dict) -> bool:
    return value <= goal["limit"] if goal["better"] == "less" else value >= goal["limit"]


def goal_values(goal: dict, subjects: dict) -> list[tuple[str, float]]:
    """Return (subject's short name, newest value) for every subject that has the goal's figure."""
    out = []
    for place in goal["figures"]:
        name, _, at = place.partition(":")
        values = [figure_of(r, at) for r in subjects[name]["runs"]] if name in subjects else []
        values = [v for v in values if v is not None]
        if values:
            out.append((subjects[name]["short"], values[-1]))
    return out


def goals_table(goals: list[dict], subjects: dict) -> list[str]:
    """Return the table of goals: the goal, the newest value of every machine, and what limits it."""
    rows = []
    for goal in goals:
        found = goal_values(goal, subjects)
        said = [f"{value:{goal['form']}} ({short}{'' if reached(value, goal) else ': not reached'})"
                for short, value in found]
        sign = "≤" if goal["better"] == "less" else "≥"
        rows.append([goal["name"], f"{sign} {goal['limit_text']}", ", ".join(said) or "not measured",
                     goal["limits"]])
    return markdown_table(("figure", "goal", "measured", "what limits it"), rows)


def history_table(goals: list[dict], subjects: dict) -> list[str]:
    """Return every value of every goal's figure, by commit, oldest first."""
    rows = []
    for goal in goals:
        for place in goal["figures"]:
            name, _, at = place.partition(":")
            for run in subjects.get(name, {"runs": []})["runs"]:
                value = figure_of(run, at)
                if value is not None:
                    rows.append([goal["name"], subjects[name]["short"], run["date"], f"`{run['commit']}`",
                                 f"{value:{goal['form']}}"])
    return markdown_table(("figure", "machine", "date", "commit", "value"), rows)


def render(page: str, subjects: dict, goals: list[dict]) -> str:
    """Return the page with every table written again. Raises UserError for a table without a file."""

    def block(match) -> str:
        name = match.group(1)
        if name == "goals":
            lines = goals_table(goals, subjects)
        elif name == "history":
            lines = history_table(goals, subjects)
        elif name in subjects:
            lines = subject_table(subjects[name])
        else:
            raise UserError(f"docs/performance.md has a table {name!r} without {RESULTS / name}.json")
        return "\n".join([f"<!-- table {name} -->", "", *lines, "", "<!-- end -->"])

    return BLOCK.sub(block, page)


# --- new measurements -----------------------------------------------------------------------------

def figures_of(found: dict, case: str = "") -> tuple[dict, str]:
    """Return (figures by row, versions) of the JSON of a benchmark.

    found: of `rl_step` (with `case`, if it has several), of `time_to_fve`, or an object with "figures".
    Raises UserError for another one."""
    if "cases" in found:
        case = case or next(iter(found["cases"]))
        if case not in found["cases"] or "phases" not in found["cases"][case]:
            raise UserError(f"--case {case}: not measured there; it has {', '.join(found['cases'])}")
        return _rl_step_figures(found["cases"][case]), _versions(found["cases"][case]["about"])
    if "time_to" in found:
        return _time_to_figures(found), _versions({n: s["about"] for n, s in found["sides"].items()})
    if "figures" in found:
        return found["figures"], found.get("versions", "")
    raise UserError("--add: not the JSON of benchmarks.rl_step or benchmarks.time_to_fve")


def _rl_step_figures(result: dict) -> dict:
    out = {name: {k: round(p[k], 4) for k in KEPT if p.get(k) is not None}
           for name, p in result["phases"].items()}
    for p in out.values():
        other = p.get("torch_s", p.get("tunix_s"))
        if other and p.get("ours_s"):
            p["speedup"] = round(other / p["ours_s"], 4)
    sizes = {side: m if isinstance(m, int) else (m["device"] or m["rss"])
             for side, m in result.get("memory", {}).items()}
    if all(sizes.values()) and sizes:
        out["memory"] = {f"{side}_gib": round(n / 2**30, 3) for side, n in sizes.items()}
        if len(sizes) == 2:
            other = next(n for side, n in sizes.items() if side != "ours")
            out["memory"]["ratio"] = round(sizes["ours"] / other, 4)
    return out


def _time_to_figures(found: dict) -> dict:
    out = {}
    for reader, rows in found["time_to"].items():
        for row in rows:
            seconds = {f"{n}_s": round(s, 2) for n, s in row["seconds"].items() if s is not None}
            ratios = {f"over_{n}": round(r, 4) for n, r in row["ratios"].items()}
            out[f"{reader} {row['level']:.2f}"] = seconds | ratios
    for name, side in found["sides"].items():
        steps = [m["seconds"] for m in side["steps"]]
        out[f"step {name}"] = {"seconds": round(statistics.median(steps), 3)} if steps else {}
    return out


def _versions(about: dict) -> str:
    words = {f"{k} {v}": None for a in about.values() for k, v in a.items()
             if k in ("jax", "torch", "transformers", "tunix")}
    return ", ".join(words)


def add_run(path: Path, found: dict, *, case: str, command: str, note: str = "") -> None:
    """Append a run to a subject's file."""
    if not path.is_file():
        raise UserError(f"--to {path.stem}: no {path}; write its title, short, machine, row_name, rows and "
                        "columns there first, with an empty list of runs")
    subject = json.loads(path.read_text("utf-8"))
    figures, versions = figures_of(found, case)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    run = {"commit": done.stdout.strip(), "date": datetime.date.today().isoformat(), "command": command,
           "versions": versions, "figures": figures}
    subject["runs"].append(run | ({"note": note} if note else {}))
    if "rates" in found.get("machine", {}):
        subject["runs"][-1]["rates"] = found["machine"]["rates"]
    path.write_text(json.dumps(subject, indent=1, ensure_ascii=False) + "\n", "utf-8")


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    p.add_argument("--add", type=Path, metavar="FILE", help="the JSON of a benchmark to add as a run")
    p.add_argument("--to", metavar="NAME", help="the subject of --add")
    p.add_argument("--case", default="", help="the case of --add, if FILE has several")
    p.add_argument("--command", help="the command that made FILE")
    p.add_argument("--note", default="", help="a sentence to print with the run")
    args = p.parse_args(argv)
    if args.add:
        if not args.to or not args.command:
            raise UserError("--add needs --to NAME and --command TEXT")
        add_run(RESULTS / f"{args.to}.json", json.loads(args.add.read_text("utf-8")), case=args.case,
                command=args.command, note=args.note)
    goals = json.loads((RESULTS / "goals.json").read_text("utf-8"))["goals"]
    old = PAGE.read_text("utf-8")
    new = render(old, read_subjects(), goals)
    if args.check:
        return int(new != old)
    PAGE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    run_main(main, "performance_page")
