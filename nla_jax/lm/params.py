"""A table that describes every parameter: shape, logical axes, and initialisation.

Initial values, abstract values for compilation and restoring, and shardings
(`nla_jax.sharding.rules`) are derived from the table.
"""

import dataclasses
import math
import operator

import jax
import jax.numpy as jnp
from flax import traverse_util

from nla_jax.lm.config import LMConfig
from nla_jax.sharding import placement
from nla_jax.util import int8
from nla_jax.util.keys import normal


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter. `axes` names each dimension; `init` is "normal", "ones", "zeros" or "eye"."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    fan_in: int | None = None


def table(cfg: LMConfig) -> dict[str, Spec]:
    """Return {name: Spec} of a whole model. Block parameters are stacked: their first axis is the block.

    If blocks are of two kinds (`LMConfig.kinds`), a parameter's first axis counts the blocks that have it
    (`blocks_of`).

    Matrices are [in, out], the transpose of PyTorch's `Linear.weight`. A norm multiplies by its weight.
    Some families store that weight minus one; reading adds the one (`nla_jax.lm.files.families`).
    """
    L, D, F, V = cfg.n_blocks, cfg.d_model, cfg.d_ff, cfg.vocab_size
    Hd, Kd = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    Qd = 2 * Hd if cfg.attn_gate else Hd

    def block(shape, axes, **kw):
        return Spec((L, *shape), ("block", *axes), **kw)

    def norm(size, name):
        return {f"blocks/{name}": block((size,), ("norm",), init="ones")}

    specs = {
        "embed": Spec((V, D), ("vocab", "model"), fan_in=D),
        **(norm(D, "attn_norm") if cfg.pre_norms else {}),
        "blocks/wq": block((D, Qd), ("model", "heads"), fan_in=D),
        "blocks/wk": block((D, Kd), ("model", "kv_heads"), fan_in=D),
        "blocks/wv": block((D, Kd), ("model", "kv_heads"), fan_in=D),
        "blocks/wo": block((Hd, D), ("heads", "model"), fan_in=Hd),
        **(norm(D, "mlp_norm") if cfg.pre_norms else {}),
        **({} if cfg.experts and not (cfg.experts_beside or cfg.shared_expert) else {
            "blocks/w_gate": block((D, F), ("model", "mlp"), fan_in=D),
            "blocks/w_up": block((D, F), ("model", "mlp"), fan_in=D),
            "blocks/w_down": block((F, D), ("mlp", "model"), fan_in=F),
        }),
        "final_norm": Spec((D,), ("norm",), init="ones"),
    }
    if cfg.qkv_bias:
        specs["blocks/wq_bias"] = block((Qd,), ("heads",), init="zeros")
        specs["blocks/wk_bias"] = block((Kd,), ("kv_heads",), init="zeros")
        specs["blocks/wv_bias"] = block((Kd,), ("kv_heads",), init="zeros")
    if cfg.qk_norm:
        whole = cfg.qk_norm_whole
        specs |= norm(Hd if whole else cfg.head_dim, "q_norm") | norm(Kd if whole else cfg.head_dim, "k_norm")
    if cfg.post_norms:
        specs |= norm(D, "attn_post_norm") | norm(D, "mlp_post_norm")
    if cfg.experts:
        E, _, F = cfg.experts
        specs["blocks/router"] = block((D, E), ("model", "expert"), fan_in=D)
        specs["blocks/experts_gate"] = block((E, D, F), ("expert", "model", "mlp"), fan_in=D)
        specs["blocks/experts_up"] = block((E, D, F), ("expert", "model", "mlp"), fan_in=D)
        specs["blocks/experts_down"] = block((E, F, D), ("expert", "mlp", "model"), fan_in=F)
    if cfg.shared_expert:
        specs["blocks/shared_gate"] = block((D, 1), ("model", "expert"), fan_in=D)
    if cfg.experts_beside:
        specs |= norm(D, "router_norm") | norm(E, "experts_scale")
        specs |= norm(D, "experts_norm") | norm(D, "experts_post_norm") | norm(D, "mlp_own_norm")
    if cfg.block_scale:
        specs |= norm(1, "block_scale")
    if cfg.kinds:
        specs |= _delta(cfg) if cfg.linear else _global(cfg, specs)
        specs = {name: _counted(cfg, name, spec) for name, spec in specs.items()}
        specs = {name: spec for name, spec in specs.items() if spec.shape[0]}
    if not cfg.tied:
        specs["lm_head"] = Spec((D, V), ("model", "vocab"), fan_in=D)
    return specs


