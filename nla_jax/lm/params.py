"""A table that describes every parameter: shape, logical axes, and initialisation.

Initial values, abstract values for compilation and restoring, and shardings
(`nla_jax.sharding.rules`) are derived from the table.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import traverse_util

from nla_jax.lm.config import LMConfig
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

    Matrices are [in, out], the transpose of PyTorch's `Linear.weight`. A norm multiplies by its weight.
    Some families store that weight minus one; reading adds the one (`nla_jax.lm.files.families`).
    """
    L, D, F, V = cfg.n_blocks, cfg.d_model, cfg.d_ff, cfg.vocab_size
    Hd, Kd = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim

    def block(shape, axes, **kw):
        return Spec((L, *shape), ("block", *axes), **kw)

    specs = {
        "embed": Spec((V, D), ("vocab", "model"), fan_in=D),
        "blocks/attn_norm": block((D,), ("norm",), init="ones"),
        "blocks/wq": block((D, Hd), ("model", "heads"), fan_in=D),
        "blocks/wk": block((D, Kd), ("model", "kv_heads"), fan_in=D),
        "blocks/wv": block((D, Kd), ("model", "kv_heads"), fan_in=D),
        "blocks/wo": block((Hd, D), ("heads", "model"), fan_in=Hd),
        "blocks/mlp_norm": block((D,), ("norm",), init="ones"),
        "blocks/w_gate": block((D, F), ("model", "mlp"), fan_in=D),
        "blocks/w_up": block((D, F), ("model", "mlp"), fan_in=D),
        "blocks/w_down": block((F, D), ("mlp", "model"), fan_in=F),
        "final_norm": Spec((D,), ("norm",), init="ones"),
    }
    if cfg.qkv_bias:
        specs["blocks/wq_bias"] = block((Hd,), ("heads",), init="zeros")
        specs["blocks/wk_bias"] = block((Kd,), ("kv_heads",), init="zeros")
        specs["blocks/wv_bias"] = block((Kd,), ("kv_heads",), init="zeros")
    if cfg.qk_norm:
        specs["blocks/q_norm"] = block((cfg.head_dim,), ("norm",), init="ones")
        specs["blocks/k_norm"] = block((cfg.head_dim,), ("norm",), init="ones")
    if cfg.post_norms:
        specs["blocks/attn_post_norm"] = block((D,), ("norm",), init="ones")
        specs["blocks/mlp_post_norm"] = block((D,), ("norm",), init="ones")
    if not cfg.tied:
        specs["lm_head"] = Spec((D, V), ("model", "vocab"), fan_in=D)
    return specs


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


def truncate(params: dict, n_blocks: int) -> dict:
    """Keep the first `n_blocks` blocks and the embedding; drop final norm and unembedding."""
    blocks = jax.tree.map(lambda a: a[:n_blocks], params["blocks"])
    return {"embed": params["embed"], "blocks": blocks}


def float32_copy(params: dict) -> dict:
    """Copy `params` to float32, dequantized. The copy shares no memory with them, so it can be donated."""
    return jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), int8.dequantize(params))
