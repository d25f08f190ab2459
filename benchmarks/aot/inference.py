"""Find the smallest machine on which a released pair explains and is evaluated.

    python -m benchmarks.aot.inference                            # the table, from shapes and formulas
    python -m benchmarks.aot.inference --compile RECIPE SLICE …   # programs compiled with libtpu, beside it

    python -m benchmarks.aot.inference --compile qwen2_5_7b v5e:2x2 --dtype int8 --use explain

The programs are those of `nla explain` (16 activations at a time, blocks 0 to K of the target) and
`nla evaluate` (64, the whole target). The mesh is that of `nla_jax.sharding.inference`.
"""

import argparse
import math
import os
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from benchmarks.aot import compiler, counts, models, programs
from benchmarks.aot.chips import chip_of
from nla_jax import reconstructor, specs, target, verbalizer
from nla_jax.evaluate import runner
from nla_jax.lm import params as params_lib
from nla_jax.sharding import chips, inference, placement
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import int8
from nla_jax.util.keys import new_key

RECIPES = ("qwen2_5_7b", "gemma3_12b", "gemma3_27b", "llama3_3_70b")
USES = {"explain": 16, "evaluate": 64}  # activations at a time
MAX_NEW, READ, TEXT = 150, 176, 512  # tokens of an answer, of AR's prompt, and of a text
SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4"),
}
GPUS = {"H100": 80e9, "H200": 141e9, "L4": 24e9, "T4": 16e9}  # bytes
COUNTS = (1, 2, 4, 8, 16)


def trees(spec: specs.Spec, mesh, dtype: str, use: str) -> tuple[dict, dict, dict]:
    """Return (base, AV, AR) of a pair as trees of shapes with shardings."""
    lm, short = spec.lm, spec.lm.first_blocks(spec.layer + 1)
    kept = params_lib.table(lm if use == "evaluate" else short)
    if use == "explain":
        kept = {n: s for n, s in kept.items() if n not in ("final_norm", "lm_head")}
    base, av = programs.tree_of(kept, mesh, dtype), programs.tree_of(verbalizer.table(lm), mesh, dtype)
    ar = programs.tree_of(reconstructor.table(lm, spec.layer), mesh, dtype)
    ar["head"] = jax.ShapeDtypeStruct(ar["head"].shape, jnp.float32, sharding=ar["head"].sharding)
    return tuple(map(_with_scales, (base, av, ar)))


def _with_scales(tree: dict) -> dict:
    def one(path, a):
        if a.dtype != jnp.int8:
            return a
        over = -1 if path[-1].key == "embed" else -2
        shape = list(a.shape)
        shape[over] = 1
        return int8.Int8(a, jax.ShapeDtypeStruct(
            tuple(shape), jnp.float32, sharding=mesh_lib.replicated_sharding(a.sharding.mesh)))

    return jax.tree_util.tree_map_with_path(one, tree)


def programs_of(spec: specs.Spec, mesh, dtype: str, use: str) -> list[programs.Program]:
    """Return the programs that capture, explain and read."""
    base, av, ar = trees(spec, mesh, dtype, use)
    whole, n = mesh_lib.replicated_sharding(mesh), USES[use]
    shape = lambda kind, *dims: jax.ShapeDtypeStruct(dims, kind, sharding=whole)
    capture = jax.jit(placement.trace_under_mesh(mesh, target.capture), static_argnums=(1, 2),
                      out_shardings=whole)
    write, read, _ = runner.jit_programs(spec, mesh)
    key = jax.eval_shape(lambda: new_key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    row = shape(jnp.int32, 1, TEXT), shape(jnp.bool_, 1, TEXT), shape(jnp.int32, 1, TEXT)
    rows = shape(jnp.int32, n, READ), shape(jnp.bool_, n, READ), shape(jnp.int32, n)
    given = shape(jnp.float32, n, spec.lm.d_model), shape(jnp.int32, n), key, shape(jnp.float32), MAX_NEW
    return [
        programs.Program("capture", capture, (base, spec.lm, spec.layer, *row)),
        programs.Program("explain", write, (av, base, *given)),
        programs.Program("read", read, (ar, base, *rows)),
    ]


def temporary_bytes(spec: specs.Spec, mesh, dtype: str, use: str) -> float:
    """Estimate the temporary bytes of one device in the largest program."""
    lm, n, rows = spec.lm, mesh.size, USES[use]
    item = jnp.dtype(dtype).itemsize
    shard_rows = math.ceil(rows / n)
    gathered = sum(sorted(counts.block_sizes(lm))[-2:])  # for products with sharded rows
    blocks = gathered * item * (n > 1)
    copied = mesh.shape["fsdp"] > 1
    weights = sum(math.prod(s.shape) for s in params_lib.table(lm).values())
    decoding = copied * weights * item / mesh.shape["tensor"]
    slot = 2 * lm.n_blocks * lm.n_kv_heads * lm.head_dim * 2
    own = 1 + len(spec.av.after)
    cache = slot * (len(spec.av.before) + (own + MAX_NEW) * shard_rows)
    logits = 4 * 4 * shard_rows * lm.vocab_size
    inside = lambda tokens: tokens * (20 * lm.d_ff + 16 * lm.d_model)
    write = decoding + cache + max(logits, blocks + inside(shard_rows * own))
    read = blocks + inside(shard_rows * READ)
    return max(write, read, inside(TEXT))


def sizes(spec: specs.Spec, dtype: str, use: str) -> tuple[int, int]:
    """Return the bytes of all weights at rest, and of AV in decoding."""
    one = AbstractMesh((1, 1, 1), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3)
    every = trees(spec, one, dtype, use)
    return sum(map(compiler.bytes_of, every)), compiler.bytes_of(every[1])


def need(spec: specs.Spec, n: int, memory: float, dtype: str, use: str):
    """Return (bytes of one device, sizes of the mesh) on n devices of this memory."""
    at_rest, in_decoding = sizes(spec, dtype, use)
    shape = inference.choose_sizes(n, at_rest, in_decoding, int(memory))
    mesh = AbstractMesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * 3)
    resting = sum(map(compiler.bytes_of, trees(spec, mesh, dtype, use)))
    return resting + temporary_bytes(spec, mesh, dtype, use), shape