def _delta(cfg: LMConfig) -> dict[str, Spec]:
    """Return the parameters of one block's linear attention, as those of L blocks."""
    key_heads, H, dk, dv, W = cfg.delta
    C, V, D = 2 * key_heads * dk + H * dv, H * dv, cfg.d_model

    def block(shape, axes, **kw):
        return Spec((cfg.n_blocks, *shape), ("block", *axes), **kw)

    return {
        "blocks/delta_qkv": block((D, C), ("model", "heads"), fan_in=D),
        "blocks/delta_z": block((D, V), ("model", "heads"), fan_in=D),
        "blocks/delta_b": block((D, H), ("model", "heads"), fan_in=D),
        "blocks/delta_a": block((D, H), ("model", "heads"), fan_in=D),
        "blocks/delta_conv": block((C, W, 1), ("norm", "norm", "norm"), fan_in=W),
        "blocks/delta_dt_bias": block((H,), ("norm",), init="ones"),
        "blocks/delta_a_log": block((H,), ("norm",), init="zeros"),
        "blocks/delta_norm": block((dv,), ("norm",), init="ones"),
        "blocks/delta_out": block((V, D), ("heads", "model"), fan_in=V),
    }


def _global(cfg: LMConfig, specs: dict[str, Spec]) -> dict[str, Spec]:
    """Return the attention's parameters of blocks that are not local, as those of L blocks."""
    n_kv, d = cfg.global_heads
    widths = {"heads": cfg.n_heads * d, "kv_heads": n_kv * d, "norm": d}
    out = {}
    for name in (n for n in _ATTENTION if f"blocks/{n}" in specs and not (n == "wv" and cfg.global_k_is_v)):
        spec = specs[f"blocks/{name}"]
        shape = [widths.get(axis, size) for axis, size in zip(spec.axes, spec.shape, strict=True)]
        fan_in = widths["heads"] if name == "wo" else spec.fan_in
        out[f"blocks/global_{name}"] = dataclasses.replace(spec, shape=tuple(shape), fan_in=fan_in)
    return out


_ATTENTION = ("wq", "wk", "wv", "wqkv", "wo", "q_norm", "k_norm")  # wqkv: joined, in decoding


def blocks_of(cfg: LMConfig, name: str) -> tuple[int, ...]:
    """Return which blocks have a parameter of this name, or its adapter."""
    name = name.removeprefix("blocks/").removesuffix("_lora").removesuffix("_bias")
    other = name.startswith(("delta", "global_"))  # what attention of the other kind is named
    if not cfg.kinds or not (name in _ATTENTION or other):
        return tuple(range(cfg.n_blocks))
    kind = other == bool(cfg.linear)
    return tuple(i for i, k in enumerate(cfg.kinds) if k == kind)


def _counted(cfg: LMConfig, name: str, spec: Spec) -> Spec:
    if spec.axes[0] != "block":
        return spec
    return dataclasses.replace(spec, shape=(len(blocks_of(cfg, name)), *spec.shape[1:]))


