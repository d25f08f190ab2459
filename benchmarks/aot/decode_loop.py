"""Compile the decode loop of a rollout alone, for a slice, and count what one token costs.

The program is the rollout of `steps.rl` after its prefill: weights are prepared, then the loop runs. Beside
the counts are the formulas of `nla_jax.lm.decode_cost`.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.aot import compiler, hlo, hlo_work, invariant, models, programs
from nla_jax import specs, verbalizer
from nla_jax.lm import generate
from nla_jax.lm.model import KV
from nla_jax.pipeline import run_mesh
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.util.keys import new_key


def program(config, spec: specs.Spec, mesh) -> programs.Program:
    """Return the program: (target, AV, prompt's cache, logits, keys) -> samples."""
    o, cfg, rows = config.rl, spec.lm, mesh_lib.AXES
    N = o.batch * o.group

    def shape(dims, dtype, *places):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*places)))

    def prompt(B: int, S: int) -> KV:
        own = None if B == 1 else rows
        softmax = cfg.n_blocks - sum(cfg.linear)
        k = shape((softmax, B, cfg.n_kv_heads, S, cfg.head_dim), spec.compute, None, own)
        valid = shape((B, S), jnp.bool_, own)
        if not cfg.linear:
            return KV(k, k, valid)
        key_heads, heads, dk, dv, width = cfg.delta
        past = (width - 1, 2 * key_heads * dk + heads * dv), (heads, dk, dv)
        return KV(k, k, valid, *(shape((sum(cfg.linear), B, *d), jnp.float32, None, own) for d in past))

    def roll_out(base, av, prompt, logits_NV, keys_N):
        w = generate.decode_weights(verbalizer.weights(base, av, spec.compute), cfg, spec.compute)
        return generate.sample(w, cfg, prompt, logits_NV, keys_N, max_new=o.max_new, stop_ids=spec.av.close,
                               eos_ids=spec.av.eos, pad_id=spec.av.pad)

    base, av, _ = programs.roles(config, spec, mesh)
    base = base if config.av.rank else {}
    keys = jax.eval_shape(lambda: generate.row_keys(new_key(0), jnp.arange(N)))
    jitted = jax.jit(placement.trace_under_mesh(mesh, roll_out),
                     compiler_options=placement.compiler_options(mesh))
    # A device has whole activations, as in `kv_cache.make_levels`.
    levels = prompt(1, len(spec.av.before)), prompt(o.batch, 1 + len(spec.av.after))
    return programs.Program("decode", jitted, (
        base, av, levels, shape((N, cfg.vocab_size), jnp.float32, rows), shape(keys.shape, keys.dtype, rows)))


@dataclasses.dataclass(frozen=True)
class Counted:
    """What the compiler's output has for one token of the loop, on one chip."""

    flops: float
    hbm: float  # bytes of memory traffic
    links: float  # bytes sent
    collectives: dict[str, int]  # how many of each kind
    before: float  # bytes sent before the loop, in the whole rollout
    temporary: int  # bytes


def count(config, topology: str, mesh=None) -> tuple[Counted, compiler.Compiled]:
    """Compile the loop for a topology and return its counts."""
    found = compiler.devices(topology)
    spec = models.spec_of(config, found[0])
    mesh = mesh or run_mesh.make(config, spec.lm, found)
    made = compiler.compile_program(program(config, spec, mesh))
    return counted(made.text, made.temporary), made


def counted(text: str, temporary: int = 0) -> Counted:
    """Return the counts of a compiled program, from its text."""
    module = hlo.parse(text)
    flops = hbm = links = before = 0.0
    kinds = collections.Counter()
    for run in hlo.runs(module, 1):
        body = module.computations[run.computation]
        kind, sent = hlo_work.collective(run.at, body)
        if not run.open_loop:
            before += sent * run.times
            continue
        flops += hlo_work.flops(run.at, body) * run.times
        hbm += 0 if run.fused else hlo_work.traffic(module, run.at, body) * run.times
        links += sent * run.times
        if sent:  # not within groups of one
            kinds[kind] += run.times
    if moved := invariant.loop_invariant_collectives(module):
        raise ValueError(f"weights move in the decode loop: {[i.name for i in moved]}")
    return Counted(flops, hbm, links, {k: round(v) for k, v in sorted(kinds.items())}, before, temporary)
