"""What the metadata of a GGUF file says of heads, if blocks that are not local have heads of their own."""

from typing import Any

import numpy as np

from nla_jax.errors import UserError, short_repr
from nla_jax.lm.files.family import Family, Tensor


def global_heads(family: Family, meta: dict[str, Any], tensors: dict[str, Tensor],
                 local: tuple[bool, ...]) -> dict[str, Any]:
    """Return the fields of LMConfig about heads: those of local blocks, and those of the others.

    The sizes without `_swa` are those of blocks that are not local. If these have no wv, their values are
    their keys. Raises KeyError, TypeError or ValueError for metadata that are incomplete or contradictory.
    """
    if not any(local) or all(local):
        raise ValueError("some blocks must be local, and others not")
    n_kv, d, near_d = (meta[f"attention.{key}"] for key in ("head_count_kv", "key_length", "key_length_swa"))
    n_kv = n_kv if isinstance(n_kv, list) else [n_kv] * len(local)
    if len(n_kv) != len(local):
        raise ValueError(f"head_count_kv has {len(n_kv)} numbers for {len(local)} blocks")
    kinds = {kind: {n for n, is_local in zip(n_kv, local, strict=True) if is_local == kind} for kind in local}
    if any(len(found) > 1 for found in kinds.values()):
        raise ValueError(f"head_count_kv = {short_repr(n_kv)} differs among blocks of one kind")
    near, far = ((kinds[kind].pop(), size) for kind, size in ((True, near_d), (False, d)))
    k_is_v = family.gguf["blocks/global_wv"].format(i=local.index(False)) not in tensors
    for key, wanted in (("attention.value_length_swa", near_d), ("rope.dimension_count_swa", near_d)):
        if meta[key] not in (None, wanted):
            raise ValueError(f"{key} = {short_repr(meta[key])} is not {wanted}")
    return {
        "n_kv_heads": near[0], "head_dim": near[1],
        "global_heads": far if k_is_v or far != near else (), "global_k_is_v": k_is_v,
    }


def proportional(where, name: str, factors: np.ndarray, head_dim: int) -> tuple:
    """Return LMConfig.rope_scaling from the divisors of frequencies: 1, and a huge number for pairs that are
    not rotated. Raises UserError for others."""
    rotated = int(np.sum(factors == 1))
    wanted = np.where(np.arange(head_dim // 2) < rotated, 1.0, np.float32(1e30))
    if not rotated or factors.shape != wanted.shape or not np.array_equal(factors, wanted):
        raise UserError(f"{where}: {name} is not that of a head of {head_dim} whose first pairs are rotated; "
                        "use the model's directory in Hugging Face layout")
    return ("proportional", rotated / len(factors))