def slice_blocks(blocks: dict, cfg: LMConfig, start: int, stop: int) -> dict:
    """Return the parameters of blocks `start` to `stop` - 1 of `cfg`, as `LMConfig.of_blocks`."""
    out = {}
    for name, tree in blocks.items():
        first, last = start, stop
        if cfg.kinds:
            first, last = (sum(i < end for i in blocks_of(cfg, name)) for end in (start, stop))
        if first < last or not cfg.kinds:
            out[name] = jax.tree.map(lambda a, i=first, j=last: a[i:j], tree)
    return out


def one_block(blocks: dict, cfg: LMConfig, i: int) -> dict:
    """Return the parameters of block i, without the axis of blocks."""
    if not cfg.kinds:
        return jax.tree.map(lambda a: a[i], blocks)
    out = {}
    for name, tree in blocks.items():
        if i in (having := blocks_of(cfg, name)):
            out[name] = jax.tree.map(operator.itemgetter(having.index(i)), tree)
    return out


def n_blocks_in(blocks: dict, cfg: LMConfig) -> int:
    """Return the number of blocks that a tree of stacked parameters has. Stacks that `truncate` left whole
    do not count."""
    return (max if cfg.kinds else min)(len(a) for a in jax.tree.leaves(blocks))


def is_indexed(w) -> bool:
    """Return whether `scan.index_frozen` indexes w [L, ...], if it is frozen: bfloat16 on a single CPU."""
    one_cpu = not placement.has_mesh() and jax.default_backend() == "cpu"
    return one_cpu and not int8.is_int8(w) and getattr(w, "dtype", None) == jnp.bfloat16


def init_one(spec: Spec, key: jax.Array, dtype=jnp.float32) -> jax.Array:
    """Initialise one parameter ("normal": standard deviation 1/sqrt(fan_in))."""
    match spec.init:
        case "ones":
            return jnp.ones(spec.shape, dtype)
        case "zeros":
            return jnp.zeros(spec.shape, dtype)
        case "eye":
            return jnp.eye(*spec.shape, dtype=dtype)
        case "normal":
            scale = 1.0 / math.sqrt(spec.fan_in or spec.shape[-2])
            return (scale * normal(key, spec.shape)).astype(dtype)
    raise ValueError(f"unknown init {spec.init!r}")


def nest(flat: dict) -> dict:
    """Nest a flat dict: {"a/b": x} -> {"a": {"b": x}}."""
    return traverse_util.unflatten_dict(flat, sep="/")


def init(cfg: LMConfig, key: jax.Array, dtype=jnp.float32) -> dict:
    """Initialise all parameters; each one's key is folded by its position in the table."""
    return nest({
        name: init_one(spec, jax.random.fold_in(key, i), dtype)
        for i, (name, spec) in enumerate(table(cfg).items())
    })


def abstract(cfg: LMConfig, dtype=jnp.float32) -> dict:
    """Return the tree of shapes and dtypes, without allocating arrays."""
    return nest({n: jax.ShapeDtypeStruct(s.shape, dtype) for n, s in table(cfg).items()})


def truncate(params: dict, n_blocks: int, cfg: LMConfig | None = None, whole: bool = False) -> dict:
    """Keep the first `n_blocks` blocks and the embedding; drop final norm and unembedding.

    cfg: of `params`. It may be left out if all blocks have the same parameters; ValueError otherwise.
    whole: leave the stacks of `is_indexed` whole, because a slice is a copy. `forward` runs the first blocks.
    """
    if cfg is None and params["blocks"].keys() & {"delta_out", "global_wo"}:
        raise ValueError("a model with blocks of two kinds is cut by its configuration: give cfg")
    if cfg is None or not cfg.kinds:
        blocks = {name: w if whole and is_indexed(w) else jax.tree.map(lambda a: a[:n_blocks], w)
                  for name, w in params["blocks"].items()}
    else:
        blocks = slice_blocks(params["blocks"], cfg, 0, n_blocks)
    return {"embed": params["embed"], "blocks": blocks}


def float32_copy(params: dict) -> dict:
    """Copy `params` to float32, dequantized. The copy shares no memory with them, so it can be donated."""
    return jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), int8.dequantize(params))
