"""Read directories in Hugging Face layout: config.json and safetensors."""

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np

from nla_jax.errors import UserError, join_faults, one_line, short_repr
from nla_jax.lm.config import LMConfig, make_config
from nla_jax.lm.files import hf_layers
from nla_jax.lm.files.families import FAMILIES
from nla_jax.lm.files.family import Family, Tensor, plus
from nla_jax.lm.files.family_names import (
    HF_DEFAULTS,
    HF_GLOBAL,
    HF_HARMLESS,
    HF_HARMLESS_NESTED,
    HF_KEYS,
    HF_READ,
    HF_ROPE,
)
from nla_jax.lm.files.regroup import regroup

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as err:
        raise UserError(f"{path} does not exist: give a Hugging Face directory or a .gguf") from err
    except (OSError, ValueError, RecursionError) as err:
        raise UserError(f"cannot read {path}: {one_line(err)}") from err
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")  # peft's names


def _refuse_adapter(path: Path) -> None:
    """Raise UserError for an adapter that is not merged: the weights beside it would be read without it."""
    if found := [name for name in ADAPTER if (path / name).is_file()]:
        raise UserError(
            f"{path} has an adapter that is not merged ({found[0]}), and would be read without it: merge it "
            "by `peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)`,"
            " save the tokenizer in NEW and give NEW; to read the base alone, move adapter_* elsewhere"
        )


def read_config(path: Path) -> tuple[Family, LMConfig]:
    """Read the architecture. Raises UserError for one that this code cannot compute exactly, and for an
    adapter."""
    _refuse_adapter(path)
    where, raw = path / "config.json", _read_json(path / "config.json")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {short_repr(kind)} is not supported (supported: {', '.join(FAMILIES)})"
        )
    family = FAMILIES[kind]
    return family, parse(where, family, _text_part(where, family, raw) if family.hf_nested else raw)


def _text_part(where: Path, family: Family, raw: dict) -> dict:
    """Return the language model's settings from the configuration of a vision-language model."""
    _refuse_unknown(where, raw, HF_HARMLESS_NESTED | set(family.hf_harmless), family, {})
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{where} is incomplete: text_config is {short_repr(text)}")
    # transformers reads tie_word_embeddings from the outer configuration.
    tied = raw.get("tie_word_embeddings", family.hf_defaults.get("tie_word_embeddings", False))
    return {**text, "tie_word_embeddings": tied}


def _refuse_unknown(where: Path, raw: dict, known, family: Family, fixed: dict) -> None:
    """Raise UserError for a setting that is neither known, nor falsy, nor at a supported value."""
    for key, value in raw.items():
        if key in known or key in HF_HARMLESS or key.startswith("_"):
            continue
        fits = value in fixed[key] if key in fixed else not value
        if not fits:
            hint = family.hf_hints.get(key, "")
            raise UserError(f"{where}: {one_line(key)} = {short_repr(value)} is not supported{hint}")


