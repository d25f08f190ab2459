"""Compare training from documents with training from a store: RL and AR's reading lessons on SmolLM2-135M.

    python -m benchmarks.online --json out.json

Both sides run the same steps on the same rows alternately in one process. `stored` gets h; `online` gets the
documents' tokens, which the target reads inside the step. Before the timing, the losses of both must agree.
Capturing a store is timed, too: one forward pass gives all positions of a window. Settings are those of
experiments/quickstart.py. In RL all answers have the maximal length, because AV is not trained.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import machine
from nla_jax import specs, steps, target
from nla_jax.data import online, request_batches, split_requests
from nla_jax.pipeline import activations, context
from nla_jax.pipeline.context import RunContext
from nla_jax.pipeline.experiment_files import load_config
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import feeds, jitted_steps
from nla_jax.util.keys import key_for
from nla_jax.util.tables import markdown_table

WORDS = {"rl": "RL", "lessons_ar": "AR's lessons"}


def time_call(call, *args):
    """Call and wait for the result; return (seconds, result)."""
    began = time.perf_counter()
    out = jax.block_until_ready(call(*args))
    return time.perf_counter() - began, out


def stored_batch(r: RunContext, batch: dict) -> dict:
    """Return the stored counterpart of a batch: h in the place of the texts."""
    read = jax.jit(lambda base, b: target.add_activations(base, r.spec, b))
    return jax.tree.map(np.asarray, read(r.base, batch))


class Case:
    """One kind of step, with a training state for each side."""

    def __init__(self, name: str, r: RunContext):
        self.name, self.r, c = name, r, r.config
        if name == "rl":
            tree = {role: context.initial_tree(r, role) for role in ("av", "ar")}
            self.ref = jitted_steps.reference(tree["av"], c.dtype)
            learn = lambda role: jitted_steps.learner(
                jax.tree.map(lambda a: a.copy(), tree[role]),
                jitted_steps.optimizer(c, "rl", f"lr_{role}"),
                r.mesh,
            )
            self.state = {side: steps.RLState(learn("av"), learn("ar")) for side in ("stored", "online")}
            self.step = jitted_steps.rl_step(c, r.spec, self.state["stored"])
            self.at = online.OnlineBatches(c.data, c.seed, r.tok, c.rl.batch).at
        else:
            tx = jitted_steps.optimizer(c, name)
            self.state = {
                s: jitted_steps.learner(context.initial_tree(r, "ar"), tx, r.mesh)
                for s in ("stored", "online")
            }
            self.step = jitted_steps.warm_step(c, name, r.spec, self.state["stored"])
            texts = feeds.OnlinePairs(online.Passes(c.data, c.seed, r.tok, "warm"),
                                     **feeds.pairs_arguments(c, name, r.tok, r.spec, r.templates[1]))
            self.at = functools.partial(
                feeds.ar_batch, texts, r.tok, r.spec, r.templates[1], c[name].max_tokens
            )

    def batches(self, i: int) -> dict[str, dict]:
        fresh = self.at(i)
        return {"online": fresh, "stored": stored_batch(self.r, fresh)}

    def run(self, side: str, batch: dict, i: int) -> tuple[float, dict]:
        batch = mesh_lib.shard_batch(batch, self.r.mesh)
        more = (self.ref, batch, key_for(0, "rl", i)) if self.name == "rl" else (batch,)
        seconds, (self.state[side], metrics) = time_call(self.step, self.state[side], self.r.base, *more)
        return seconds, metrics

    def trained(self, batch: dict, metrics: dict) -> tuple[int, int]:
        """Return the (rows, tokens) that a step trains on."""
        if self.name != "rl":
            return len(batch["ids_BT"]), int(batch["valid_BT"].sum())
        rows = self.r.config.rl.batch * self.r.config.rl.group
        return rows, round(float(metrics["length"]) * rows)


def measure(case: Case, repeats: int) -> dict:
    """Return the median seconds of both sides, and the median ratio of adjacent steps."""
    seconds = {"stored": [], "online": []}
    for i in range(repeats + 1):
        batches = case.batches(i)
        found = {}
        for side in sorted(seconds, reverse=bool(i % 2)):
            took, metrics = case.run(side, batches[side], i)
            found[side] = metrics
            if i:  # the first step compiles
                seconds[side].append(took)
        name = "reward" if case.name == "rl" else "loss"
        a, b = (float(found[s][name]) for s in ("stored", "online"))
        if not i and abs(a - b) > 0.02 * abs(a):
            raise SystemExit(f"{case.name}: {name} is {a:.5g} stored and {b:.5g} online; nothing is timed")
        if i:
            said = ", ".join(f"{side} {t[-1]:.2f} s" for side, t in seconds.items())
            print(f"{case.name} {i}/{repeats}: {said}", file=sys.stderr, flush=True)
    rows, tokens = case.trained(batches["online"], found["online"])
    ratios = [b / a for a, b in zip(seconds["stored"], seconds["online"], strict=True)]
    out = {"rows": rows, "tokens": tokens, "tokens read": int(batches["online"]["read_valid_BT"].sum()),
           "online over stored": statistics.median(ratios), "ratios": ratios}
    return out | {side: {"seconds": statistics.median(t), "all": t} for side, t in seconds.items()}


def time_capture(r: RunContext, repeats: int) -> dict:
    """Time the capture of one batch of windows, all positions of each: {"seconds", "rows"}."""
    c = r.config
    found = split_requests.fresh_requests(c.data, c.seed, r.tok, "rl", c.seed)[: c.data.batch]
    batch = next(request_batches.batches(found, c.data.batch))
    capture = activations.capture_of(r)
    times = [
        time_call(capture, batch.ids_BT, batch.valid_BT, batch.positions_BP)[0] for _ in range(repeats + 1)
    ]
    rows = sum(len(q.positions) for q in found)
    return {"seconds": statistics.median(times[1:]), "rows": rows}


def table(found: dict) -> list[str]:
    """Return the table as lines of Markdown."""
    row_s = found["capture"]["seconds"] / found["capture"]["rows"]
    head = ("step", "from", "rows/s", "tokens/s", "s a step", "s a step, its rows captured once for it")
    rows = []
    for name, f in found["steps"].items():
        activated = found["activations"][name]
        for side in ("stored", "online"):
            s = f[side]["seconds"]
            whole = s + (activated * row_s if side == "stored" else 0.0)
            rates = f"{f['rows'] / s:.1f}", f"{f['tokens'] / s:.0f}", f"{s:.2f}", f"{whole:.2f}"
            rows.append([WORDS[name], side, *rates])
    return markdown_table(head, rows)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default="experiments/quickstart.py")
    p.add_argument("--steps", default="rl,lessons_ar", help=f"of {', '.join(WORDS)}")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", type=Path)
    args, overrides = p.parse_known_args(argv)
    config = load_config(args.config, [*overrides, "--config.activations=online"])
    with tempfile.TemporaryDirectory() as workdir:
        r = context.open_run(config, Path(workdir))
        # The value of alpha does not affect the time.
        r.spec = specs.make_spec(
            r.lm, r.tok, layer=config.layer, dtype=config.dtype,
            **{**r.given, "alpha": r.given["alpha"] or 240.0}, remat=config.remat,
            vocab_chunk=config.vocab_chunk, attention=context.attention_of(r))
        found = {"machine": machine.describe(), "device": jax.devices()[0].device_kind, "steps": {}}
        found["activations"] = {"rl": config.rl.batch, "lessons_ar": config.lessons_ar.batch}
        found["capture"] = time_capture(r, args.repeats)
        for name in args.steps.split(","):
            found["steps"][name] = measure(Case(name, r), args.repeats)
    for name, f in found["steps"].items():
        between = f"{min(f['ratios']):.2f} to {max(f['ratios']):.2f}, {len(f['ratios'])} pairs"
        print(f"{WORDS[name]}: online takes {f['online over stored']:.2f} times as long ({between}); the "
              f"target reads {f['tokens read']} tokens per step")
    print("\n".join(table(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
