"""Import a released pair, two Hugging Face directories with sidecars, as a bundle; and export one.

AV, AR or both may be PEFT adapters of the target (`peft_config`, `peft_read`)."""

import dataclasses
import math
from pathlib import Path

from nla_jax import bundle, prompts, specs
from nla_jax.errors import UserError, short_repr
from nla_jax.evaluate import distribution
from nla_jax.interchange import model_sidecar, sidecar_common
from nla_jax.interchange.export_pair import DTYPES, OURS, export_pair
from nla_jax.interchange.model_sidecar import ModelSidecar
from nla_jax.lm import pair_files, thinking, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import peft_config
from nla_jax.util import checkpoint, paths, writable

__all__ = ["export_pair", "import_pair"]

MAX_NEW = 150  # the release's cap on an answer in tokens, if a pair has none
LOOSE = ("tied", "max_position")  # fields in which an AV or AR may differ from its target


def import_pair(
    av_dir: str | Path,
    ar_dir: str | Path,
    out: str | Path,
    *,
    target: str = "",
    mean_from: str | Path = "",
    dtype: str = "",
    max_new: int = 0,
    injection: str = "",
) -> Path:
    """Write a released pair as a bundle, which `nla_jax.load` opens and from which training can start.

    Prompts, marker and scale are those of the sidecars. Parameters are copied in their dtype. The host needs
    memory for two tensors of a file.

    Args:
      av_dir, ar_dir: directories of the release, or Hub ids.
      out: the bundle's directory, which must not exist. The rest of a killed import is overwritten.
      target: the model whose activations the pair explains: a directory, file or Hub id. "": the
        AV sidecar's base_checkpoint.
      mean_from: a store of activations of that target and layer, whose warm rows give the mean
        direction. "": that of the sidecar if nla_jax exported it, or else none. Without one, an evaluation
        uses the mean of its store.
      dtype: of matrix products, float32 or bfloat16. "": as exported, or bfloat16.
      max_new: cap on an answer in tokens. 0: as exported, or 150.
      injection: "replace" or "norm_matched", for adapters whose sidecar does not say which; "" otherwise.

    Raises UserError if a file is missing, damaged or not finite, if the sidecars disagree, if a tokenizer
      renders other ids than the sidecars', if architecture, width or layer are not the target's, if a scale
      is null, or if an adapter has a setting that is not supported.
    """
    out = paths.path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not is_half_written(out):
        raise UserError(f"{out} exists; choose another --out, or delete it")
    writable.check_directory(out)
    av_dir, ar_dir = weights.resolve(str(av_dir)), weights.resolve(str(ar_dir))
    meta, tok = read_pair(av_dir, ar_dir, target=target, mean_from=mean_from, dtype=dtype, max_new=max_new,
                          injection=injection)
    trees = pair_files.open_trees(av_dir, ar_dir, LMConfig.of_plain(meta["lm"]),
                                  meta["extraction"]["layer_index"], meta["base_checkpoint"])[0]
    try:
        bundle.save(out, meta, trees["av"], trees["ar"], tok)
    except Exception:  # `save` reads the weights for the first time, and may find damage
        paths.remove(out)
        raise
    return out


def read_pair(
    av_dir: Path,
    ar_dir: Path,
    *,
    target: str = "",
    mean_from: str | Path = "",
    dtype: str = "",
    max_new: int = 0,
    injection: str = "",
) -> tuple[dict, object]:
    """Return the sidecar of a bundle of this pair, and its tokenizer. Of weights, only adapters are read.

    Arguments and errors are those of `import_pair`. A target that is not found is also an error.
    """
    places = {"av": av_dir, "ar": ar_dir}
    adapters = {role: peft_config.read(p) for role, p in places.items() if peft_config.is_adapter(p)}
    av, ar = _read_sidecars(av_dir, ar_dir, adapters, injection)
    uri = target or av.base_checkpoint or next((s.base for s in adapters.values() if s.base), "")
    if not uri:
        raise UserError(f"{av_dir}: its sidecar names no base_checkpoint; give the target with --target")
    try:
        path = weights.resolve(uri)
    except UserError as e:
        if target:
            raise
        raise UserError(f"{av_dir}: its sidecar says that it explains the model {uri}, which is not at hand "
                        f"({e}); give that model's directory with --target") from e
    cfg = weights.read_config(path)
    layer = _check_architecture(path, cfg, av_dir, av, ar_dir, ar, adapters)
    _, ranks = pair_files.open_trees(av_dir, ar_dir, cfg, layer, uri)
    extra = _our_block(av_dir, av)
    settings = {
        "dtype": dtype or extra.get("dtype", "bfloat16"),
        "max_new": max_new or extra.get("max_new_tokens", MAX_NEW),
    }
    mean_D, known = extra.get("mean_direction"), extra.get("activations")
    if mean_from:
        mean_D, known = distribution.of_store(mean_from, weights.fingerprint(path), layer)
    tok, spec, templates = _prompts(cfg, layer, settings["dtype"], av_dir, av, ar_dir, ar)
    meta = specs.sidecar(
        spec,
        target=uri,
        target_path=path,
        av_rank=ranks["av"],
        ar_rank=ranks["ar"],
        affine=False,
        marker=av.tokens.injection_char,
        av_template=templates[0],
        ar_template=templates[1],
        stage="imported",
        max_new=settings["max_new"],
        mean_D=mean_D,
        training={"imported": {s.role: {"stage": s.stage, **_official_keys(s)} for s in (av, ar)}},
    ) | {"activations": known}
    return meta, tok