def parse(where: Path, family: Family, raw: dict) -> LMConfig:
    """Return the LMConfig of a config.json. Raises UserError for unknown and missing settings."""
    for other, key in family.hf_aliases.items():
        if raw.get(key, raw.get(other)) != raw.get(other, raw.get(key)):
            raise UserError(f"{where}: {other} and {key} differ: leave one of them out")
    raw = {family.hf_aliases.get(key, key): value for key, value in raw.items()}
    if not raw.keys() & {"rope_parameters", "rope_scaling"} and "rope_parameters" in family.hf_defaults:
        raw["rope_parameters"] = family.hf_defaults["rope_parameters"]
    rope, rest = _rope(where, family, raw)
    known = {*HF_READ, *HF_KEYS, *family.hf_keys, *family.hf_windows, *family.hf_experts, *family.hf_delta,
             *family.hf_harmless, *(HF_GLOBAL if family.own_global else ())} | {family.hf_experts_if} - {""}
    missing = {key: value for key, value in family.hf_defaults.items() if key in family.hf_fixed}
    _refuse_unknown(where, {**missing, **raw, **rest}, known, family, family.hf_fixed)
    raw = {**HF_DEFAULTS, **family.hf_defaults, **raw}
    if "partial_rotary_factor" in rest:
        raw["partial_rotary_factor"] = rest["partial_rotary_factor"]
    try:
        values = {ours: raw[key] for key, ours in {**HF_KEYS, **family.hf_keys}.items()}
        values |= {**rope, **family.lm}
        values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
        values["head_dim"] = values["head_dim"] or values["d_model"] // values["n_heads"]
        for theta in {"rope_theta", "local_rope_theta"} & values.keys():
            values[theta] = float(values[theta])
        if "rotary_dim" in values:
            values["rotary_dim"] = hf_layers.rotary_dim(values["head_dim"], values["rotary_dim"])
        if family.hf_experts and (not family.hf_experts_if or raw[family.hf_experts_if]):
            values |= {"experts": tuple(raw[key] for key in family.hf_experts), **family.hf_experts_lm}
        if values.get("query_scalar") == values["head_dim"]:
            values["query_scalar"] = None
        window, local = hf_layers.windows(where, family, raw)
        values |= hf_layers.linear(where, family, raw)
        values |= hf_layers.global_heads(where, family, raw, local)
        if family.hf_ropes:
            near, scaled = values.get("local_rope_theta", values["rope_theta"]), "rope_scaling" in rope
            own = any(local) and (scaled or near != values["rope_theta"])
            values["local_rope_theta"] = near if own else None
    except (KeyError, TypeError, ValueError, ArithmeticError) as err:
        raise UserError(f"{where} is incomplete: {one_line(err)}") from err
    return make_config(where, **values, window=window, local=local)


def _rope(where: Path, family: Family, raw: dict) -> tuple[dict, dict]:
    """Read the rotary embedding: (fields of LMConfig, unknown settings).

    transformers 5 has all settings in `rope_parameters`, with one block per kind of layer if there
    are two bases. transformers 4 had the bases at the top level and the rest in `rope_scaling`.
    """
    keys = [k for k in ("rope_parameters", "rope_scaling") if raw.get(k)]
    if len(keys) == 2 and raw[keys[0]] != raw[keys[1]]:
        raise UserError(f"{where}: {keys[0]} and {keys[1]} differ: leave one of them out")
    if not keys:
        return {}, {}
    key = keys[0]
    found, two_bases = raw[key], family.hf_ropes or "local_rope_theta" in family.hf_keys.values()
    if not isinstance(found, dict):
        raise UserError(f"{where}: {key} = {short_repr(found)} is not supported")
    if not (two_bases and key == "rope_parameters"):
        return _read_rope_block(where, family, key, found)
    values, rest = _read_rope_block(where, family, key, found.get("full_attention") or {})
    near, more = _read_rope_block(where, family, key, found.get("sliding_attention") or {})
    if "rope_theta" in near:
        values["local_rope_theta"] = near.pop("rope_theta")
    others = {k: v for k, v in found.items() if k not in ("full_attention", "sliding_attention")}
    return values, rest | {f"{key}: {k}": v for k, v in (others | more | near).items()}


def _read_rope_block(where: Path, family: Family, key: str, block: dict) -> tuple[dict, dict]:
    """Read one block of rotary settings, as `_rope`."""
    if not isinstance(block, dict):
        raise UserError(f"{where}: {key} holds {short_repr(block)}, not the settings of a kind of layer")
    block, values = dict(block), {}
    given = [block.pop("rope_type", "default"), block.pop("type", "default")]
    kinds = [kind for kind in given if kind != "default"] or ["default"]
    kind = kinds[0]
    if kind not in family.hf_rope_types or kinds.count(kind) < len(kinds):
        raise UserError(f"{where}: {key} with rope_type {short_repr(kind)} is not supported")
    if kind == "yarn":
        _complete_yarn(block)
    try:
        numbers = [block.pop(name) for name in HF_ROPE[kind]]
    except KeyError as err:
        raise UserError(f"{where}: {key} with rope_type {kind!r} has no {err}") from err
    if not all(type(n) in (int, float) and n > 0 for n in numbers):
        raise UserError(f"{where}: {key} with rope_type {kind!r} has numbers {short_repr(numbers)}")
    if numbers:
        values["rope_scaling"] = (kind, *numbers)
    if "rope_theta" in block:
        values["rope_theta"] = block.pop("rope_theta")
    return values, block


