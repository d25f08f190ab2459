"""What a config.json says of each block: whether it is local or linear, its heads, and how much of a head is
rotated."""

from pathlib import Path
from typing import Any

from nla_jax.errors import UserError, short_repr
from nla_jax.lm.config import LMConfig, check_blocks
from nla_jax.lm.files.family import Family


def windows(where: Path, family: Family, raw: dict) -> tuple[int, tuple[bool, ...]]:
    """Return LMConfig's window and local."""
    n_blocks, listed = check_blocks(raw["num_hidden_layers"]), None
    if "layer_types" in family.hf_windows:
        listed = raw.get("layer_types")
    if listed is None:
        local = tuple(bool(family.hf_local(raw, i)) for i in range(n_blocks))
    else:
        if len(listed) != n_blocks or not set(listed) <= {"full_attention", "sliding_attention"}:
            raise UserError(f"{where}: layer_types = {short_repr(listed)} is not supported")
        local = tuple(kind == "sliding_attention" for kind in listed)
    if not any(local):
        return 0, ()
    window = raw["sliding_window"]
    off = "use_sliding_window" in family.hf_windows and not raw["use_sliding_window"]
    if off or type(window) is not int or window < 1:
        raise UserError(
            f"{where}: sliding_window = {short_repr(window)} is not supported where layer_types or the "
            "family makes blocks local"
        )
    return window, local


def linear(where: Path, family: Family, raw: dict) -> dict[str, Any]:
    """Return LMConfig's linear and delta, if the family has linear attention."""
    if not family.hf_delta:
        return {}
    n_blocks, listed = check_blocks(raw["num_hidden_layers"]), raw.get("layer_types")
    if listed is None:
        every = raw["full_attention_interval"]
        listed = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(n_blocks)]
    if len(listed) != n_blocks or not set(listed) <= {"full_attention", "linear_attention"}:
        raise UserError(f"{where}: layer_types = {short_repr(listed)} is not supported")
    if "linear_attention" not in listed:
        return {}
    delta = tuple(raw[key] for key in family.hf_delta)
    return {"linear": tuple(kind == "linear_attention" for kind in listed), "delta": delta}


def global_heads(where: Path, family: Family, raw: dict, local: tuple[bool, ...]) -> dict[str, Any]:
    """Return LMConfig's global_heads and global_k_is_v, if the family has them.

    Published files have `global_head_dim` and `num_global_key_value_heads`. transformers 5.24 writes
    `per_layer_config` in their place, with the same settings for every block that is not local.
    """
    if not family.own_global:
        return {}
    blocks = [str(i) for i in range(raw["num_hidden_layers"]) if not (local and local[i])]
    if not local or str(len(local) - 1) not in blocks:
        raise UserError(f"{where}: layer_types = {short_repr(raw.get('layer_types'))} is not supported: some "
                        "blocks must be sliding_attention, and the last must be full_attention")
    k_is_v = raw["attention_k_eq_v"]
    if type(k_is_v) is not bool:
        raise UserError(f"{where}: attention_k_eq_v = {short_repr(k_is_v)} is not supported")
    given = raw.get("per_layer_config")
    if given is None:
        own = {"head_dim": raw["global_head_dim"]}
        if k_is_v and raw.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = raw["num_global_key_value_heads"]
    else:
        own = next(iter(given.values()), None) if isinstance(given, dict) else None
        if not (isinstance(own, dict) and own.keys() <= {"head_dim", "num_key_value_heads"}
                and given == dict.fromkeys(blocks, own)):
            raise UserError(f"{where}: per_layer_config = {short_repr(given)} is not supported: it must have "
                            "the same head_dim and num_key_value_heads for every full_attention block")
    near = raw["num_key_value_heads"], raw["head_dim"]
    far = own.get("num_key_value_heads", near[0]), own.get("head_dim", near[1])
    return {"global_heads": far if k_is_v or far != near else (), "global_k_is_v": k_is_v}


def global_settings(cfg: LMConfig) -> dict[str, Any]:
    """Return the keys of config.json that `global_heads` reads."""
    n_kv, head_dim = cfg.kv_heads(local=False)
    return {
        "attention_k_eq_v": cfg.global_k_is_v, "global_head_dim": head_dim,
        "num_global_key_value_heads": n_kv if cfg.global_k_is_v else None,
    }


def rotary_dim(head_dim, share) -> int:
    """Return LMConfig's rotary_dim. Raises ValueError unless the share is a number above 0, at most 1."""
    if type(share) not in (int, float) or not 0 < share <= 1 or int(head_dim * share) < 2:
        raise ValueError(f"partial_rotary_factor = {short_repr(share)} is not possible")
    return int(head_dim * share) if int(head_dim * share) != head_dim else 0
