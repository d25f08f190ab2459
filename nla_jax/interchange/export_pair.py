"""Export a bundle as the release's two directories, which transformers and the official client load."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import model_card, model_sidecar, run_summary, sidecar_common
from nla_jax.interchange.model_sidecar import ModelSidecar
from nla_jax.interchange.sidecar_common import Templates, Tokens
from nla_jax.lm import thinking, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_write
from nla_jax.lm.files.peft_read import HEAD, merge_adapters
from nla_jax.util import paths, writable

DTYPES = ("float32", "bfloat16")
OURS = "nla_jax"  # our own block of an exported sidecar; other readers ignore it


def export_pair(
    directory: str | Path,
    out: str | Path,
    *,
    dtype: str = "float32",
    target: str = "",
    schema: int = model_sidecar.NEWEST,
    shard_bytes: int = hf_write.SHARD_BYTES,
) -> tuple[Path, Path]:
    """Write a bundle as the official directories OUT/av and OUT/ar, which transformers loads.

    Adapters are merged into the target's weights. AR's directory has K+1 blocks; its final norm and tied
    head, which transformers needs, are meaningless. A frozen AR has the target's blocks, and its head is the
    identity. The host needs memory for the adapters, and for one file that is written.

    Args:
      dtype: of the weights in the files, float32 or bfloat16.
      target: location of the target, by default that in the bundle; needed for adapters or a frozen AR.
      schema: version of the sidecars; 1 is for older readers.
      shard_bytes: maximum size of a file of weights.

    Raises UserError for norm-matched injection and for a learned affine map that is not the identity (the
    format cannot express them), for a tensor that is not finite, and if a directory exists.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    places = new_places(out)
    meta = bundle.read_sidecar(directory)
    if bundle.injection(meta) != "replace":
        raise UserError(
            f"{directory}: AV uses {bundle.injection(meta)} injection, which the official format cannot "
            "express; train with config.av.injection=replace to export"
        )
    cfg = LMConfig.of_plain(meta["lm"])
    path, own = None, bundle.tokenizer_dir(directory, meta)
    frozen = bundle.ar_kind(meta) == "frozen"
    if own is None or meta["roles"]["av_rank"] or meta["roles"]["ar_rank"] or frozen:
        path = weights.resolve(target or meta["base_checkpoint"])
        bundle.check_target(directory, meta, path, weights.read_config(path))
    tok = tok_lib.load(own or path)
    trees = bundle.open_trees(directory, meta, cfg)
    refuse_affine(directory, trees["av"])
    short = cfg.first_blocks(meta["extraction"]["layer_index"] + 1)
    written = dataclasses.replace(short, tied=True)
    hf_write.family_of(places["ar"], written)  # a refusal comes before minutes of work
    av = merge_adapters(trees["av"], path, cfg)
    ar = merge_adapters(trees["ar"], path, short, ("final_norm", "lm_head"))
    ar["final_norm"] = np.ones(cfg.d_model, np.float32)
    head = np.eye(cfg.d_model) if frozen else trees["ar"]["head"].whole()
    head = np.ascontiguousarray(head.T, np.dtype(dtype))
    with paths.upload_after(places["av"]) as av_place, paths.upload_after(places["ar"]) as ar_place:
        hf_write.save_hf(av_place, cfg, av, dtype, shard_bytes)
        hf_write.save_hf(ar_place, written, ar, dtype, shard_bytes)
        hf_write.save_tensors(ar_place / HEAD, {"weight": head})
        write_the_rest(directory, {"av": av_place, "ar": ar_place}, meta, tok, schema)
    return places["av"], places["ar"]


def new_places(out: str | Path) -> dict[str, Path]:
    """Return {"av": OUT/av, "ar": OUT/ar}. Raises UserError if one exists, or if OUT is not writable."""
    places = {role: paths.path(out) / role for role in ("av", "ar")}
    for place in places.values():
        if place.exists():
            raise UserError(f"{place} exists; choose another --out, or delete it")
    writable.check_directory(out)
    return places


def write_the_rest(directory, places: dict, meta: dict, tok, schema: int, injection: str = "") -> None:
    """Write tokenizers, sidecars and cards of the bundle in `directory`.

    injection: of an adapter's sidecars; a whole model's do not have it."""
    eos = {"eos_token_id": tok_lib.eos_ids(tok), "pad_token_id": tok.pad_token_id}
    hf_write.write_json(places["av"] / "generation_config.json", eos)
    tok_lib.save(tok, places["av"])
    tok.padding_side = "right"
    tok_lib.save(tok, places["ar"])
    run = run_summary.read_summary(paths.path(directory), meta) or meta.get("run")
    for role, place in places.items():
        sidecar = dataclasses.replace(
            _official(role, meta), injection=injection,
            enable_thinking=False if thinking.is_off(tok.chat_template or "") else None)
        model_sidecar.save(place, sidecar, schema)
        card = model_card.write(meta | ({"run": run} if run else {}), role, adapter=bool(injection))
        paths.write(place / model_card.FILE, card)


def refuse_affine(directory: str | Path, av: dict) -> None:
    inject = {name: a.whole() for name, a in av.get("inject", {}).items()}
    if inject and not (np.array_equal(inject["w"], np.eye(len(inject["b"]))) and not inject["b"].any()):
        raise UserError(
            f"{directory}: AV has a learned affine map before injection, which the official format cannot "
            "express; train with config.av.affine=none to export"
        )


def _official(role: str, meta: dict) -> ModelSidecar:
    """Convert our sidecar to the official one of this role."""
    extraction, said = meta["extraction"], meta["tokens"]
    ids = {k: v for k, v in said.items() if k != "critic_suffix_ids"}
    texts = {r: sidecar_common.to_official_template(r, meta["prompt_templates"][r]) for r in ("av", "ar")}
    settings = {k: meta["training"][k] for k in ("seed", "kl_estimator") if k in meta.get("training", {})}
    ours = {k: meta[k] for k in ("dtype", "max_new_tokens", "mean_direction", "base_fingerprint")}
    ours["activations"] = meta.get("activations")
    return ModelSidecar(
        role=role,
        d_model=meta["d_model"],
        tokens=Tokens(**ids, critic_suffix_ids=tuple(said["critic_suffix_ids"])),
        templates=Templates(**texts),
        injection_scale=float(extraction["injection_scale"]),
        mse_scale=math.sqrt(meta["d_model"]),
        layer=extraction["layer_index"],
        stage=meta["stage"],
        base_checkpoint=meta["base_checkpoint"],
        more={"training": settings, OURS: ours},
    )
