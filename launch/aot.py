#!/usr/bin/env python3
"""Compile the steps of a config for a TPU that is not there: does it fit, what does it cost.

    python launch/aot.py --config experiments/qwen2_5_7b.py --topology v5e:4x4 [--json] [--config.KEY=VALUE …]

Needs libtpu (`pip install "libtpu==0.0.42.*"`, 700 MB on disk) and no TPU. The step functions are those
that `nla train` runs. Status 0 when every step fits in 90 % of a chip's memory, 1 when one does not, 2 for a
mistake.
"""

import argparse
import json
import os
import sys


def main(argv: list[str] | None = None) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; a TPU that is there is left alone
    parser = argparse.ArgumentParser(prog="aot.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="experiments/X.py[:ARG]; also --config.KEY=VALUE")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:2x2x2, v6e:2x4")
    parser.add_argument("--steps", default="", help="such as warm_av,rl; default: every stage that has steps")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args, rest = parser.parse_known_args(argv)

    from nla_jax.aot import report
    from nla_jax.cli import load_config
    from nla_jax.errors import UserError

    try:
        names = tuple(filter(None, args.steps.split(",")))
        found = report.of(load_config(args.config, rest), args.topology, names)
    except UserError as err:
        print(f"aot: {err}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if args.json else report.table(found))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