def _read_sidecars(av_dir: Path, ar_dir: Path, adapters: dict, injection: str):
    """Return both `ModelSidecar`s. Raises UserError if they disagree or leave out what an import needs."""
    av, ar = (model_sidecar.load(p, role if role in adapters else "")
              for role, p in (("av", av_dir), ("ar", ar_dir)))
    for directory, sidecar, role in ((av_dir, av, "av"), (ar_dir, ar, "ar")):
        if sidecar.role != role:
            name = sidecar.role
            raise UserError(f"{directory} is the {name.upper()} of a pair; give it with --{name}")
    model_sidecar.check_agreement(av_dir, av, ar_dir, ar)
    if "av" in adapters and not (injection or av.injection):
        raise UserError(
            f"{av_dir}: an adapter, whose sidecar does not say how h enters the model; give --injection "
            "norm_matched (EasyNLA's adapters) or replace"
        )
    if injection and av.injection not in ("", injection):
        raise UserError(f"{av_dir}: its sidecar says injection {av.injection}, not {injection}")
    if injection == "norm_matched" and not av.injection:
        # The trainer of such adapters adds h at the residual's own norm, whatever the sidecar's scale.
        av, ar = (dataclasses.replace(s, injection=injection, injection_scale=1.0) for s in (av, ar))
    if av.injection_scale is None:
        raise UserError(
            f"{av_dir}: injection_scale is null: injection of raw vectors is not supported; set the norm "
            "that this AV was trained with"
        )
    if av.mse_scale is None or ar.mse_scale is None:
        where = ar_dir if ar.mse_scale is None else av_dir
        raise UserError(
            f"{where}: mse_scale is null: an AR trained on raw vectors is not supported, because nla_jax "
            "compares directions only"
        )
    for role in ("av", "ar"):
        if not (getattr(av.templates, role) or getattr(ar.templates, role)):
            raise UserError(f"neither {av_dir} nor {ar_dir} has the {role} template in its sidecar")
    return av, ar


def _check_architecture(path: Path, cfg: LMConfig, av_dir: Path, av, ar_dir: Path, ar, adapters) -> int:
    """Return K. Raises UserError unless target, AV, AR and sidecars have the same architecture.

    An adapter has the architecture of its base."""
    layer = next((k for k in (ar.layer, av.layer) if k is not None), None)
    if layer is None and "ar" in adapters:
        raise UserError(f"{ar_dir}: its sidecar names no layer, and an adapter does not have one: add "
                        "extraction_layer_index to the sidecar")
    av_cfg = cfg if "av" in adapters else weights.read_config(av_dir)
    ar_cfg = weights.read_config(ar_dir) if "ar" not in adapters else cfg.first_blocks(layer + 1)
    layer = ar_cfg.n_blocks - 1 if layer is None else layer
    if ar_cfg.n_blocks != layer + 1:
        raise UserError(
            f"{ar_dir} has {ar_cfg.n_blocks} blocks but its sidecar says layer {layer}: an AR has {layer + 1}"
        )
    if layer >= cfg.n_blocks:
        raise UserError(f"{ar_dir}: layer {layer}, but {path} has blocks 0 to {cfg.n_blocks - 1}")
    for directory, found, wanted in ((av_dir, av_cfg, cfg), (ar_dir, ar_cfg, cfg.first_blocks(layer + 1))):
        a, b = dataclasses.asdict(found), dataclasses.asdict(wanted)
        for key in a:
            if key not in LOOSE and a[key] != b[key]:
                left, right = short_repr(a[key]), short_repr(b[key])
                raise UserError(
                    f"{directory} and its target {path} are different architectures: {key} is {left} in the "
                    f"first and {right} in the second; is this the right --target?"
                )
    if av.d_model != cfg.d_model:
        raise UserError(f"{av_dir}: d_model is {av.d_model} in the sidecar and {cfg.d_model} in config.json")
    return layer


