"""Low-rank adapters for the block matrices of the parameter table.

An adapter is a tree {name: {"a": [L, in, r], "b": [L, r, out]}}. `attach` adds it to the frozen
parameters, where `nla_jax.lm.block.project` reads it. The adapted weight is W + a b. There is no extra
scale, because it would have the same effect as the learning rate.
"""

import jax
import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.util import int8

MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
# Where the model has them (`matrices`).
ADAPTED = (*MATRICES, "delta_qkv", "delta_z", "delta_out", "global_wq", "global_wk", "global_wv", "global_wo")


def matrices(cfg: LMConfig) -> tuple[str, ...]:
    """Return the matrices of blocks that have adapters: of attention and MLPs, not of experts."""
    whole = params_lib.table(cfg)
    return tuple(name for name in ADAPTED if f"blocks/{name}" in whole)


def table(cfg: LMConfig, rank: int) -> dict[str, params_lib.Spec]:
    """Return {name: Spec} of every adapter factor. `a` starts normal (std 1/sqrt(in)), `b` at zero."""
    specs = {}
    whole = params_lib.table(cfg)
    for name in matrices(cfg):
        full = whole[f"blocks/{name}"]
        L, n_in, n_out = full.shape
        _, in_axis, out_axis = full.axes
        specs[f"{name}/a"] = params_lib.Spec(
            (L, n_in, rank), ("block", in_axis, "rank"), fan_in=n_in)
        specs[f"{name}/b"] = params_lib.Spec(
            (L, rank, n_out), ("block", "rank", out_axis), "zeros")
    return specs


def init(cfg: LMConfig, rank: int, key: jax.Array, dtype=jnp.float32) -> dict:
    """Initialise an adapter. Since `b` is zero, the adapted model equals its base."""
    return params_lib.nest({
        name: params_lib.init_one(spec, jax.random.fold_in(key, i), dtype)
        for i, (name, spec) in enumerate(table(cfg, rank).items())
    })


def attach(params: dict, adapter: dict) -> dict:
    """Return `params` with the adapter's factors added to its blocks. No array is copied."""
    extra = {f"{name}_lora": ab for name, ab in adapter.items()}
    return {**params, "blocks": {**params["blocks"], **extra}}


def is_attached(params: dict) -> bool:
    """Return whether `params` have adapters."""
    return any(name.endswith("_lora") for name in params["blocks"])


def merge_block(block: dict) -> dict:
    """Merge the adapter of one block into its matrices, as `merge`."""
    merged = merge({"blocks": jax.tree.map(lambda a: a[None], block)})["blocks"]
    return jax.tree.map(lambda a: a[0], merged)


def merge(params: dict) -> dict:
    """Merge the adapters of `params` into the matrices. Those of `Int8` matrices stay apart."""
    blocks = dict(params["blocks"])
    for name in ADAPTED:
        if name + "_lora" in blocks and not int8.is_int8(blocks[name]):
            blocks[name] = add_update(blocks[name], blocks.pop(name + "_lora"))
    return {**params, "blocks": blocks}


def add_update(w, ab: dict):
    """Return W + a b, computed in float32, in W's dtype; W is [in, out] or [L, in, out]."""
    delta = jnp.einsum("...ir,...ro->...io", ab["a"], ab["b"], preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + delta).astype(w.dtype)
