"""Measure how time and memory of nla_jax's RL step grow with each size, on a small model.

    python -m benchmarks.growth --json growth.json --plot docs/img/growth.png

Time is the median of several steps. Memory is what XLA reports for the compiled step: arguments, results and
temporaries. A line is fitted to each, and the share of variance that it explains is reported.
"""

import argparse
import json
import statistics
from pathlib import Path

import jax
import numpy as np

from benchmarks import machine, ours
from benchmarks.cases import choose
from nla_jax import verbalizer

SIZES = {  # setting -> (label, values)
    "group": ("explanations per activation (G)", (2, 4, 8, 16)),
    "batch": ("activations per step (B)", (2, 4, 8, 16)),
    "max_new": ("tokens of an explanation (T)", (16, 32, 64, 128)),
    "lm.n_blocks": ("blocks (L)", (3, 6, 12, 24)),
    "lm.vocab_size": ("vocabulary (V)", (8192, 16384, 32768, 65536)),
}
BASE = ("batch=4", "group=4", "max_new=32", "before=60", "after=9", "vocab_chunk=1024", "lm.vocab_size=4096",
        "lm.d_model=128", "lm.n_blocks=6", "lm.head_dim=32", "lm.d_ff=384")


def measure_size(settings, repeats: int) -> tuple[list[float], int]:
    """Return (seconds of each step, bytes of the compiled step) for BASE with these settings."""
    side = ours.Side(choose(["tiny"], [*BASE, *settings])[0])
    jitted, found = side.f["step"], {}

    def step(*args):
        if not found:
            found["step"] = jitted.lower(*args).compile()
        return found["step"](*args)

    side.f["step"] = step
    side.run("step")
    m = found["step"].memory_analysis()
    need = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return [side.run("step")[0] for _ in range(repeats)], need


def line(x, y) -> dict:
    """Fit y = constant + slope x by least squares; return it with the explained share of y's variance."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    slope, constant = np.polyfit(x, y, 1)
    rest = ((y - constant - slope * x) ** 2).sum() / max(((y - y.mean()) ** 2).sum(), 1e-300)
    return {"constant": float(constant), "slope": float(slope), "explained": float(1 - rest)}


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(2, len(found), figsize=(3 * len(found), 5.4), squeeze=False)
    for column, (key, f) in enumerate(found.items()):
        for row, (kind, scale, unit) in enumerate((("seconds", 1e3, "ms a step"), ("bytes", 2**-20, "MiB"))):
            ax, x = axes[row][column], np.array(f["x"])
            fit = f["fit"][kind]
            ax.plot(x, np.array(f[kind]) * scale, "o", color="#1f5fa8")
            ax.plot(x, (fit["constant"] + fit["slope"] * x) * scale, "-", color="#b0b0b0", zorder=0)
            ax.set_ylim(bottom=0)
            ax.set_title(f"line explains {fit['explained']:.1%}", fontsize=8)
            if not column:
                ax.set_ylabel(unit)
            if row:
                ax.set_xlabel(SIZES[key][0])
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--only", default="", help=f"of {', '.join(SIZES)}")
    args = p.parse_args(argv)
    verbalizer.parse_ids = ours.whole_answers
    found = {}
    for key, (_, values) in SIZES.items():
        if args.only and key not in args.only.split(","):
            continue
        seconds, need = [], []
        for value in values:
            times, memory = measure_size([f"{key}={value}"], args.repeats)
            seconds.append(statistics.median(times))
            need.append(memory)
            print(f"{key}={value}: {seconds[-1] * 1e3:.1f} ms, {memory / 2**20:.1f} MiB", flush=True)
            jax.clear_caches()
        fit = {"seconds": line(values, seconds), "bytes": line(values, need)}
        found[key] = {"x": list(values), "seconds": seconds, "bytes": need, "fit": fit}
        print(f"{key}: a line explains {fit['seconds']['explained']:.1%} of the time and "
              f"{fit['bytes']['explained']:.1%} of the memory")
        if args.json:
            out = {"machine": machine.describe(), "base": BASE, "growth": found}
            args.json.write_text(json.dumps(out, indent=1) + "\n", "utf-8")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