def smallest(spec: specs.Spec, machines: list[tuple[str, int]], memory: float, dtype: str, use: str) -> str:
    """Return the first of the machines (name, devices) that fits, with GiB of a device, or "none"."""
    for name, n in machines:
        total, _ = need(spec, n, memory, dtype, use)
        if total <= chips.LIMIT * memory:
            return f"{name}: {total / chips.GIB:.1f}"
    return "none"


def spec_of(recipe: str) -> specs.Spec:
    from nla_jax.pipeline.experiment_files import load_config

    return models.spec_of(load_config(f"experiments/{recipe}.py", []))


def print_table() -> None:
    names = [*SLICES, "H100", "H200", "L4", "T4"]
    print("| pair | weights | use | GB | " + " | ".join(names) + " |\n|" + "---|" * (4 + len(names)))
    for recipe in RECIPES:
        spec = spec_of(recipe)
        for dtype in ("bfloat16", "int8"):
            for use in USES:
                cells = [f"{sizes(spec, dtype, use)[0] / 1e9:.1f}"]
                for name in names:
                    if name in SLICES:
                        memory = chips.CHIPS[name].memory
                        machines = [(s, compiler.count(f"{name}:{s}")) for s in SLICES[name]]
                    else:
                        memory, machines = GPUS[name], [(str(n), n) for n in COUNTS]
                    cells.append(smallest(spec, machines, memory, dtype, use))
                print(f"| {recipe} | {dtype} | {use} | " + " | ".join(cells) + " |")


def compile_all(recipe: str, topology: str, dtype: str, uses: list[str]) -> None:
    """Compile the programs for a slice, and print their memory beside the estimate."""
    spec, devices = spec_of(recipe), compiler.devices(topology)
    memory = chip_of(topology).memory
    for use in uses:
        total, shape = need(spec, len(devices), memory, dtype, use)
        mesh = mesh_lib.make(*shape, devices=devices)
        resting = sum(map(compiler.bytes_of, trees(spec, mesh, dtype, use)))
        most = 0
        for program in programs_of(spec, mesh, dtype, use):
            made = compiler.compile_program(program)
            extra = made.total - made.arguments
            most = max(most, extra)
            print(f"{recipe} {dtype} {use}: {program.name} on {topology}, mesh {dict(mesh.shape)}: "
                  f"temporaries {extra / chips.GIB:.2f} GiB ({made.seconds:.0f} s)", flush=True)
        print(f"{recipe} {dtype} {use} on {topology}: {(resting + most) / chips.GIB:.2f} GiB a chip, weights "
              f"{resting / chips.GIB:.2f}; estimated {total / chips.GIB:.2f}; limit "
              f"{chips.LIMIT * memory / chips.GIB:.1f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--compile", nargs=2, metavar=("RECIPE", "SLICE"))
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "int8"))
    p.add_argument("--use", default="explain,evaluate")
    args = p.parse_args(argv)
    if args.compile:
        compile_all(*args.compile, args.dtype, args.use.split(","))
    else:
        print_table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
