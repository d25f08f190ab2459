"""Low-rank adapters over the same parameter table.

An adapter is a tree {name: {"a": [L, in, r], "b": [L, r, out]}} for the block matrices. `attach`
hangs it beside the frozen weights, where `nla_jax.lm.block.project` finds it; no forward function
knows of roles. The update is W + a b: no extra scale (it is the learning rate by another name).
"""

import jax
import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig

MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


def table(cfg: LMConfig, rank: int) -> dict[str, params_lib.Spec]:
    """Name -> Spec of every adapter factor: `a` starts normal (1/sqrt(in)), `b` at zero."""
    specs = {}
    for name in MATRICES:
        full = params_lib.table(cfg)[f"blocks/{name}"]
        L, n_in, n_out = full.shape
        _, in_axis, out_axis = full.axes
        specs[f"{name}/a"] = params_lib.Spec(
            (L, n_in, rank), ("block", in_axis, "rank"), fan_in=n_in)
        specs[f"{name}/b"] = params_lib.Spec(
            (L, rank, n_out), ("block", "rank", out_axis), "zeros")
    return specs


def init(cfg: LMConfig, rank: int, key: jax.Array, dtype=jnp.float32) -> dict:
    """A fresh adapter: the adapted model equals its base."""
    return params_lib.nest({
        name: params_lib.init_one(spec, jax.random.fold_in(key, i), dtype)
        for i, (name, spec) in enumerate(table(cfg, rank).items())
    })


def attach(params: dict, adapter: dict) -> dict:
    """`params` with the adapter beside its matrices; the arrays of `params` are shared."""
    extra = {f"{name}_lora": ab for name, ab in adapter.items()}
    return {**params, "blocks": {**params["blocks"], **extra}}


def merge_block(block: dict) -> dict:
    """One block's plain parameters from those that carry adapters, as `merge`."""
    merged = merge({"blocks": jax.tree.map(lambda a: a[None], block)})["blocks"]
    return jax.tree.map(lambda a: a[0], merged)


def merge(params: dict) -> dict:
    """Plain parameters of a model that carries adapters."""
    blocks = dict(params["blocks"])
    for name in MATRICES:
        ab = blocks.pop(name + "_lora", None)
        if ab is not None:
            blocks[name] = added(blocks[name], ab)
    return {**params, "blocks": blocks}


def added(w, ab: dict):
    """W + a b, in float32, in W's dtype; of one block [in, out] or of several [L, in, out]."""
    delta = jnp.einsum("...ir,...ro->...io", ab["a"], ab["b"], preferred_element_type=jnp.float32)
    return (w.astype(jnp.float32) + delta).astype(w.dtype)
