"""Count the products of a config's steps as they are traced, without compiling them.

    python -m benchmarks.aot.traced --config experiments/qwen3_6_27b.py --topology v5e:8x8 [--steps rl]
        [--config.KEY=VALUE …]

It needs no libtpu, half a minute of one core and little memory. The count has what JAX hands to XLA: XLA may
drop products whose results are not used, and its partitioner may repeat some. Inside `shard_map` it has the
parts of all devices. It says nothing of memory and collectives, for which the step must be compiled
(`python -m benchmarks.aot`).
"""

import argparse
import collections
import math
import os
import re
import sys

from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from benchmarks.aot import compiler, counts, models, programs

_PHASE = re.compile(r"\b(prefill|ar|reference|av)\b")


def products(jaxpr, n_devices: int, open_trips: int) -> collections.Counter:
    """Return {phase: operations of products} of a traced step on all devices.

    open_trips: how often the loop of unknown length, that of decoding, runs.
    """
    out = collections.Counter()
    jaxpr = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]

    def walk(jaxpr, times: float, scope: str, decoding: bool):
        for eqn in jaxpr.eqns:
            here, name = f"{scope}/{eqn.source_info.name_stack}", eqn.primitive.name
            if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
                found = _PHASE.findall(here)
                phase = "decode" if decoding else found[-1] if found else "update"
                out[phase] += times * _operations(eqn, name)
                continue
            is_open = name == "while"
            inner = times * {"scan": eqn.params.get("length"), "while": open_trips,
                             "shard_map": n_devices}.get(name, 1)
            for part in jaxprs_in_params(eqn.params):
                walk(part, inner, here, decoding or is_open)

    walk(jaxpr, 1.0, "", False)
    return out


def _operations(eqn, name: str) -> float:
    left, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name != "dot_general":  # each row of the left operand meets one matrix
        return 2.0 * math.prod(left) * result[-1]
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * math.prod(result) * math.prod(left[d] for d in contracted)


def main(argv: list[str] | None = None) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot.traced", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="experiments/X.py[:ARG]; also --config.KEY=VALUE")
    parser.add_argument("--topology", required=True,
                        help="for example v5e:4x4, of which the number of chips counts")
    parser.add_argument("--steps", default="rl", help="for example warm_av,rl")
    args, rest = parser.parse_known_args(argv)
    n = compiler.count(args.topology)
    flags = f"--xla_force_host_platform_device_count={n}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

    from nla_jax.pipeline import config_checks, run_mesh
    from nla_jax.pipeline.experiment_files import load_config

    config = load_config(args.config, rest)
    config_checks.lock(config)
    spec = models.spec_of(config)
    mesh = run_mesh.make(config, spec.lm, compiler.fake_devices(args.topology))
    print("| step | phase | operations | least | ratio |\n|---|---|---|---|---|")
    for program in programs.of(config, spec, mesh, tuple(args.steps.split(","))):
        traced = program.jitted.trace(*program.args).jaxpr.jaxpr
        found = products(traced, n, config.rl.max_new - 1)
        least = counts.of(config, program.name, spec)
        found["all"], least["all"] = sum(found.values()), sum(least.values())
        for phase, size in least.items():
            cells = program.name, phase, f"{found[phase]:.4g}", f"{size:.4g}", f"{found[phase] / size:.3f}"
            print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
