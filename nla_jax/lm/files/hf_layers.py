"""What a config.json says of each block: whether it is local or linear, and how much of a head is rotated."""

from pathlib import Path
from typing import Any

from nla_jax.errors import UserError, short_repr
from nla_jax.lm.config import check_blocks
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


def rotary_dim(head_dim, share) -> int:
    """Return LMConfig's rotary_dim. Raises ValueError unless the share is a number above 0, at most 1."""
    if type(share) not in (int, float) or not 0 < share <= 1 or int(head_dim * share) < 2:
        raise ValueError(f"partial_rotary_factor = {short_repr(share)} is not possible")
    return int(head_dim * share) if int(head_dim * share) != head_dim else 0
