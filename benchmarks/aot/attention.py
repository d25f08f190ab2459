"""Compare plain attention with a fused kernel for the capture of long texts, by formulas.

    python -m benchmarks.aot.attention

Plain attention writes the scores of all pairs of tokens to memory. A kernel (splash, cuDNN) keeps them on the
chip, and skips tiles of later tokens.
"""

import sys

from benchmarks.aot import counts, models
from benchmarks.aot.decode_layouts import short, table
from nla_jax.lm.config import LMConfig
from nla_jax.pipeline.experiment_files import load_config
from nla_jax.sharding.chips import CHIPS, GIB, Chip

LENGTHS = (512, 1024, 2048, 4096, 8192, 32768)
RECIPES = ("qwen2_5_7b", "gemma3_27b", "llama3_3_70b")
# Bytes of memory traffic of a score, an assumption: float32 is written, and read for the maximum, the sum and
# the quotient; bfloat16 is written and read.
TRAFFIC = 4 * 4 + 2 * 2
HELD = 4 + 2  # bytes of a score at the peak: scores in float32, probabilities in bfloat16
TILE = 512  # of the splash kernel


def scores_bytes(lm: LMConfig, length: int) -> float:
    """Return the bytes that one text's scores take in one block of plain attention."""
    return HELD * lm.n_heads * length**2


def capture_seconds(lm: LMConfig, n_blocks: int, length: int, chip: Chip) -> dict[str, float]:
    """Return the seconds of one text on one chip at peak rates: "plain", "kernel", and "floor", the products
    alone."""
    matrices = 2 * sum(counts.block_sizes(lm)[:n_blocks]) * length / chip.flops
    softmax = n_blocks - sum(lm.linear[:n_blocks])
    near = sum(lm.local[:n_blocks]) if lm.local and length > lm.window else 0
    pair = 4 * lm.n_heads * lm.head_dim / chip.flops  # scores and their product with values

    def pairs(tile: int, window: int) -> float:  # that a kernel with this tile computes
        seen = min(length, window + tile) if window else length
        return seen * (length - seen) + (seen * seen + tile * seen) / 2

    def kernel(tile: int) -> float:
        return pair * ((softmax - near) * pairs(tile, 0) + near * pairs(tile, lm.window))

    plain = softmax * length**2
    return {
        "floor": matrices + kernel(1),
        "kernel": matrices + kernel(min(TILE, length)),
        "plain": matrices + plain * (pair + TRAFFIC * lm.n_heads / chip.hbm),
    }


def crossover(lm: LMConfig, n_blocks: int, chip: Chip, share: float) -> int:
    """Return the shortest text, in steps of 128 tokens, at which plain attention has less than this share of
    the kernel's throughput."""
    for length in range(128, 131072, 128):
        seconds = capture_seconds(lm, n_blocks, length, chip)
        if seconds["kernel"] < share * seconds["plain"]:
            return length
    return 131072


def capture_table() -> str:
    """Return memory and shares of the floor's throughput by length."""
    rows = [["target, chip", *(f"{n:,}" for n in LENGTHS), "below .8 of the kernel from"]]
    for name in RECIPES:
        config = load_config(f"experiments/{name}.py", [])
        lm, n_blocks = models.spec_of(config).lm, config.layer + 1
        for kind, chip in CHIPS.items():
            cells = []
            for length in LENGTHS:
                s = capture_seconds(lm, n_blocks, length, chip)
                size = scores_bytes(lm, length) / GIB
                plain = f"{s['floor'] / s['plain']:.2f}" if size < 0.5 * chip.memory / GIB else "does not fit"
                cells.append(f"{short(size)} GiB: {plain}, {s['floor'] / s['kernel']:.2f}")
            rows.append([f"{name}, {kind}", *cells, f"{crossover(lm, n_blocks, chip, 0.8):,}"])
    return table(rows)


def main() -> int:
    print(capture_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
