"""Compile the steps of a config for a TPU topology without a TPU, and report memory and cost.

    python -m benchmarks.aot --config experiments/qwen2_5_7b.py --topology v5e:4x4 \\
        [--json] [--config.KEY=VALUE …]

It needs libtpu (`pip install "libtpu==0.0.42.*"`, 700 MB on disk) and no TPU. An RL step of a large model
takes five minutes of one core. The step functions are those of `nla train`. With --estimate it needs a minute
and no libtpu, but temporary memory is less accurate. The exit status is 0 if every step fits in 90 % of a
chip's memory, 1 if one does not, and 2 for an invalid command.
"""

import argparse
import json
import math
import os
import re
import sys


def main(argv: list[str] | None = None) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # no step runs, and a TPU of this machine stays free
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="experiments/X.py[:ARG]; also --config.KEY=VALUE")
    parser.add_argument("--topology", required=True, help="for example v5e:4x4, v5p:2x2x2, v6e:2x4")
    parser.add_argument("--steps", default="", help="for example warm_av,rl; default: all stages with steps")
    parser.add_argument("--estimate", action="store_true",
                        help="compile for fake CPU devices without libtpu; estimate temporary memory by the "
                        "formulas of docs/scaling.md")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    args, rest = parser.parse_known_args(argv)
    if args.estimate:
        chips = math.prod(int(n) for n in re.findall(r"\d+", args.topology.partition(":")[2]))
        flags = f"--xla_force_host_platform_device_count={chips} --xla_backend_optimization_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

    from benchmarks.aot import report
    from nla_jax.errors import UserError
    from nla_jax.pipeline.experiment_files import load_config

    try:
        names = tuple(filter(None, args.steps.split(",")))
        found = report.of(load_config(args.config, rest), args.topology, names, args.estimate)
    except UserError as err:
        print(f"aot: {err}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if args.json else report.table(found))
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
