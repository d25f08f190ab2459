"""Export a bundle of adapters as two PEFT adapters, which `peft` loads onto the target."""

import json
from pathlib import Path

import numpy as np

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import export_pair, model_sidecar
from nla_jax.lm import lora, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_read, hf_write, peft_config, peft_read
from nla_jax.util import lazy_params, paths, writable


def export_adapters(
    directory: str | Path, out: str | Path, *, target: str = "", base: str = "",
    schema: int = model_sidecar.NEWEST,
) -> tuple[Path, Path]:
    """Write a bundle as the PEFT adapters OUT/av and OUT/ar, with sidecars, tokenizer and AR's head.

    `peft.PeftModel.from_pretrained(model, OUT/av)` loads them onto the target; AR's adapter has blocks 0..K,
    and its head, a matrix [D, D], is in value_head.safetensors. A frozen AR is an adapter of zeros.

    Args:
      target: location of the target; by default that in the bundle.
      base: the target's name in adapter_config.json, such as a Hub id. "": the location.
      schema: as in `export_pair.export_pair`.

    Raises UserError if AV or AR has no adapter (export it as a whole model), for a learned affine map that is
    not the identity, for a target that transformers lacks, and if a directory exists.
    """
    places = {role: paths.path(out) / role for role in ("av", "ar")}
    for place in places.values():
        if place.exists():
            raise UserError(f"{place} exists; choose another --out, or delete it")
    writable.check_directory(out)
    meta = bundle.read_sidecar(directory)
    cfg, frozen = LMConfig.of_plain(meta["lm"]), bundle.ar_kind(meta) == "frozen"
    for role in ("av", "ar"):
        if not meta["roles"][f"{role}_rank"] and not (role == "ar" and frozen):
            raise UserError(f"{directory}: {role.upper()} is a whole model and no adapter; leave out "
                            "--adapters to export whole models")
    location = target or meta["base_checkpoint"]
    path = weights.resolve(location)
    bundle.check_target(directory, meta, path, weights.read_config(path))
    tok = tok_lib.load(bundle.tokenizer_dir(directory, meta) or path)
    trees = bundle.open_trees(directory, meta, cfg)
    export_pair.refuse_affine(directory, trees["av"])
    if frozen:
        trees["ar"] = _zeros(cfg, meta["extraction"]["layer_index"])
    names = _names(path, cfg)
    head = np.ascontiguousarray(trees["ar"]["head"].whole().T, np.float32)
    with paths.upload_after(places["av"]) as av_place, paths.upload_after(places["ar"]) as ar_place:
        for place, role in ((av_place, "av"), (ar_place, "ar")):
            place.mkdir(parents=True, exist_ok=True)
            _write_adapter(place, trees[role]["lora"], names, base or location, truncated=role == "ar")
        hf_write.save_tensors(ar_place / peft_read.HEAD, {"weight": head})
        both = {"av": av_place, "ar": ar_place}
        export_pair.write_the_rest(directory, both, meta, tok, schema, bundle.injection(meta))
    return places["av"], places["ar"]


def _zeros(cfg: LMConfig, layer: int) -> dict:
    """Return the tree of an AR that computes what the frozen target computes."""
    factors = {m: {k: np.zeros(lora.table(cfg.first_blocks(layer + 1), 1)[f"{m}/{k}"].shape, np.float32)
                   for k in "ab"} for m in lora.MATRICES}
    wrapped = {m: {k: lazy_params.wrap(a, stacked=True) for k, a in ab.items()} for m, ab in factors.items()}
    return {"lora": wrapped, "head": lazy_params.wrap(np.eye(cfg.d_model, dtype=np.float32), stacked=False)}


def _names(path: Path, cfg: LMConfig) -> dict[str, str]:
    """Return {our matrix: the name of its module in transformers, with "{i}" for the block}."""
    family, _ = hf_write.family_of(path, cfg)
    names = {m: family.hf[f"blocks/{m}"].removesuffix(".weight") for m in lora.MATRICES}
    if path.is_dir() and hf_read.read_config(path)[0].hf_nested:
        # The language model is a part of the class that transformers makes of such a directory.
        names = {m: n.replace("model.", "model.language_model.", 1) for m, n in names.items()}
    return names


def _write_adapter(place: Path, tree: dict, names: dict, base: str, *, truncated: bool) -> None:
    tensors, n_blocks, rank = {}, 0, 0
    for matrix, ab in tree.items():
        for letter, factor in (("A", ab["a"]), ("B", ab["b"])):
            whole = factor.whole()
            n_blocks, rank = len(whole), whole.shape[2 if letter == "A" else 1]
            for i, one in enumerate(whole):
                module = names[matrix].format(i=i)
                name = f"base_model.model.{module}.lora_{letter}.weight"
                tensors[name] = np.ascontiguousarray(one.T, np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # a scale of 1: our factors have none
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted({names[m].rsplit(".", 1)[1] for m in tree}),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        # AR ends with block K; on a whole target, peft then adapts only these.
        **({"layers_to_transform": list(range(n_blocks)), "layers_pattern": "layers"} if truncated else {}),
    }
    hf_write.save_tensors(place / peft_config.WEIGHTS, tensors)
    paths.write(place / peft_config.CONFIG, json.dumps(config, indent=2) + "\n")
