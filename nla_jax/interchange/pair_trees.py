"""Open the parameters of AV and AR of a pair, each a whole model or a PEFT adapter of the target."""

import dataclasses
from pathlib import Path

import numpy as np

from nla_jax.errors import UserError
from nla_jax.interchange import peft_read
from nla_jax.interchange.export_pair import HEAD
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_read
from nla_jax.util import lazy_params


def open_trees(places: dict, adapters: dict, target: Path, cfg: LMConfig, layer: int) -> tuple[dict, dict]:
    """Return (trees of `lazy_params.Array`s by role, ranks by role; rank 0 is a whole model)."""
    short = cfg.first_blocks(layer + 1)
    trees, ranks = {}, {"av": 0, "ar": 0}
    for role, directory in places.items():
        if role in adapters:
            adapter = peft_read.read(directory, cfg if role == "av" else short, adapters[role])
            tree = peft_read.av_tree if role == "av" else peft_read.ar_tree
            trees[role], ranks[role] = tree(adapter, directory, target, cfg if role == "av" else short)
        elif role == "av":
            trees[role] = {"params": _open_av(directory, cfg)}
        else:
            blocks_alone = weights.open_files(directory, without=("final_norm", "lm_head"))
            head = _open_head(directory, cfg.d_model)
            trees[role] = {"params": weights.lazy_tree(blocks_alone), "head": head}
    return trees, ranks


def _open_av(directory: Path, cfg: LMConfig) -> dict:
    """Return AV's parameters in the target's layout, even if only one of the two ties its head."""
    files = weights.open_files(directory)
    params = weights.lazy_tree(files)
    if files.cfg.tied and not cfg.tied:
        embed = params["embed"]
        params["lm_head"] = dataclasses.replace(
            embed, shape=embed.shape[::-1], read=lambda i: embed.read(i).T
        )
    if cfg.tied and not files.cfg.tied:
        theirs = {ours: name for ours, _, name in files.plan}
        del params["lm_head"]
        if not hf_read.equal(files.tensors[theirs["lm_head"]], files.tensors[theirs["embed"]]):
            raise UserError(
                f"{directory} has a separate head, but its target ties the head to the embedding: this is "
                "not supported"
            )
    return params


def _open_head(directory: Path, d_model: int) -> lazy_params.Array:
    """Read AR's head [in, out]; in the file it is torch's [out, in]. Raises UserError if it is not finite."""
    import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
    import safetensors

    path = directory / HEAD
    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if shapes != {"weight": (d_model, d_model)}:
                raise UserError(f"{path} holds {shapes}, not one weight of shape {(d_model, d_model)}")
            head = file.get_tensor("weight")
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or damaged ({e}): download it again") from e
    if not np.isfinite(head).all():
        raise UserError(f"{path}: weight is not finite; the checkpoint is broken")
    head = head.astype(np.float32) if head.dtype == np.float64 else head
    return lazy_params.wrap(head.T, stacked=False)
