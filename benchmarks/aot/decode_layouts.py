"""Compare layouts of decoding in a rollout: bytes, memory and seconds at peak rates, by formulas.

    python -m benchmarks.aot.decode_layouts                        # the tables of docs/scaling.md
    python -m benchmarks.aot.decode_layouts --compile RECIPE SLICE TENSOR …   # beside the compiler's output

`tensor` chips share each copy of the weights: 1 is data parallel, with whole weights on each chip. The
formulas are those of `nla_jax.lm.decode_cost`; the program chooses `tensor` by them. Compiling needs libtpu.
"""

import argparse
import os
import sys

from benchmarks.aot import compiler, memory, models
from nla_jax.lm import decode_cost
from nla_jax.pipeline import run_mesh
from nla_jax.pipeline.experiment_files import load_config
from nla_jax.sharding.chips import CHIPS, GIB

SLICES = {  # the smallest on which RL fits, by `benchmarks.aot.slices`
    "qwen2_5_7b": ("v5e:4x4", "v6e:2x4", "v5p:2x2x1"),
    "gemma3_27b": ("v5e:8x8", "v6e:4x8", "v5p:2x2x4"),
    "qwen3_6_27b": ("v5e:8x8", "v6e:4x8", "v5p:2x2x2"),
    "llama3_3_70b": ("v5e:16x16", "v6e:8x16", "v5p:2x4x4"),
}
FORMER = {"gemma3_27b": 16, "llama3_3_70b": 32}  # sizes of `tensor` before it was chosen; others had 8
TENSOR = (1, 2, 4, 8, 16, 32, 64)
HOPS = (0.0, 0.5e-6, 1e-6, 3e-6)


class Case:
    """A config on n chips of a kind."""

    def __init__(self, name: str, kind: str, n: int, config=None):
        self.name, self.config, self.n = name, config or load_config(f"experiments/{name}.py", []), n
        self.spec, self.chip = models.spec_of(self.config), CHIPS[kind]
        self.lm, self.shape = self.spec.lm, memory.shape_of(self.config, self.spec)
        copies = max(self.config.mesh.data, 1)  # of what rests
        self.resting = run_mesh.resting_bytes(self.config, self.lm) * copies / n

    @classmethod
    def of(cls, name: str, topology: str) -> "Case":
        found = cls(name, topology.partition(":")[0], compiler.count(topology))
        found.topology = topology
        return found

    def gib(self, tensor: int, item: int = 2) -> float:
        """Return the GiB of a chip in the rollout."""
        return (self.resting + decode_cost.memory_bytes(self.lm, self.shape, self.n, tensor, item)) / GIB

    def fits(self, tensor: int, item: int = 2) -> bool:
        return self.gib(tensor, item) * GIB <= run_mesh.SHARE * self.chip.memory

    def token(self, tensor: int, item: int = 2) -> decode_cost.Token:
        return decode_cost.per_token(self.lm, self.shape, self.n, tensor, item)

    def seconds(self, tensor: int, item: int = 2, hop: float = decode_cost.HOP) -> float:
        return decode_cost.rollout_seconds(self.lm, self.shape, self.chip, self.n, tensor, item, hop)

    def chosen(self, hop: float = decode_cost.HOP) -> int:
        """Return the `tensor` that a run would choose."""
        return run_mesh.choose_tensor(self.config, self.lm, self.n, self.chip.memory, self.chip, hop)

    @property
    def former(self) -> int:
        return min(FORMER.get(self.name, 8), self.n)


def cases() -> list[Case]:
    return [Case.of(recipe, topology) for recipe, slices in SLICES.items() for topology in slices]


