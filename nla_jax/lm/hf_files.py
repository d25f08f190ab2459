"""Directories in Hugging Face layout: config.json and safetensors, read and written."""

import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np
from flax import traverse_util

from nla_jax.errors import UserError
from nla_jax.lm.config import LMConfig
from nla_jax.lm.formats import FAMILIES, HF_HARMLESS, HF_READ, Family, Tensor, one_line
from nla_jax.lm.params import table

FLOATS = ("F64", "F32", "F16", "BF16")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise UserError(f"{path} does not exist: give a Hugging Face directory or a .gguf") from err
    except (OSError, ValueError) as err:
        raise UserError(f"cannot read {path}: {one_line(err)}") from err
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def read_config(path: Path) -> tuple[Family, LMConfig]:
    """The architecture. Raises UserError for what this code would not compute faithfully."""
    where, raw = path / "config.json", _read_json(path / "config.json")
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {kind!r} is not supported (supported: {', '.join(FAMILIES)})"
        )
    family = FAMILIES[kind]
    rope = _rope(where, raw)
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10_000.0))
    for key, value in {**raw, **rope}.items():
        if key in HF_READ or key in HF_HARMLESS or key.startswith("_"):
            continue
        fits = value in family.hf_fixed[key] if key in family.hf_fixed else not value
        if not fits:
            raise UserError(f"{where}: {key} = {value!r} is not supported")
    try:
        n_heads = raw["num_attention_heads"]
        cfg = LMConfig(
            vocab_size=raw["vocab_size"],
            d_model=raw["hidden_size"],
            n_blocks=raw["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=raw.get("num_key_value_heads") or n_heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // n_heads,
            d_ff=raw["intermediate_size"],
            rope_theta=float(theta),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
            max_position=raw.get("max_position_embeddings", 2048),
        )
    except (KeyError, TypeError, ArithmeticError) as err:
        raise UserError(f"{where} is incomplete: {err}") from err
    return family, cfg


def _rope(where: Path, raw: dict) -> dict:
    """The settings of rotary embedding, which transformers 5 keeps in a block of their own."""
    for key in ("rope_parameters", "rope_scaling"):
        if block := dict(raw.get(key) or {}):
            kinds = [block.pop("rope_type", "default"), block.pop("type", "default")]
            if kinds != ["default", "default"]:
                kind = next(k for k in kinds if k != "default")
                raise UserError(f"{where}: {key} with rope_type {kind!r} is not supported")
            return block
    return {}


def _shards(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{path} has neither model.safetensors nor model.safetensors.index.json")
    try:
        return [path / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as err:
        raise UserError(f"{index} has no usable weight_map") from err


def read_tensors(path: Path, family: Family, cfg: LMConfig) -> dict[str, Tensor]:
    """The tensors of all shards by name, less ignored buffers and the head of a tied model."""
    import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
    import safetensors

    tensors, wrong = {}, []
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
            if name in tensors:
                wrong.append(f"{name} is in two shards")
            view = file.get_slice(name)
            if view.get_dtype() not in FLOATS:
                wrong.append(f"{name} has type {view.get_dtype()}, not one of {', '.join(FLOATS)}")
            tensors[name] = Tensor(tuple(view.get_shape()), partial(file.get_tensor, name))
    if wrong:
        raise UserError(f"{path}: " + "; ".join(wrong))
    if cfg.tied:
        head, embed = tensors.pop(family.hf["lm_head"], None), tensors.get(family.hf["embed"])
        if head and embed and not np.array_equal(head.read(), embed.read()):
            raise UserError(
                f"{path}: {family.hf['lm_head']} differs from the embedding although config.json "
                "says tie_word_embeddings: set that to false"
            )
    return tensors


def save_hf(directory, cfg: LMConfig, params: dict) -> None:
    """Write config.json and model.safetensors for transformers' LlamaForCausalLM.

    Every parameter keeps its dtype. Each file appears whole or not at all.
    Raises UserError when `params` is not exactly what `cfg` asks for.
    """
    from safetensors.numpy import save_file

    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    family, out = FAMILIES["llama"], {}
    want = {name: spec.shape for name, spec in table(cfg).items()}
    have = {name: array.shape for name, array in flat.items()}
    if want != have:
        names = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        raise UserError(f"parameters do not fit the configuration: {', '.join(names)}")
    for ours, array in flat.items():
        for block in range(cfg.n_blocks) if ours.startswith("blocks/") else [None]:
            one = array if block is None else array[block]
            one = one if ours == "embed" else one.T
            out[family.hf[ours].format(i=block)] = np.ascontiguousarray(one)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_blocks,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "max_position_embeddings": cfg.max_position,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": flat["embed"].dtype.name,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / "model.safetensors.part"
    save_file(out, str(part), metadata={"format": "pt"})
    os.replace(part, directory / "model.safetensors")
    part = directory / "config.json.part"
    part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(part, directory / "config.json")