def _complete_yarn(block: dict) -> None:
    """Add transformers' values of missing numbers to the settings of YaRN."""
    block["beta_fast"], block["beta_slow"] = block.get("beta_fast") or 32, block.get("beta_slow") or 1
    factor = block.get("factor")
    if block.get("attention_factor") is None and type(factor) in (int, float) and 0 < factor < math.inf:
        block["attention_factor"] = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    if block.get("truncate") is True:
        del block["truncate"]


def _shards(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as err:
        raise UserError(f"{index} has no usable weight_map") from err
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise UserError(
                f"{index} names {short_repr(name)}, which is not a safetensors file in its directory"
            )
    return [path / name for name in names]


def read_tensors(
    path: Path, family: Family, cfg: LMConfig, without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return the tensors of all shards by the family's names, with the norm offset added.

    Ignored tensors, the parameters `without`, and the head of a tied model are left out. Raises UserError for
    damaged or missing shards, duplicate tensors, and dtypes that are not floating point.
    """
    import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
    import safetensors

    tensors, wrong = {}, []
    dropped = {family.hf[name] for name in without}
    for shard in _shards(path):
        try:
            file = safetensors.safe_open(str(shard), framework="np")
        except (safetensors.SafetensorError, OSError) as err:
            raise UserError(
                f"{shard} is missing or damaged ({one_line(err)}): download it again"
            ) from err
        for name in file.keys():
            if any(re.fullmatch(pattern, name) for pattern in family.hf_ignored):
                continue
            ours = name
            for pattern, replacement in family.hf_renamed:
                ours = re.sub(pattern, replacement, ours)
            if ours in dropped:
                continue
            if ours in tensors:
                wrong.append(f"{one_line(name)} is in two shards")
            view = file.get_slice(name)
            if view.get_dtype() not in FLOATS:
                wrong.append(f"{one_line(name)} has type {view.get_dtype()}, not one of {', '.join(FLOATS)}")
                continue
            tensors[ours] = Tensor(
                tuple(view.get_shape()), partial(file.get_tensor, name), view.__getitem__,
                np.dtype(FLOATS[view.get_dtype()]),
            )
    if wrong:
        raise UserError(f"{path}: " + join_faults(wrong))
    tensors = regroup(path, cfg, family.hf, tensors, family.hf_others)
    if cfg.tied:
        head, embed = tensors.pop(family.hf["lm_head"], None), tensors.get(family.hf["embed"])
        if head and embed and not equal(head, embed):
            raise UserError(
                f"{path}: {family.hf['lm_head']} differs from the embedding although config.json "
                "says tie_word_embeddings: set that to false"
            )
    if family.norm_offset:
        norms = [theirs for ours, theirs in family.hf.items() if family.is_offset(ours)]
        for name in {n.format(i=i) for n in norms for i in range(cfg.n_blocks)} & tensors.keys():
            tensors[name] = plus(tensors[name], family.norm_offset)
    return tensors


def equal(a: Tensor, b: Tensor, rows: int = 8192) -> bool:
    """Return whether two tensors of files are equal; `rows` rows are read at a time."""
    if a.shape != b.shape or not a.shape:
        return a.shape == b.shape and np.array_equal(a.read(), b.read())
    parts = [(slice(i, min(i + rows, a.shape[0])),) for i in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.part(p), b.part(p)) for p in parts)
