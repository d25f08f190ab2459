"""Measure the RL step and its phases: nla_jax, a PyTorch reference and the floor, alternately on one machine.

    python -m benchmarks.rl_step --preset cpu --json out.json
    python -m benchmarks.rl_step --case qwen2_5_7b_lora --repeats 2 --no-torch --json out.json

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

import numpy as np

from benchmarks import cases, floors, machine
from benchmarks.child import Child
from nla_jax.errors import UserError

# Largest allowed differences between the sides: mean |log-probability difference| and 1 - cosine of AR's
# predictions by precision; relative differences of the updates' scalars (bfloat16).
LOGP = {"fp32": 1e-3, "bf16": 0.15}
COSINE = {"fp32": 1e-5, "bf16": 0.01}
SCALARS = {"loss": 0.02, "kl": 0.1, "mse": 0.02, "norm": 0.01, "grad_norm": 0.05, "av_grad_norm": 0.05}
PARTS = ("rollout", "av_update", "ar_update")  # of a step
# These phases come first and in this order, because the weights must still be equal on both sides.
COMPARED = ("capture", "score", "av_update", "ar_update", "warm_av", "warm_ar")


class SidesDisagree(Exception):
    """The two sides do not agree."""


def check_agreement(ours: dict, theirs: dict) -> dict:
    """Return the differences between two `check` answers. Raises Differ if one is too large."""
    out = {}
    for kind in (k for k in LOGP if f"logp_{k}" in ours):
        a, b = (np.array(s[f"logp_{kind}"], np.float64) for s in (ours, theirs))
        out[f"logp_{kind}"] = float(np.abs(a - b).mean())
        x, y = (np.array(s[f"h_{kind}"], np.float64) for s in (ours, theirs))
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        out[f"ar_{kind}"] = float((1 - cosine).max())
        if not (out[f"logp_{kind}"] <= LOGP[kind] and out[f"ar_{kind}"] <= COSINE[kind]):
            raise SidesDisagree(f"the sides differ, nothing is timed: {out}")
    return out


def check_scalar_agreement(phase: str, ours: dict, theirs: dict) -> dict:
    """Return the relative differences of an update's metrics. Raises Differ if one is too large."""
    out = {}
    for name, limit in SCALARS.items():
        if name in ours and name in theirs:
            out[f"{phase}.{name}"] = abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-9)
            if not out[f"{phase}.{name}"] <= limit:
                raise SidesDisagree(
                    f"{phase}: {name} is {ours[name]:.6g} in nla_jax, {theirs[name]:.6g} in torch"
                )
    return out


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


def summary(case, work: floors.Work, times: dict, rates: dict) -> dict:
    """Return the figures of one phase from the seconds of each side."""
    out = {}
    for side, seconds in times.items():
        s = statistics.median(seconds)
        out |= {f"{side}_s": s, f"{side}_all_s": seconds, f"{side}_tokens_per_s": work.tokens / s,
                f"{side}_samples_per_s": work.samples / s}
    if {"ours", "torch"} <= times.keys():
        out["ratio"] = out["ours_s"] / out["torch_s"]
    if rates:
        out |= {"floor_s": work.seconds(rates["gemm_bf16"], rates["bandwidth"]),
                "flops": work.flops, "bytes": work.bytes}
        for side in times:
            out[f"{side}_over_floor"] = out[f"{side}_s"] / out["floor_s"]
            out[f"{side}_of_peak"] = work.flops / out[f"{side}_s"] / rates["gemm_bf16"]
    return out


def measure(case, sides: list[str], args, log: Log, rates: dict, seconds: float, settings: list[str]) -> dict:
    """Measure one case: check, warm up, then alternate the sides in rounds until the time is over."""
    begin, times, cpu, checks, about = time.monotonic(), {}, {}, {}, {}
    memory, started = {}, {}
    options = {"platform": args.platform, "torch_compile": args.torch_compile,
               "torch_cache": args.torch_cache, "malloc": args.malloc,
               "torch_share": args.torch_share}
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
    phases = {p: summary(case, work[p], times[p], best) for p in case.phases if p in times}
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
    p.add_argument("--torch-share", action="store_true",
                   help="the reference also computes the prompt once for all rows of a pass")
    p.add_argument("--malloc", choices=("torch", "both", "ours", "plain"), default="torch",
                   help="the sides that get the allocator settings for PyTorch on a CPU")
    p.add_argument("--json", type=Path, help="file of the figures; single times go to this name with .jsonl")
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    names = args.case or list(cases.PRESETS[args.preset or "cpu"])
    settings = args.set + (["weights=random"] if args.random_weights else [])
    sides = [s for s, off in (("ours", args.no_ours), ("torch", args.no_torch)) if not off]
    chosen = cases.choose(names, settings, args.phases)
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
            result = measure(case, sides, args, log, rates, left / (len(chosen) - i), settings)
        except (SidesDisagree, RuntimeError) as err:
            log.write(case=case.name, failed=str(err))
            out["cases"][case.name] = {"failed": str(err)}
            status = 1
        else:
            out["cases"][case.name] = result
            print(table(case.name, result), flush=True)
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
    try:
        sys.exit(main())
    except UserError as err:
        sys.exit(f"benchmarks: {err}")
