"""Write directories in Hugging Face layout for transformers: config.json and safetensors."""

import json
from functools import partial
from pathlib import Path

import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
import numpy as np
from flax import traverse_util

from nla_jax.errors import UserError
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import hf_layers
from nla_jax.lm.files.families import FAMILIES
from nla_jax.lm.files.family import Family, turn
from nla_jax.lm.files.family_names import HF_KEYS, HF_ROPE
from nla_jax.lm.files.hf_read import parse
from nla_jax.lm.files.regroup import file_name, join, split
from nla_jax.lm.params import blocks_of, table
from nla_jax.util import lazy_params, paths

SHARD_BYTES = 5 << 30


def _write_config(kind: str, family: Family, cfg: LMConfig) -> dict:
    """Return the config.json of `cfg` with the keys that this family has."""
    keys = {**HF_KEYS, **family.hf_keys}
    raw = {"architectures": [family.hf_class], "model_type": kind}
    raw |= {key: getattr(cfg, ours) for key, ours in keys.items()}
    if "query_pre_attn_scalar" in raw:
        raw["query_pre_attn_scalar"] = cfg.query_scalar or cfg.head_dim
    if "partial_rotary_factor" in raw:
        raw["partial_rotary_factor"] = (cfg.rotary_dim or cfg.head_dim) / cfg.head_dim
    raw |= dict(zip(family.hf_experts, cfg.experts, strict=False))
    raw |= {family.hf_experts_if: bool(cfg.experts)} if family.hf_experts_if else {}
    raw |= hf_layers.global_settings(cfg) if family.own_global else {}
    rope, *numbers = cfg.rope_scaling or ("default",)
    scaling = {"rope_type": rope, **dict(zip(HF_ROPE[rope], numbers, strict=True))}
    if family.hf_ropes:
        near = cfg.rope_theta if cfg.local_rope_theta is None else cfg.local_rope_theta
        raw["rope_parameters"] = {
            "full_attention": {**scaling, "rope_theta": raw.pop("rope_theta")},
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        }
    elif cfg.rope_scaling:
        raw["rope_scaling"] = scaling
    local = cfg.local or (False,) * cfg.n_blocks
    listed = "layer_types" in family.hf_windows
    windows = {
        # With layer_types, transformers needs a number even if no block is local.
        "sliding_window": cfg.window or (cfg.max_position if listed else None),
        "use_sliding_window": any(local),
        "max_window_layers": local.index(True) if any(local) else cfg.n_blocks,
        "layer_types": ["sliding_attention" if a else "full_attention" for a in local],
    }
    raw |= {key: windows[key] for key in family.hf_windows if key in windows}
    if family.hf_delta:
        raw |= dict(zip(family.hf_delta, cfg.delta, strict=False))
        kinds = cfg.linear or (False,) * cfg.n_blocks
        raw["layer_types"] = ["linear_attention" if a else "full_attention" for a in kinds]
    written = ("hidden_act", "hidden_activation", "attention_bias", "mlp_bias")
    fixed = {key: family.hf_fixed[key][0] for key in written if key in family.hf_fixed}
    return raw | {key: value for key, value in fixed.items() if value is not None} | family.hf_written


def family_of(where: Path, cfg: LMConfig) -> tuple[Family, dict]:
    """Return the first family whose config.json can express `cfg`, and that config.json."""
    for kind, family in FAMILIES.items():
        if not family.hf_class:
            continue
        raw = _write_config(kind, family, cfg)
        try:
            if parse(where, family, raw) == cfg:
                return family, raw
        except UserError:
            continue
    hint = ""
    if cfg.block_scale and cfg.local and cfg.local[-1]:
        hint = (f" (Gemma 4 cannot end with a local block there, and block {cfg.n_blocks - 1} is one: take a "
                "layer whose block is global, or export adapters)")
    raise UserError(f"{where}: no family of models in transformers computes {cfg}{hint}")


def save_hf(directory, cfg: LMConfig, params: dict, dtype=None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and model.safetensors for transformers, in the first family that fits `cfg`.

    `params` is a tree of arrays, of `lazy_params.Array`, or of both. Every parameter keeps its dtype unless
    `dtype` is given. A model of more than `shard_bytes` is written in several files. One of them is in memory
    at a time, in addition to `params`. Each file is written atomically, config.json last.
    Raises UserError if the shapes of `params` are not those of `cfg`, if no family can express `cfg`, or if
    a tensor is not finite.
    """
    directory = Path(directory)
    flat = {
        k: v if isinstance(v, lazy_params.Array) else lazy_params.wrap(v, k.startswith("blocks/"))
        for k, v in traverse_util.flatten_dict(params, sep="/").items()
    }
    want = {name: spec.shape for name, spec in table(cfg).items()}
    have = {name: array.shape for name, array in flat.items()}
    if want != have:
        names = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
        raise UserError(f"parameters do not fit the configuration: {', '.join(names)}")
    family, config = family_of(directory / "config.json", cfg)
    dtype = np.dtype(dtype) if dtype else None

    def tensor(ours: str, n: int | None) -> np.ndarray:
        one = flat[ours].read(n)
        kept = dtype or one.dtype
        if family.is_offset(ours):
            one = one.astype(np.float32) - np.float32(family.norm_offset)
        with np.errstate(over="ignore"):  # reported when it is written, with the name of the tensor
            return np.ascontiguousarray(one if ours == "embed" else turn(one), kept)

    def tensors(parts) -> dict[str, np.ndarray]:
        named = [split(family.hf[ours].format(i=block), tensor(ours, n)) for ours, n, block in parts]
        return join([pair for pairs in named for pair in pairs])

    together: dict[str, list] = {}  # parts of a fused matrix follow each other in one file
    for ours, array in flat.items():
        for n in array.blocks:
            block = n if n is None else blocks_of(cfg, ours)[n]
            together.setdefault(file_name(family.hf[ours].format(i=block)), []).append((ours, n, block))
    groups, size = [[]], 0
    for parts in together.values():
        arrays = [flat[ours] for ours, *_ in parts]
        bytes_here = sum(a.size // len(a.blocks) * (dtype or a.dtype).itemsize for a in arrays)
        if groups[-1] and size + bytes_here > shard_bytes:
            groups, size = [*groups, []], 0
        groups[-1].append(partial(tensors, parts))
        size += bytes_here
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(directory, groups)
    config["dtype"] = (dtype or flat["embed"].dtype).name
    write_json(directory / "config.json", config)


def _write_tensors(directory: Path, groups: list[list]) -> None:
    """Write model.safetensors, or several files with their index. groups: of each file, functions that return
    {name: tensor}."""
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    names = names if len(groups) > 1 else ["model.safetensors"]
    total, where = 0, {}
    for name, group in zip(names, groups, strict=True):
        tensors = {key: array for make in group for key, array in make().items()}
        save_tensors(directory / name, tensors)
        total += sum(a.nbytes for a in tensors.values())
        where |= dict.fromkeys(tensors, name)
        del tensors  # before the next file's are made
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(directory / "model.safetensors.index.json", index)
        (directory / "model.safetensors").unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file atomically. Raises UserError for a tensor that is not finite."""
    from safetensors.numpy import save_file

    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is not finite as {array.dtype.name}: the run diverged, or the dtype is "
                "too narrow"
            )
    with paths.whole(path) as part:
        save_file(tensors, str(part), metadata={"format": "pt"})


def write_json(path: Path, value: dict) -> None:
    paths.write(path, json.dumps(value, indent=2) + "\n")
