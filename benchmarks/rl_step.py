"""Measure the RL step and its phases: nla_jax, a PyTorch reference and the floor, alternately on one machine.

    python -m benchmarks.rl_step --preset cpu --json out.json
    python -m benchmarks.rl_step --case qwen2_5_7b_lora --repeats 2 --no-torch --json out.json
    python -m benchmarks.rl_step --peer tunix --json out.json

Each side runs in its own process and waits while the other runs. Before the timing, both sides must agree on
log-probabilities of the same answers and on AR's predictions, in float32 and in bfloat16. They must also
agree on losses, KL and gradient norms of the updates. Every time is written to OUT.jsonl at once.
docs/performance.md explains the figures.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks import cases, floors, machine, peer
from benchmarks.agreement import SidesDisagree, check_agreement, check_scalar_agreement
from benchmarks.child import Child
from nla_jax.errors import UserError, run_main

PARTS = ("rollout", "av_update", "ar_update")  # of a step
# These phases come first and in this order, because the weights must still be equal on both sides.
COMPARED = ("capture", "score", "av_update", "ar_update", "warm_av", "warm_ar")


class Log:
    """Write every measurement at once: a line on the terminal and a JSON line in the file."""

    def __init__(self, path: Path | None):
        self.file = open(path, "w", encoding="utf-8") if path else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file:
            self.file.close()

    def write(self, **record):
        if self.file:
            print(json.dumps(record), file=self.file, flush=True)
        words = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        print("  ".join(f"{k}={v}" for k, v in words.items()), file=sys.stderr, flush=True)


def measure(case, sides: list[str], args, log: Log, rates: dict, seconds: float, settings: list[str]) -> dict:
    """Measure one case: check, warm up, then alternate the sides in rounds until the time is over."""
    begin, times, cpu, checks, about = time.monotonic(), {}, {}, {}, {}
    memory, started = {}, {}
    options = {"platform": args.platform, "torch_compile": args.torch_compile,
               "torch_cache": args.torch_cache, "malloc": args.malloc,
               "torch_share": args.torch_share, "torch_dtype": args.torch_dtype}
    answers, scalars = {}, {}
    groups = [sides] if case.together else [[s] for s in sides]

    def run(child, phase, keep=True):
        got = child.ask("phase", phase=phase)
        for name, s in got["seconds"].items():
            more = {"cpu": got["cpu"]} if name == phase else {}
            log.write(case=case.name, side=child.side, phase=name, seconds=s, warm_up=not keep, **more)
            if keep:
                times.setdefault(name, {}).setdefault(child.side, []).append(s)
        if keep:
            cpu.setdefault(phase, {}).setdefault(child.side, []).append(got["cpu"])
        return got["info"]

    for group in groups:
        with contextlib.ExitStack() as stack:
            children = []
            for side in group:
                child = stack.enter_context(Child(side, case.name, settings, options, not case.together))
                about[side] = child.ready
                children.append(child)
            for child in children:
                if child.side not in rates:
                    rates[child.side] = child.ask("machine")
                    log.write(machine=child.side, **rates[child.side])
                if case.weights != "device":
                    answers[child.side] = child.ask("check")
            if len(answers) == 2:
                checks |= check_agreement(answers["ours"], answers["torch"])
            for phase in (p for p in COMPARED if p in case.phases):
                for child in children:
                    scalars.setdefault(phase, {})[child.side] = run(child, phase, keep=False)
                if case.weights != "device" and len(scalars[phase]) == 2:
                    checks |= check_scalar_agreement(phase, scalars[phase]["ours"], scalars[phase]["torch"])
            if checks:
                log.write(case=case.name, checks=checks)
            for child in children:
                child.ask("memory_reset")
                for phase in (p for p in case.phases if p not in COMPARED):
                    # The reference's step consists of its three parts, and the two updates are already warm.
                    if child.side == "torch" and phase == "step" and set(PARTS) <= set(case.phases):
                        continue
                    run(child, phase, keep=False)
            for child in children:
                started[child.side] = child.ask("memory")
                child.ask("memory_reset")
            spent = 0.0
            for i in range(args.repeats):
                left = seconds - (time.monotonic() - begin)
                if i >= args.least and left < spent:
                    break
                spent = time.monotonic()
                for phase in case.phases:
                    for child in children:
                        if child.side == "torch" and "step" in case.phases:
                            if phase in PARTS:
                                continue  # timed inside the whole step
                        run(child, phase)
                        if phase == "step" and not i:
                            memory[child.side] = child.ask("memory")
                spent = time.monotonic() - spent
            if not memory.keys() >= set(group):
                memory |= {child.side: child.ask("memory") for child in children}
    best = machine.best(*rates.values())
    work = floors.works_by_phase(case)
    phases = {p: floors.summary(work[p], times[p], best) for p in case.phases if p in times}
    for phase, sides_cpu in cpu.items():
        # CPU time of all threads is less disturbed by other programs than wall time.
        phases[phase] |= {f"{side}_cpu_s": statistics.median(s) for side, s in sides_cpu.items()}
    if "rollout" in phases:
        plain = floors.plain_decode_bytes(case, case.rows)
        phases["rollout"]["plain_decode_floor_s"] = plain / best["bandwidth"]
    out = {"phases": phases, "memory": memory, "memory_of_warm_up": started, "checks": checks, "about": about,
           "settings": settings, "rank": case.rank, "rows": case.rows, "max_new": case.max_new}
    if "ratio" in phases.get("step", {}):
        out["ratio_total"] = phases["step"]["ratio"]
    values = [memory[s]["device"] or memory[s]["rss"] for s in sides if s in memory]
    if len(values) == 2 and all(values):
        out["ratio_memory"] = values[0] / values[1]
    return out


def table(name: str, result: dict) -> str:
    """Format one case as a table of text."""
    head = ("phase", "ours s", "torch s", "ours/torch", "tok/s", "samples/s", "floor s", "ours/floor")
    rows = [head]
    for phase, p in result["phases"].items():
        spread = f" ±{(max(p['ours_all_s']) - min(p['ours_all_s'])) / 2:.2g}" if "ours_all_s" in p else ""
        get = lambda key, form, p=p: format(p[key], form) if key in p else "-"
        rows.append((phase, get("ours_s", ".4g") + spread, get("torch_s", ".4g"), get("ratio", ".3f"),
                     get("ours_tokens_per_s", ".0f"), get("ours_samples_per_s", ".3g"),
                     get("floor_s", ".4g"), get("ours_over_floor", ".2f")))
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    memory = ", ".join(
        f"{side} {(m['device'] or m['rss'] or 0) / 2**30:.2f} GiB" for side, m in result["memory"].items()
    )
    return "\n".join([f"--- {name}", *lines, f"peak memory of the step: {memory}"])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=sorted(cases.PRESETS), help="a set of cases")
    p.add_argument("--case", action="append", default=[], help="one case; may be repeated")
    p.add_argument("--phases", default="", help="comma-separated; default: all phases of the case")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a case's sizes")
    p.add_argument("--random-weights", action="store_true", help="use random weights, without the GGUF")
    p.add_argument("--repeats", type=int, default=3, help="rounds of each case")
    p.add_argument("--least", type=int, default=1, help="rounds to run even if the time is over")
    p.add_argument("--minutes", type=float, default=9.0,
                   help="time limit of the command; cases that do not fit are left out")
    p.add_argument("--no-torch", action="store_true", help="measure nla_jax only")
    p.add_argument("--no-ours", action="store_true", help="measure the reference only")
    p.add_argument("--platform", default="", help="cpu: use the CPU even if there is a GPU")
    p.add_argument("--torch-compile", choices=("auto", "on", "off"), default="auto",
                   help="auto: on if there is a GPU or g++")
    p.add_argument("--torch-cache", choices=("auto", "static", "dynamic"), default="auto")
    machine.add_torch_dtype(p)
    p.add_argument("--torch-share", action="store_true",
                   help="the reference also computes the prompt once for all rows of a pass")
    p.add_argument("--malloc", choices=("torch", "both", "ours", "plain"), default="torch",
                   help="the sides that get the allocator settings for PyTorch on a CPU")
    p.add_argument("--peer", choices=("tunix",), help="beside this program instead (docs/performance.md)")
    p.add_argument("--peer-python", type=Path, default=Path(".venv-tunix/bin/python"),
                   help="the Python of the peer's environment")
    p.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="float32",
                   help="of the peer's weights and products")
    p.add_argument("--json", type=Path, help="file of the figures; single times go to this name with .jsonl")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    names = args.case or (["cpu_full"] if args.peer else list(cases.PRESETS[args.preset or "cpu"]))
    settings = args.set + (["weights=random"] if args.random_weights else [])
    sides = [s for s, off in (("ours", args.no_ours), ("torch", args.no_torch)) if not off]
    chosen = cases.choose(names, settings, args.phases)
    if any(case.lengths for case in chosen) and (args.peer or not args.no_torch):
        raise UserError("--set lengths: the other side's answers have one length; add --no-torch")
    with Log(Path(f"{args.json}.jsonl") if args.json else None) as log:
        return _all(chosen, sides, args, log, settings)


def _all(chosen, sides, args, log: Log, settings) -> int:
    """Measure every case and save the figures after each. Returns 1 if a case failed, else 0."""
    end = time.monotonic() + 60 * args.minutes
    out, rates, status, spent = {"machine": machine.describe(), "cases": {}}, {}, 0, 0.0
    for i, case in enumerate(chosen):
        began = time.monotonic()
        left = max(end - began, 0.0)
        if left < spent / 2:
            out["left_out"] = [c.name for c in chosen[i:]]
            log.write(left_out=" ".join(out["left_out"]), why="the time is up", then=f"--case {case.name}")
            _save(out, args.json)
            break
        try:
            if args.peer:
                result = peer.measure(case, settings, args, log)
            else:
                result = measure(case, sides, args, log, rates, left / (len(chosen) - i), settings)
        except (SidesDisagree, RuntimeError) as err:
            log.write(case=case.name, failed=str(err))
            out["cases"][case.name] = {"failed": str(err)}
            status = 1
        else:
            out["cases"][case.name] = result
            print((peer.table if args.peer else table)(case.name, result), flush=True)
            if "phases" not in out:
                out |= {k: v for k, v in result.items() if k not in ("settings", "about")}
        spent = time.monotonic() - began
        out["machine"] |= {"rates": machine.best(*rates.values())} if rates else {}
        _save(out, args.json)
    return status


def _save(found: dict, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    run_main(main, "rl_step")