def table(rows: list[list[str]]) -> str:
    """Format rows, the first of them the head, as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def short(x: float) -> str:
    """Format a number with two digits, or as a whole one."""
    return f"{x:.2g}" if x < 99.5 else f"{x:,.0f}"


def seconds_table(every: list[Case]) -> str:
    """Return the seconds of a rollout by size of `tensor`, bfloat16 and int8; empty where it does not fit."""
    rows = [["recipe", "slice", *(f"T = {t}" for t in TENSOR)]]
    for c in every:
        best, cells = c.chosen(), []
        for t in TENSOR:
            found = [f"{c.seconds(t, item):.2f}" if t <= c.n and c.fits(t, item) else "–" for item in (2, 1)]
            found[0] = f"**{found[0]}**" if t == best else found[0]
            cells.append(" / ".join(found) if set(found) != {"–"} else "")
        rows.append([c.name, c.topology, *cells])
    return table(rows)


def parts_table(every: list[Case]) -> str:
    """Return the costs of layouts: the former, the chosen one, whole weights, and whole int8 weights."""
    rows = [["recipe, slice", "layout", "GB read a token: weights, beside", "MB sent a token",
             "GB gathered once", "GiB a chip", "ms a token: products, memory, links, hops", "s a rollout"]]
    for c in every:
        best = c.chosen()
        layouts = {f"T = {c.former}, before": (c.former, 2)} if c.former != best else {}
        layouts |= {f"T = {best}, chosen": (best, 2)}
        layouts |= {"T = 1": (1, 2)} if best > 1 else {}
        layouts |= {"T = 1, int8": (1, 1)}
        for name, (t, item) in layouts.items():
            token, hop = c.token(t, item), decode_cost.HOP
            times = (token.flops / c.chip.flops, (token.weights + token.beside) / c.chip.hbm,
                     token.links / c.chip.ici, token.collectives * token.hops * hop)
            gathered = decode_cost.weight_bytes(c.lm, t, item) * (1 - t / c.n)
            over = "" if c.fits(t, item) else ", over"
            rows.append([
                f"{c.name}, {c.topology}", name, f"{token.weights / 1e9:.2f}, {token.beside / 1e9:.2f}",
                f"{token.links / 1e6:.0f}", f"{gathered / 1e9:.1f}", f"{c.gib(t, item):.1f}{over}",
                ", ".join(f"{1e3 * s:.1f}" for s in times), f"{c.seconds(t, item):.2f}"])
    return table(rows)


def hops_table(every: list[Case]) -> str:
    """Return the chosen size and its seconds for several latencies of a hop."""
    rows = [["recipe", "slice", *(f"{1e6 * h:g} µs" for h in HOPS)]]
    for c in every:
        found = [(c.chosen(h), h) for h in HOPS]
        rows.append([c.name, c.topology, *(f"T = {t}: {c.seconds(t, hop=h):.2f} s" for t, h in found)])
    return table(rows)


def compile_one(recipe: str, topology: str, tensor: int) -> str:
    """Return a row: counts of the compiled loop over those of the formulas, for one token on one chip."""
    from benchmarks.aot import decode_loop

    c = Case.of(recipe, topology)
    c.config.mesh.tensor = tensor
    found, token = decode_loop.count(c.config, topology)[0], c.token(tensor)
    flops, hbm, links = ((found.flops, token.flops), (found.hbm, token.weights + token.beside),
                         (found.links, token.links))
    kinds = ", ".join(f"{n} {kind}" for kind, n in found.collectives.items())
    return " | ".join([
        f"| {recipe}, {topology}", str(tensor), *(f"{a:.3g}, {b:.3g}" for a, b in (flops, hbm, links)),
        f"{kinds}; {token.collectives}", f"{found.before / 1e9:.1f} |"])


def main(argv: list[str] | None = None) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot.decode_layouts",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--compile", nargs="+", metavar="X", help="RECIPE SLICE TENSOR [TENSOR …]")
    args = parser.parse_args(argv)
    if args.compile:
        recipe, topology, *sizes = args.compile
        for size in sizes:
            print(compile_one(recipe, topology, int(size)), flush=True)
        return 0
    every = cases()
    print(seconds_table(every), parts_table(every), hops_table(every), sep="\n\n")
    peer = Case.of("qwen2_5_7b", "v5p:2x2x4")
    one, all_ = peer.seconds(1), peer.seconds(16)
    print(f"\n7B on 16 chips of v5p: T = 16 takes {all_:.2f} s, T = 1 {one:.2f}: {all_ / one:.1f} times.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
