"""The weights of a released pair: AV's and AR's directories in Hugging Face layout, in the target's layout.

A whole AV is a model. A whole AR has blocks 0 to K and a head (HEAD); its final norm and unembedding are not
read. Each may be a PEFT adapter of the target instead.
"""

import dataclasses
from pathlib import Path

import numpy as np

from nla_jax.errors import UserError
from nla_jax.lm import sharded_load, weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_read, peft_config, peft_read
from nla_jax.lm.files.peft_read import HEAD
from nla_jax.lm.params import Spec
from nla_jax.util import lazy_params

_UNREAD = ("final_norm", "lm_head")  # of AR


def open_trees(av_dir: Path, ar_dir: Path, cfg: LMConfig, layer: int, target: str) -> tuple[dict, dict]:
    """Return (trees of `lazy_params.Array`s, ranks), by role; rank 0 is a whole model.

    cfg, target: the target's config and location. Raises UserError for damaged files, and for a separate head
    whose target ties it to the embedding."""
    short = cfg.first_blocks(layer + 1)
    trees, ranks = {}, {"av": 0, "ar": 0}
    if peft_config.is_adapter(av_dir):
        adapter = peft_read.read(av_dir, cfg, peft_config.read(av_dir))
        trees["av"], ranks["av"] = peft_read.av_tree(adapter, av_dir, target, cfg)
    else:
        trees["av"] = _open_av(av_dir, cfg)
    if peft_config.is_adapter(ar_dir):
        adapter = peft_read.read(ar_dir, short, peft_config.read(ar_dir))
        trees["ar"], ranks["ar"] = peft_read.ar_tree(adapter, ar_dir, target, short)
    else:
        ar = weights.lazy_tree(weights.open_files(ar_dir, without=_UNREAD))
        trees["ar"] = {"params": ar, "head": _open_head(ar_dir, cfg.d_model)}
    return trees, ranks


def _open_av(av_dir: Path, cfg: LMConfig) -> dict:
    files = weights.open_files(av_dir)
    av = weights.lazy_tree(files)
    if files.cfg.tied and not cfg.tied:
        embed = av["embed"]
        av["lm_head"] = dataclasses.replace(embed, shape=embed.shape[::-1], read=lambda i: embed.read(i).T)
    if cfg.tied and not files.cfg.tied:
        _check_heads_are_equal(av_dir, files)
        del av["lm_head"]
    return {"params": av}


def place_models(av_dir: Path, ar_dir: Path, cfg: LMConfig, mesh, dtype) -> dict:
    """Read the whole models of a pair onto the mesh as `sharded_load.place` does: {role: tree} without
    adapters. Raises UserError as `open_trees`."""
    place = {"av": _place_av, "ar": _place_ar}
    return {role: place[role](directory, cfg, mesh, dtype)
            for role, directory in (("av", av_dir), ("ar", ar_dir)) if not peft_config.is_adapter(directory)}


def _place_av(av_dir: Path, cfg: LMConfig, mesh, dtype) -> dict:
    found = weights.open_files(av_dir)
    extra = ()
    if cfg.tied and not found.cfg.tied:
        _check_heads_are_equal(av_dir, found)
        extra = ("lm_head",)
    _, av = sharded_load.place(av_dir, mesh, dtype, without=extra)
    if found.cfg.tied and not cfg.tied:
        embed = weights.lazy_tree(found)["embed"]
        head = dataclasses.replace(embed, shape=embed.shape[::-1], read=lambda i: embed.read(i).T)
        av |= _place_one("lm_head", head, ("model", "vocab"), av_dir, mesh, dtype)
    return {"params": av}


def _place_ar(ar_dir: Path, cfg: LMConfig, mesh, dtype) -> dict:
    _, ar = sharded_load.place(ar_dir, mesh, dtype, without=_UNREAD)
    head = _place_one("head", _open_head(ar_dir, cfg.d_model), ("norm", "model"), ar_dir, mesh, np.float32)
    return {"params": ar, **head}


def _place_one(name: str, array: lazy_params.Array, axes, where: Path, mesh, dtype) -> dict:
    pieces = sharded_load.pieces_of({name: array}, str(where))
    return sharded_load.stream(pieces, {name: Spec(array.shape, axes)}, {name: np.dtype(dtype)}, mesh)


def _check_heads_are_equal(directory: Path, files: weights.Files) -> None:
    theirs = {ours: name for ours, _, name in files.plan}
    if not hf_read.equal(files.tensors[theirs["lm_head"]], files.tensors[theirs["embed"]]):
        raise UserError(
            f"{directory} has a separate head, but its target ties the head to the embedding: this is not "
            "supported"
        )


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
