"""Estimate the temporary memory of a step without a TPU compiler, by the formulas of docs/scaling.md.

Bytes are per chip and follow from shapes alone. The largest phase counts, because phases do not overlap.
"""

import math

from benchmarks.aot import counts
from nla_jax import specs
from nla_jax.lm import decode_cost
from nla_jax.lm import params as params_lib
from nla_jax.lm.delta_net import CHUNK


def _size(specs) -> int:
    return sum(math.prod(s.shape) for s in specs.values())


def shape_of(config, spec: specs.Spec) -> decode_cost.Rollout:
    """Return the shape of a config's rollout."""
    o = config.rl
    return decode_cost.Rollout(o.batch * o.group, o.batch, len(spec.av.before), 1 + len(spec.av.after),
                               o.max_new)


def cache(config, spec: specs.Spec, n_devices: int) -> float:
    """Return the bytes of a rollout's cache on one device."""
    return decode_cost.cache_bytes(spec.lm, shape_of(config, spec), n_devices, spec.compute.itemsize)


def _mixing(cfg) -> int:
    """Return the bytes per token at work in linear attention: float32 arrays of channels, and of chunks."""
    if not cfg.linear:
        return 0
    key_heads, heads, dk, dv, _ = cfg.delta
    return 4 * (4 * (2 * key_heads * dk + heads * dv) + 6 * heads * (dk + dv) + 4 * heads * CHUNK)


def _update(config, spec, mesh, n_blocks: int, rows: float, T: int, trained: float, vocab: bool) -> float:
    """Return the temporary bytes of an update.

    They are gradients, the saved residual stream of each block, the activations of one block, the gathered
    weights of the two largest blocks, gradient sums of large matrices, and casts of the vocabulary's
    matrices."""
    cfg, n = spec.lm, mesh.size
    tokens, item = rows * T / n, spec.compute.itemsize
    kept = tokens * cfg.d_model * 4 * (n_blocks if spec.remat else 12 * n_blocks)
    width = cfg.experts[1] * cfg.experts[2] if cfg.experts else cfg.d_ff
    inside = tokens * width * (4 * 4 + 2 * item)  # gate, up and their gradients in float32, and operands
    inside += tokens * _mixing(cfg)
    gathered = sum(sorted(counts.block_sizes(cfg))[-2:]) * item
    sums = 3 * cfg.d_model * cfg.d_ff * 4 if trained else 0
    split = mesh.shape["tensor"] * mesh.shape["fsdp"]
    logits = 3 * 4 * config.vocab_chunk * cfg.vocab_size / split if vocab else 0
    tables = (5 * item + 4 if vocab else 2 * item + 4) if trained else 2 * item  # bytes per entry
    tables *= cfg.vocab_size * cfg.d_model / split
    return trained * 4 / n + kept + tables + max(inside + gathered + sums, logits)


def temporary_bytes(config, name: str, spec: specs.Spec, mesh) -> float:
    """Return the peak temporary bytes of a step, without its arguments."""
    cfg, n = spec.lm, mesh.size
    whole = _size(params_lib.table(cfg))
    part = whole - sum(counts.block_sizes(cfg)[spec.layer + 1 :])
    own = 1 + len(spec.av.after)
    if name != "rl":
        s, av = config[name], name.endswith("av")
        trained = 0 if config[name[-2:]].rank else whole if av else part
        T, blocks = s.max_tokens + (own if av else 0), cfg.n_blocks if av else spec.layer + 1
        return _update(config, spec, mesh, blocks, s.batch / s.micro, T, trained, av)
    o, N = config.rl, config.rl.batch * config.rl.group
    rollout = decode_cost.memory_bytes(cfg, shape_of(config, spec), n, mesh.shape["tensor"])
    T_ar = len(spec.ar.before) + o.max_new + len(spec.ar.after)
    read = config.ar.rank and 0 < o.ar_group < o.group  # AR learns fewer rows, in fewer microbatches
    rows_ar = o.batch * o.ar_group if read else N / o.micro_ar
    ar = _update(config, spec, mesh, spec.layer + 1, rows_ar, T_ar,
                 0 if config.ar.rank else part, False)
    av = _update(config, spec, mesh, cfg.n_blocks, N / o.micro_av, own + o.max_new,
                 0 if config.av.rank else whole, True)
    return max(rollout, ar, av)
