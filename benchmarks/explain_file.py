"""Measure `nla explain --file` against its floor, and kill it on the way.

    python -m benchmarks.explain_file --bundle runs/toy/run/bundle --rows 10000 --kills 5 --json explain.json

The texts are stories of `nla_jax.toy` cut at random words, or those of --file. The command is killed by
SIGKILL at random rows and started again, and must write every row once, in order. The first --check rows are
compared with those of an uninterrupted run.

The rates are timed in one process, in turns, when everything is compiled: from texts, which the target must
read first, and from activations; with the scores by AR and by the frozen target, and without. `batches` is
AV's sampling alone, one whole batch after another. The floor is `floors.writing` at the mean length of the
answers, with the best rates of products and of memory of this machine.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import floors, machine
from benchmarks.cases import Case
from nla_jax import api, toy
from nla_jax.pipeline import explain_batch, explain_inputs
from nla_jax.pipeline.explain_columns import Options
from nla_jax.util import path_kinds
from nla_jax.util.keys import new_key


def write_texts(path: Path, n: int) -> None:
    """Write n toy stories, each cut after a random word."""
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            words = toy.story(rng).split(" ")
            text = " ".join(words[: int(rng.integers(12, len(words)))])
            file.write(json.dumps({"id": f"story-{i}", "text": text}) + "\n")


def count_rows(out: Path) -> int:
    """Return the number of whole lines of an output."""
    with contextlib.suppress(FileNotFoundError):
        return out.read_bytes().count(b"\n")
    return 0


def kill_on_the_way(command: list[str], out: Path, rows: int, kills: int, seed: int) -> dict:
    """Run a command, kill it at random rows, start it again; return what was seen."""
    rng, began, at = random.Random(seed), time.perf_counter(), []
    for victim in sorted(rng.sample(range(1, rows), kills)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and count_rows(out) < victim:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.2)  # in the middle of a batch
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                at.append(count_rows(out))
            elif process.returncode:
                raise SystemExit(f"the command failed with status {process.returncode}")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"killed_after_rows": at, "seconds": round(time.perf_counter() - began, 1),
            "last_start": done.stdout.strip()}


def check(out: Path, rows: int) -> list[dict]:
    """Return the rows of an output. Raises SystemExit unless every row is there once and in order."""
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    numbers, items = [r["row"] for r in found], [r["item"] for r in found]
    if numbers != list(range(rows)) or items != sorted(items):
        raise SystemExit(f"{out}: {len(found)} rows; expected {rows}, each once and in order")
    return found


def rates(nla: api.NLA, texts: str, rows: int, repeats: int) -> tuple[dict[str, float], float]:
    """Return (rows/s of AV's sampling alone in batches, and of the whole work; mean tokens of an answer)."""
    o = Options(), Options(scores=())
    given = [fields for _, fields in itertools.islice(explain_inputs.read_texts(texts), rows)]
    source = explain_batch.open_source(nla, o[0], texts=given)
    h_ND = np.stack([row.h_D for row in source.rows()])
    spent: dict[str, list[float]] = {}
    lengths = np.zeros(len(h_ND))

    def timed(name, work):
        began = time.perf_counter()
        work()
        spent.setdefault(name, []).append(time.perf_counter() - began)

    vectors = explain_batch.open_source(nla, o[0], activations=h_ND)

    def whole(source, options):
        for _ in explain_batch.batches(nla, source, options):
            pass

    def sampling():
        lengths[:] = nla.runner.write(h_ND, new_key(0), temperature=0.0, max_new=nla.meta["max_new_tokens"],
                                      label="")[1]

    for _ in range(repeats + 1):  # the first one compiles
        timed("batches", sampling)
        for name, given in (("texts", source), ("activations", vectors)):
            timed(f"{name}, scored", lambda given=given: whole(given, o[0]))
            timed(f"{name}, not scored", lambda given=given: whole(given, o[1]))
    found = {name: round(len(h_ND) / statistics.median(times[1:]), 2) for name, times in spent.items()}
    return found, float(lengths.mean())


def floor_of(spec, slots: int, tokens: float, best: dict) -> float:
    """Return the largest number of explanations a second, `slots` at once with `tokens` tokens each."""
    case = Case("", spec.lm, before=len(spec.av.before), after=len(spec.av.after), max_new=round(tokens))
    return floors.explanations_per_s(case, slots, best)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", required=True)
    p.add_argument("--file", default="", help="texts; default: toy stories")
    p.add_argument("--rows", type=int, default=10_000, help="number of texts, one row each")
    p.add_argument("--kills", type=int, default=5)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--check", type=int, default=640, help="rows that are computed again without a kill")
    p.add_argument("--timed", type=int, default=1280, help="rows of a timed turn; 0: no timing")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--dtype", default="", help="of weights, as of `nla explain`")
    p.add_argument("--json", default="")
    args = p.parse_args()
    bundle = str(path_kinds.bundle_in(args.bundle))
    found: dict = {"machine": machine.describe(), "bundle": args.bundle, "batch": args.batch,
                   "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as scratch:
        texts, out = Path(args.file or Path(scratch) / "texts.jsonl"), Path(scratch) / "out.jsonl"
        if not args.file:
            write_texts(texts, args.rows)
        command = [sys.executable, "-m", "nla_jax.cli", "explain", "--bundle", bundle, "--file", str(texts),
                   "--out", str(out), "--batch", str(args.batch)]
        command += ["--dtype", args.dtype] if args.dtype else []
        if args.kills:
            found["kills"] = kill_on_the_way(command, out, args.rows, args.kills, 0)
            rows = check(out, args.rows)
            killed = found["kills"]["killed_after_rows"]
            print(f"killed after {killed} rows: {len(rows)} rows, each once, in order")
        nla = api.load(bundle, batch=args.batch, dtype=args.dtype)
        if args.kills and args.check:
            again = explain_batch.explain_rows(nla, texts=str(texts))
            same = [a == b for a, b in zip(rows[: args.check], again, strict=False)]
            found["equal_without_kills"] = f"{sum(same)}/{len(same)}"
            print(f"equal to a run without kills: {found['equal_without_kills']} rows")
        if args.timed:
            found["machine"]["rates"] = machine.measure_jax()
            found["rows_per_s"], found["tokens"] = rates(nla, str(texts), args.timed, args.repeats)
            found["floor"] = floor_of(nla.spec, args.batch, found["tokens"], found["machine"]["rates"])
            print(f"floor: {found['floor']:.1f} rows/s, {found['tokens']:.0f} tokens each")
            for name, rate in found["rows_per_s"].items():
                print(f"{name:24} {rate:8.1f} rows/s  {100 * rate / found['floor']:4.0f} % of the floor")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
