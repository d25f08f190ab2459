"""Measure on one GPU, in nine minutes, what docs/performance.md has not: the most important part first.

    python -m benchmarks.gpu_session --out gpu --from runs/quickstart
    python -m benchmarks.gpu_session --list

Every part is a command of its own with a time limit, after which it is stopped. Its JSON and its output are
in OUT as soon as they are known, and OUT/session.json says what was reached. A part that would not fit into
the time that is left gets what is left. `--parts` chooses some.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import machine
from nla_jax.bundle import SHIPPED
from nla_jax.errors import UserError, run_main

LEAST = 20.0  # seconds; a part is not begun with less


@dataclasses.dataclass(frozen=True)
class Part:
    """A command with its time limit in seconds. "{out}" in `argv` is the file of its JSON."""

    name: str
    seconds: float
    argv: tuple[str, ...]
    fills: str  # the subject in docs/results/performance, or what it tells


def _step(case: str, minutes: float, *more: str, phases: str = "step,rollout,av_update,ar_update") -> tuple:
    return ("-m", "benchmarks.rl_step", "--case", case, "--phases", phases, "--repeats", "2",
            "--minutes", str(minutes), "--json", "{out}", *more)


def parts(source: str, bundle: str) -> list[Part]:
    """Return the parts in their order. source: a run with a warm start, or "". bundle: of explanations."""
    updates = "av_update,ar_update"
    explain = ("-m", "benchmarks.explain_file", "--bundle", bundle, "--kills", "0", "--rows", "1024",
               "--timed", "1024", "--repeats", "2", "--batch", "256", "--json", "{out}")
    found = [
        Part("full_135m", 110, _step("smollm2_135m_full", 0.7, "--torch-compile", "off"),
             "gpu_smollm2_135m_full"),
        Part("qwen2_5_7b", 70, _step("qwen2_5_7b_lora", 0.3, "--no-torch"), "h100_qwen2_5_7b"),
        Part("qwen2_5_7b_cudnn", 60, _step("qwen2_5_7b_lora", 0.2, "--no-torch", "--set", "attention=cudnn",
                                           phases=updates), "attention=cudnn against plain"),
        Part("qwen2_5_7b_torch", 80, _step("qwen2_5_7b_lora", 0.5, "--no-ours", "--torch-compile", "off"),
             "the reference on 7B's shape"),
        Part("time_to_fve", 90, ("-m", "benchmarks.time_to_fve", "--from", source, "--minutes", "1.2",
                                 "--torch-compile", "off", "--json", "{out}"), "gpu_time_to_fve"),
        Part("compiled_135m", 80, _step("smollm2_135m_full", 0.4, "--no-ours", "--torch-compile", "on"),
             "the reference with torch.compile"),
        Part("explain_bfloat16", 25, (*explain, "--dtype", "bfloat16"), "explanations a second"),
        Part("explain_int8", 25, (*explain, "--dtype", "int8"), "the same with int8 weights"),
    ]
    return [p for p in found if source or p.name != "time_to_fve"]


def run_part(part: Part, out: Path, limit: float) -> dict:
    """Run a part for at most `limit` seconds; return what became of it."""
    found = out / f"{part.name}.json"
    argv = [sys.executable, *(str(found) if a == "{out}" else a for a in part.argv)]
    began = time.monotonic()
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.wait()
    times = out / f"{part.name}.json.jsonl"  # single times, which a stopped part leaves too
    return {"command": " ".join(["python", *argv[1:]]), "fills": part.fills, "status": status,
            "stopped": status is None, "seconds": round(time.monotonic() - began, 1),
            "json": found.name if found.exists() else None, "times": times.name if times.exists() else None}


def run_all(chosen: list[Part], out: Path, seconds: float) -> dict:
    """Run the parts within `seconds`; write OUT/session.json after each. Returns its contents."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    session = {"machine": machine.describe() | {"gpu": _gpu()}, "parts": {}, "left_out": []}
    for part in chosen:
        left = end - time.monotonic()
        if left < min(LEAST, part.seconds):
            session["left_out"].append(part.name)
        else:
            done = session["parts"][part.name] = run_part(part, out, min(part.seconds, left))
            words = "stopped" if done["stopped"] else f"status {done['status']}"
            print(f"{part.name}: {words} after {done['seconds']} s, {done['json'] or 'no JSON'}", flush=True)
        (out / "session.json").write_text(json.dumps(session, indent=1) + "\n", "utf-8")
    return session


def _gpu() -> str:
    with contextlib.suppress(FileNotFoundError):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return ""


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("gpu"))
    p.add_argument("--from", dest="source", default="", help="a run with a warm start, for the time to FVE")
    p.add_argument("--bundle", default="", help="for explanations; default: the shipped one")
    p.add_argument("--seconds", type=float, default=540, help="time limit of the session")
    p.add_argument("--parts", default="", help="comma-separated; default: all")
    p.add_argument("--list", action="store_true", help="print the parts and their limits")
    args = p.parse_args(argv)
    chosen = parts(args.source, args.bundle or str(SHIPPED))
    if args.parts:
        by_name = {part.name: part for part in chosen}
        wanted = args.parts.split(",")
        if unknown := [n for n in wanted if n not in by_name]:
            raise UserError(f"--parts {unknown[0]}: unknown, or it needs --from; known: {', '.join(by_name)}")
        chosen = [by_name[n] for n in wanted]
    if args.list:
        for part in chosen:
            print(f"{part.name:18} {part.seconds:4.0f} s  {part.fills}")
        return 0
    session = run_all(chosen, args.out, args.seconds)
    return int(not any(done["json"] for done in session["parts"].values()))


if __name__ == "__main__":
    run_main(main, "gpu_session")
