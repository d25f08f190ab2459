"""How far the metrics of two runs of one config are apart, on other meshes or in more processes.

    python -m tests.helpers.parity RUN OTHER [--tolerance 1e-3]

Prints the largest relative difference of every metric, and exits with 1 when one is over the tolerance
or a sampled answer differs.
"""

import argparse
import sys
from pathlib import Path

from nla_jax.util import metrics_log

# Differences are relative to a value, or to this where it is smaller: what is a difference itself, such
# as the KL of two policies that are hardly apart, is rounding next to it.
FLOOR = {"kl": 1e-3, "ratio_off_max": 1.0, "ratio_off_mean": 1.0}


def differences(run: Path, other: Path, stage: str) -> dict[str, float]:
    """The largest difference of each metric of a stage; infinite where a logged answer or a step differs."""
    path = Path("metrics") / f"{stage}.jsonl"
    a, b = metrics_log.read(run / path), metrics_log.read(other / path)
    out = {"step": 0.0 if [r["step"] for r in a] == [r["step"] for r in b] else float("inf")}
    for x, y in zip(a, b, strict=False):
        for name in x.keys() | y.keys():
            u, v = x.get(name), y.get(name)
            if isinstance(u, dict) and isinstance(v, dict):
                apart = 0.0 if u["text"] == v["text"] else float("inf")
            else:
                missing = u is None or v is None
                apart = float("inf") if missing else abs(u - v) / max(abs(u), FLOOR.get(name, 1e-6))
            out[name] = max(out.get(name, 0.0), apart)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    stages = sorted(p.stem for p in (args.run / "metrics").glob("*.jsonl"))
    over = not stages
    for stage in stages:
        for name, apart in sorted(differences(args.run, args.other, stage).items()):
            print(f"{stage:>10}  {name:<18}{apart:9.1e}{'  OVER' if apart > args.tolerance else ''}")
            over |= apart > args.tolerance
    print(f"tolerance {args.tolerance:g}: {'exceeded' if over else 'kept'}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
