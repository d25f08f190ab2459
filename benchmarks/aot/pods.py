"""Estimate RL steps from 256 to 4,096 chips, and what a point of FVE costs, by formulas.

    python -m benchmarks.aot.pods [--price KIND=USD …]

Nothing is compiled or timed. A step is products, blocks' weights and gradients over links, and the rollout
(`benchmarks.aot.decode_layouts`). Between slices of v5e and v6e, gradients go over the data-center network.
"""

import argparse
import dataclasses
import math
import sys

from benchmarks.aot import counts
from benchmarks.aot.decode_layouts import Case, short, table
from nla_jax.pipeline.experiment_files import load_config

SLICE = {"v5e": 256, "v6e": 256, "v5p": 8960}  # chips that links connect
NETWORK = {"v5e": 25e9 / 8, "v6e": 25e9 / 8, "v5p": 25e9 / 4}  # bytes per second a chip: 25 GB/s a host
CHIPS = (256, 512, 1024, 2048, 4096)
ROWS = {"llama3_3_70b": {"v5e": 2, "v5p": 8}, "gemma3_27b": {"v5e": 2, "v5p": 8}}  # a chip, per microbatch
# USD of an hour of a chip: Google Cloud's public list, on demand, in the USA, of 2025. H200: that of an H100.
PRICES = {"v5e": 1.2, "v6e": 2.7, "v5p": 4.2, "H200": 10.8}


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of an RL step, and how it is divided."""

    case: Case
    rows: int
    micro: int
    tensor: int
    products: float  # without those of decoding
    links: float  # blocks and gradients inside a slice
    network: float  # gradients between slices
    rollout: float

    @property
    def best(self) -> float:
        """Return the seconds if products, links and network overlap. The rollout is between them."""
        return max(self.products, self.links, self.network) + self.rollout

    @property
    def worst(self) -> float:
        return self.products + self.links + self.network + self.rollout


def step_of(case: Case, kind: str, micro: int) -> Step:
    """Return the Step of a case with this number of microbatches."""
    config, lm, chip, n = case.config, case.lm, case.chip, case.n
    work = counts.rl(config, case.spec)
    products = sum(work.values()) - work["decode"]
    sizes = counts.block_sizes(lm)
    whole, part = sum(sizes), sum(sizes[: case.spec.layer + 1])
    # Bytes an entry: gathered in bfloat16 forward and backward; summed in float32 if it is trained.
    update = {role: 4 + 4 * (not config[role].rank) for role in ("av", "ar")}
    sent = micro * (whole * (update["av"] + 2 * bool(config.rl.kl)) + part * update["ar"])
    slices = max(config.mesh.data, 1)
    trained = (not config.av.rank) * whole + (not config.ar.rank) * part
    between = micro * 2 * 4 * trained * slices / n * (1 - 1 / slices)  # an all-reduce of each chip's part
    tensor = case.chosen()
    return Step(case, case.shape.rows, micro, tensor, products / n / chip.flops,
                sent * (1 - slices / n) / chip.ici, between / NETWORK[kind], case.seconds(tensor))


def pod_step(name: str, kind: str, n: int, rows: int) -> Step | None:
    """Return the Step of a recipe with this many rows on n chips; None if its batches do not divide."""
    config = load_config(f"experiments/{name}.py", [])
    slices = math.ceil(n / SLICE[kind])
    config.mesh.data = slices
    config.rl.batch = rows // config.rl.group
    config.data.batch = config.warm_av.batch = config.warm_ar.batch = config.rl.batch
    if rows % n:
        return None
    return step_of(Case(name, kind, n, config), kind, math.ceil(rows / n / ROWS[name][kind]))


def pods_table() -> str:
    """Return the table of steps on pods, with rows growing and with rows fixed."""
    rows = [["recipe, chip", "chips", "rows", "microbatches", "T", "products, s", "links, s",
             "between slices, s", "rollout, s", "step, s: overlapped to in turn", "answers a second",
             "a chip, of 256"]]
    for name, kinds in ROWS.items():
        for kind in kinds:
            first = None
            for n, size in [*((n, 4 * n) for n in CHIPS), *((n, 1024) for n in CHIPS[1:3])]:
                s = pod_step(name, kind, n, size)
                first = first or s
                share = s.rows / s.best / n / (first.rows / first.best / first.case.n)
                rows.append([
                    f"{name}, {kind}", f"{n:,}", f"{s.rows:,}", str(s.micro), str(s.tensor),
                    f"{s.products:.1f}", f"{s.links:.1f}", f"{s.network:.1f}", f"{s.rollout:.1f}",
                    f"{s.best:.1f}–{s.worst:.1f}", f"{s.rows / s.best:,.0f}", f"{share:.2f}"])
    return table(rows)


# (recipe, slice, microbatches, steps, points of FVE, where the steps and points are from)
RUNS = (
    ("qwen2_5_7b", "v5e:4x4", 8, 4050, 11.2, "its official run, .64 to .752"),
    ("qwen2_5_7b", "v5p:2x2x4", 1, 4050, 11.2, "its official run, .64 to .752"),
    ("qwen3_6_27b", "v5e:8x8", 8, 150, 20.5, "EasyNLA's run, .53 to .735"),
    ("qwen3_6_27b", "v6e:4x8", 8, 150, 20.5, "EasyNLA's run, .53 to .735"),
    ("gemma3_27b", "v5e:8x8", 8, 4050, 11.2, "no curve is public: the 7B's"),
    ("llama3_3_70b", "v5e:16x16", 2, 4050, 11.2, "no curve is public: the 7B's"),
    ("llama3_3_70b", "v5p:2x4x4", 4, 4050, 11.2, "no curve is public: the 7B's"),
)


def cost_table(prices: dict[str, float]) -> str:
    """Return what a point of FVE (.01) costs: chip-hours and USD."""
    rows = [["NLA", "on", "a step, s", "steps and FVE", "chip-hours a point", "USD a point"]]
    for name, topology, micro, steps, points, source in RUNS:
        kind = topology.partition(":")[0]
        s = step_of(Case.of(name, topology), kind, micro)
        hours = [t * steps * s.case.n / 3600 / points for t in (s.best, s.worst)]
        rows.append([name, topology, f"{s.best:.1f}–{s.worst:.1f}", f"{steps:,} steps: {source}",
                     "–".join(map(short, hours)),
                     "–".join(short(h * prices[kind]) for h in hours)])
    # docs/results/smollm2_135m.md: the stage `rl`, 168 s with compiling, 94 steps, .449 to .602 held out.
    hours = 168 / 3600 / 15.3
    rows.append(["SmolLM2-135M, shipped", "one H200", "1.8, measured", "94 steps: measured, .449 to .602",
                 short(hours), short(hours * prices["H200"])])
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.pods", description=about)
    parser.add_argument("--price", action="append", default=[], metavar="KIND=USD",
                        help=f"an hour of a chip; {', '.join(f'{k}={v}' for k, v in PRICES.items())}")
    args = parser.parse_args(argv)
    given = (p.partition("=") for p in args.price)
    print(pods_table(), cost_table(PRICES | {kind: float(usd) for kind, _, usd in given}), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
