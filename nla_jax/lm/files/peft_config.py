"""The settings of a PEFT adapter: adapter_config.json, and the meta file of a community AR's adapter."""

import dataclasses
import json
import math
import re
from pathlib import Path

from nla_jax.errors import UserError, short_repr

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# AR's adapter as EasyNLA's trainer saves it: the factors and the head in one file, and a small JSON file.
AR_META, AR_WEIGHTS = "ar_meta.json", "ar_lora_value_head.safetensors"
# Settings that change what an adapter computes -> the values that mean "off". Others are refused by name.
OFF = {
    "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,), "fan_in_fan_out": (False,),
    "bias": ("none",), "layer_replication": (None,), "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,), "target_parameters": (None, []), "use_bdlora": (None, False),
    "arrow_config": (None,), "kasa_config": (None,), "velora_config": (None,), "monteclora_config": (None,),
}
# Initialisations after which the base keeps its weights. The others (pissa, olora, corda, loftq, …) subtract
# the initial adapter from the base, so that the files of the base alone are another model.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an adapter's files say of it.

    base: the model that it adapts: a Hub id or a directory, "" if unknown. rank, alpha: of every module
    without an entry in `ranks` or `alphas`, which map a module's name, or a pattern of its end, to a number.
    rslora: whether the update is scaled by alpha / sqrt(rank) and not by alpha / rank.
    saved: names of modules whose whole weights the adapter has.
    """

    base: str
    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rslora: bool
    saved: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, such as "model.layers.0.self_attn.q_proj"."""
        return _lookup(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's update."""
        rank = self.rank_of(module)
        return _lookup(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _lookup(patterns: dict, module: str, default):
    """Return the number of the first pattern that matches the end of a module's name, as PEFT does."""
    return next((n for p, n in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def is_adapter(directory: str | Path) -> bool:
    """Return whether a local directory contains an adapter, of AV or AR, and not a whole model."""
    return any((Path(directory) / name).is_file() for name in (CONFIG, AR_META))


def read(directory: Path) -> Settings:
    """Read the settings of an adapter. Raises UserError if they are damaged, or if nla_jax does not support
    one of them."""
    path = directory / CONFIG
    if not path.is_file():
        return _read_ar_meta(directory / AR_META)
    raw = _mapping(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {short_repr(kind)}; nla_jax reads LORA adapters only")
    for key, off in OFF.items():
        if key in raw and raw[key] not in off:
            raise UserError(f"{path}: {key} is {short_repr(raw[key])}, which nla_jax does not support; merge "
                            "the adapter into its base with peft's merge_and_unload, and import that")
    start = raw.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise UserError(f"{path}: init_lora_weights is {short_repr(start)}: it changes the base's weights; "
                        "save it with path_initial_model_for_weight_conversion, or merge it")
    saved = raw.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise UserError(f"{path}: modules_to_save is {short_repr(saved)}, not a list of names")
    return Settings(
        base=_text(path, raw, "base_model_name_or_path"),
        rank=_rank(path, "r", raw.get("r")),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
        ranks={p: _rank(path, f"rank_pattern[{p!r}]", n)
               for p, n in _patterns(path, raw, "rank_pattern").items()},
        alphas=_patterns(path, raw, "alpha_pattern"),
        rslora=_flag(path, raw, "use_rslora", False),
        saved=tuple(saved),
    )


def _read_ar_meta(path: Path) -> Settings:
    raw = _mapping(path)
    if raw.get("final_norm_stripped") is False:
        raise UserError(f"{path}: final_norm_stripped is false: this AR reads h behind the final norm, which "
                        "nla_jax does not support")
    return Settings(
        base="",
        rank=_rank(path, "lora_r", raw.get("lora_r")),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha")),
        ranks={},
        alphas={},
        rslora=_flag(path, raw, "use_rslora", True),  # that trainer has no other
    )


def _mapping(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is missing or not valid JSON ({e}): download it again") from e
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return raw


def _patterns(path: Path, raw: dict, key: str) -> dict[str, float]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {short_repr(value)}, not names and numbers")
    for pattern, number in value.items():
        _number(path, f"{key}[{pattern!r}]", number)
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"{path}: {key} has the pattern {pattern!r}, which is invalid ({e})") from e
    return value


def _text(path: Path, raw: dict, key: str) -> str:
    value = raw.get(key) or ""
    if not isinstance(value, str):
        raise UserError(f"{path}: {key} is {short_repr(value)}, not a text")
    return value


def _flag(path: Path, raw: dict, key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {short_repr(value)}, not true or false")
    return value


def _rank(path: Path, key: str, value) -> int:
    if type(value) is not int or not 1 <= value < 1 << 20:
        raise UserError(f"{path}: {key} is {short_repr(value)}, not a number from 1")
    return value


def _number(path: Path, key: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path}: {key} is {short_repr(value)}, not a positive number")
    return value
