"""Export a bundle of adapters as two PEFT adapters, which `peft` loads onto the target."""

import json
from pathlib import Path

import numpy as np

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import export_pair, model_sidecar
from nla_jax.lm import lora, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_read, hf_write, peft_config, peft_read
from nla_jax.lm.files.regroup import file_name
from nla_jax.util import lazy_params, paths


def export_adapters(
    directory: str | Path, out: str | Path, *, target: str = "", base: str = "",
    schema: int = model_sidecar.NEWEST,
) -> tuple[Path, Path]:
    """Write a bundle as the PEFT adapters OUT/av and OUT/ar, with sidecars, tokenizer and AR's head.

    `peft.PeftModel.from_pretrained(model, OUT/av)` loads them onto the target; AR's adapter has blocks 0..K,
    and its head, a matrix [D, D], is in value_head.safetensors. A frozen AR is an adapter of zeros. The
    adapters of matrices that transformers fuses become one, of their common rank if their first factors are
    equal, and else of the sum of their ranks.

    Args:
      target: location of the target; by default that in the bundle.
      base: the target's name in adapter_config.json, such as a Hub id. "": the location.
      schema: as in `export_pair.export_pair`.

    Raises UserError if AV or AR has no adapter (export it as a whole model), for a learned affine map that is
    not the identity, for a target that transformers lacks, and if a directory exists.
    """
    places = export_pair.new_places(out)
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
            modules = _modules(cfg, trees[role]["lora"], names)
            n_blocks = meta["extraction"]["layer_index"] + 1 if role == "ar" else None
            _write_adapter(place, modules, base or location, n_blocks)
        hf_write.save_tensors(ar_place / peft_read.HEAD, {"weight": head})
        both = {"av": av_place, "ar": ar_place}
        export_pair.write_the_rest(directory, both, meta, tok, schema, bundle.injection(meta))
    return places["av"], places["ar"]


def _zeros(cfg: LMConfig, layer: int) -> dict:
    """Return the tree of an AR that computes what the frozen target computes."""
    specs = lora.table(cfg.first_blocks(layer + 1), 1)
    factors = params_lib.nest({
        name: lazy_params.wrap(np.zeros(spec.shape, np.float32), stacked=True) for name, spec in specs.items()
    })
    return {"lora": factors, "head": lazy_params.wrap(np.eye(cfg.d_model, dtype=np.float32), stacked=False)}


def _names(path: Path, cfg: LMConfig) -> dict[str, str]:
    """Return {our matrix: the name of its module in transformers, with "{i}" for the block}.

    Matrices of a fused module have one name, and are in the order of its rows."""
    family, _ = hf_write.family_of(path, cfg)
    names = {m: file_name(theirs).removesuffix(".weight") for ours, theirs in family.hf.items()
             if (m := ours.removeprefix("blocks/")) in lora.matrices(cfg)}
    if path.is_dir() and hf_read.read_config(path)[0].hf_nested:
        # The language model is a part of the class that transformers makes of such a directory.
        names = {m: n.replace("model.", "model.language_model.", 1) for m, n in names.items()}
    return names


def _modules(cfg: LMConfig, tree: dict, names: dict) -> dict[str, tuple]:
    """Return {(name of a module, as in `_names`; blocks that have it): (A [L, r, in], B [L, out, r])}."""
    found: dict[tuple, list[str]] = {}
    for matrix in (m for m in names if m in tree):
        found.setdefault((names[matrix], params_lib.blocks_of(cfg, matrix)), []).append(matrix)
    return {key: _join([tree[m] for m in parts]) for key, parts in found.items()}


def _join(parts: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two factors of a module from those of its matrices, exactly."""
    a, b = ([ab[k].whole().swapaxes(1, 2).astype(np.float32) for ab in parts] for k in "ab")
    if all(np.array_equal(a[0], other) for other in a[1:]):
        return a[0], np.concatenate(b, 1)
    rank, size = sum(x.shape[1] for x in a), sum(x.shape[1] for x in b)
    joined, row, column = np.zeros((len(a[0]), size, rank), np.float32), 0, 0
    for x in b:
        joined[:, row : row + x.shape[1], column : column + x.shape[2]] = x
        row, column = row + x.shape[1], column + x.shape[2]
    return np.concatenate(a, 1), joined


def _write_adapter(place: Path, modules: dict, base: str, n_blocks: int | None) -> None:
    """Write the files of one adapter of `_modules`. n_blocks: of an AR, and None for AV."""
    tensors, ranks = {}, {}
    for (module, blocks), factors in modules.items():
        ranks[module.rsplit(".", 1)[1]] = factors[0].shape[1]
        for letter, factor in zip("AB", factors, strict=True):
            for i, one in zip(blocks, factor, strict=False):  # AR has the first blocks only
                name = f"base_model.model.{module.format(i=i)}.lora_{letter}.weight"
                tensors[name] = np.ascontiguousarray(one)
    rank = min(ranks.values())
    others = {end: r for end, r in ranks.items() if r != rank}  # fused modules
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
        "target_modules": sorted(ranks),
        "modules_to_save": None,
        "rank_pattern": others,
        "alpha_pattern": others,
        # AR ends with block K; on a whole target, peft then adapts only these.
        **({"layers_to_transform": list(range(n_blocks)), "layers_pattern": "layers"} if n_blocks else {}),
    }
    hf_write.save_tensors(place / peft_config.WEIGHTS, tensors)
    paths.write(place / peft_config.CONFIG, json.dumps(config, indent=2) + "\n")
