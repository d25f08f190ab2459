"""Estimate the temporary memory of a step without a TPU compiler, by the formulas of docs/scaling.md.

Bytes are per chip and follow from shapes alone. The largest phase counts, because phases do not overlap.
"""

import math

from benchmarks.aot import counts
from nla_jax import specs
from nla_jax.lm import params as params_lib


def _size(specs) -> int:
    return sum(math.prod(s.shape) for s in specs.values())


def cache(config, spec: specs.Spec, n_devices: int) -> float:
    """Return the bytes of a rollout's cache on one device.

    The prompt before the marker is cached once, the rest of the prompt per activation, answers per row."""
    o, cfg = config.rl, spec.lm
    slot = 2 * cfg.n_blocks * cfg.n_kv_heads * cfg.head_dim * spec.compute.itemsize
    activations = math.lcm(o.batch, n_devices) / n_devices
    own = (1 + len(spec.av.after)) * activations
    return slot * (len(spec.av.before) + own + o.max_new * o.batch * o.group / n_devices)


def _update(config, spec, mesh, n_blocks: int, rows: float, T: int, trained: float, vocab: bool) -> float:
    """Return the temporary bytes of an update.

    They are gradients, the saved residual stream of each block, the activations of one block, the gathered
    weights of two blocks, gradient sums of its large matrices, and casts of the vocabulary's matrices."""
    cfg, n = spec.lm, mesh.size
    tokens, item = rows * T / n, spec.compute.itemsize
    kept = tokens * cfg.d_model * 4 * (n_blocks if spec.remat else 12 * n_blocks)
    inside = tokens * cfg.d_ff * (4 * 4 + 2 * item)  # gate, up and their gradients in float32, and operands
    gathered = 2 * counts.block_size(cfg) * item
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
    part = whole - (cfg.n_blocks - spec.layer - 1) * counts.block_size(cfg)
    own = 1 + len(spec.av.after)
    if name != "rl":
        s, av = config[name], name.endswith("av")
        trained = 0 if config[name[-2:]].rank else whole if av else part
        T, blocks = s.max_tokens + (own if av else 0), cfg.n_blocks if av else spec.layer + 1
        return _update(config, spec, mesh, blocks, s.batch / s.micro, T, trained, av)
    o, N = config.rl, config.rl.batch * config.rl.group
    rollout = whole * spec.compute.itemsize / mesh.shape["tensor"] + cache(config, spec, n)
    T_ar = len(spec.ar.before) + o.max_new + len(spec.ar.after)
    ar = _update(config, spec, mesh, spec.layer + 1, N / o.micro_ar, T_ar,
                 0 if config.ar.rank else part, False)
    av = _update(config, spec, mesh, cfg.n_blocks, N / o.micro_av, own + o.max_new,
                 0 if config.av.rank else whole, True)
    return max(rollout, ar, av)