def _prompts(cfg, layer: int, dtype: str, av_dir: Path, av, ar_dir: Path, ar):
    """Return (tokenizer, Spec, our two templates). Raises UserError unless both tokenizers render the prompts
    to the sidecars' ids."""
    tok, ar_tok = tok_lib.load(av_dir), tok_lib.load(ar_dir)
    if tok.get_vocab() != ar_tok.get_vocab():
        raise UserError(f"the tokenizers in {av_dir} and {ar_dir} have different vocabularies")
    if av.enable_thinking:
        raise UserError(f"{av_dir}: AV's prompt has thinking on (chat_template_kwargs), which is unsupported")
    # EasyNLA's trainer, which norm-matched adapters come from, renders AV's prompt without thinking.
    if isinstance(tok.chat_template, str) and (
            av.enable_thinking is False or av.injection == "norm_matched"):
        tok.chat_template = thinking.switch_off(tok.chat_template)
    av_text = av.templates.av or ar.templates.av
    ar_text = ar.templates.ar or av.templates.ar
    templates = [
        sidecar_common.to_our_template(av_dir, "av", av_text),
        sidecar_common.to_our_template(ar_dir, "ar", ar_text),
    ]
    suffix = ar.tokens.critic_suffix_ids or av.tokens.critic_suffix_ids
    if not suffix:  # the official code also drops the first token, which may merge with the explanation
        suffix = tuple(tok_lib.inner_ids(ar_tok, templates[1].split("{explanation}")[1])[1:])
    sidecars = f"{av_dir / model_sidecar.NAME} and the tokenizer in its directory"
    try:
        spec = specs.make_spec(
            cfg, tok, layer=layer, dtype=dtype, alpha=av.injection_scale, marker=av.tokens.injection_char,
            av_template=templates[0], ar_template=templates[1], n_suffix=len(suffix),
            injection=av.injection or "replace",
        )
        wrong = specs.first_difference(
            spec, dataclasses.asdict(av.tokens) | {"critic_suffix_ids": list(suffix)}
        )
        if not wrong:
            sidecars = f"{ar_dir / model_sidecar.NAME} and the tokenizer in its directory"
            other = prompts.ar_prompt(ar_tok, templates[1], len(suffix))
            if (other.before, other.after) != (spec.ar.before, spec.ar.after):
                wrong = f"the AR prompt is {other.before} … {other.after}, with the AV's {spec.ar.before} …"
    except UserError as e:
        wrong = str(e)
    if wrong:
        raise UserError(f"{sidecars} do not belong together: {wrong}")
    return tok, spec, templates


def _official_keys(found: ModelSidecar) -> dict:
    return {k: v for k, v in found.more.items() if k != OURS}


def _our_block(directory: Path, av: ModelSidecar) -> dict:
    """Return our own block of an exported sidecar, {} if it has none."""
    where = f"{directory / model_sidecar.NAME}: {OURS}"
    block = sidecar_common.get(directory / model_sidecar.NAME, av.more, OURS, dict, {})
    found = {}
    if "dtype" in block:
        found["dtype"] = sidecar_common.get(where, block, "dtype", str)
        if found["dtype"] not in DTYPES:
            raise UserError(f"{where}: dtype is {found['dtype']!r}, not one of {', '.join(DTYPES)}")
    if "max_new_tokens" in block:
        found["max_new_tokens"] = sidecar_common.count(where, block, "max_new_tokens")
    mean = sidecar_common.get(where, block, "mean_direction", (list, type(None)), None)
    if mean is not None:
        if len(mean) != av.d_model or not all(type(x) is float and math.isfinite(x) for x in mean):
            raise UserError(f"{where}: mean_direction is not {av.d_model} finite numbers")
        found["mean_direction"] = mean
        found["activations"] = distribution.checked(block.get("activations"), where)
    return found


def is_half_written(directory: Path) -> bool:
    """Return whether a directory contains only the files of a killed `bundle.save`."""
    names = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    begun = {f"params{checkpoint.UNFINISHED}"} & names or (directory / "params" / "_METADATA").exists()
    return bool(begun) and names <= {"params", f"params{checkpoint.UNFINISHED}", "tokenizer"}
