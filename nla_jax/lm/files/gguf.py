"""GGUF files: metadata, configuration and dequantized tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
This module parses the header, because `gguf.GGUFReader` needs two seconds for a vocabulary of 49,152.
The `gguf` package dequantizes the blocks.
"""

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import UserError, one_line, short_repr
from nla_jax.lm.config import LMConfig, check_blocks, make_config
from nla_jax.lm.files import gguf_layers
from nla_jax.lm.files.families import FAMILIES
from nla_jax.lm.files.family import Family, Tensor
from nla_jax.lm.files.regroup import regroup

SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
STRING, ARRAY = 8, 9
# Keys of the metadata that are read, without their prefix, the architecture.
READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
}
ROPE_FACTORS = "rope_freqs.weight"  # divisors of Llama 3's rotary frequencies
FIXED = {"attention.causal": (True,)}


@dataclasses.dataclass(frozen=True)
class GGUF:
    """An open file: metadata as plain Python values, and tensors, which are read lazily."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


def open_gguf(path) -> GGUF:
    """Read the header. Raises UserError if the file is not a complete GGUF file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(path, data)
    except (struct.error, ValueError, OSError, OverflowError, MemoryError, RecursionError) as err:
        raise UserError(
            f"{path} is not a whole GGUF file ({one_line(err)}): download it again"
        ) from err


class _Cursor:
    """A reader of consecutive values. It raises struct.error or ValueError at the end of the data."""

    def __init__(self, data, at: int = 0):
        self.data, self.at = data, at

    def scalars(self, code: str, count: int) -> tuple:
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{code}")
        return values

    def scalar(self, code: str):
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        (size,) = struct.unpack_from("<Q", self.data, self.at)
        start, self.at = self.at + 8, self.at + 8 + size
        if self.at > len(self.data):
            raise ValueError("the header is cut short")
        return self.data[start : self.at].decode("utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(_code(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in (STRING, ARRAY):
            return [self.value(kind) for _ in range(count)]
        return list(self.scalars(_code(kind), count))


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"unknown type {kind} in the metadata")
    return SCALARS[kind]


def _parse(path: Path, data) -> GGUF:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError("it does not start with GGUF")
    cursor.at = 4
    if (version := cursor.scalar("I")) not in (2, 3):
        raise ValueError(f"version {version}, or big endian, is not supported")
    n_tensors, n_meta = cursor.scalars("Q", 2)
    meta = {}
    for _ in range(n_meta):
        key = cursor.string()
        meta[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(n_tensors):
        name = cursor.string()
        shape = cursor.scalars("Q", cursor.scalar("I"))[::-1]
        infos.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    align = meta.get("general.alignment", 32)
    if type(align) is not int or align < 1:
        raise ValueError(f"alignment {align!r} is not possible")
    start = cursor.at + -cursor.at % align
    tensors = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise ValueError(f"two tensors are named {name}")
        tensors[name] = _tensor(data, name, shape, kind, start + offset)
    return GGUF(path, meta, tensors)


def _tensor(data, name: str, shape: tuple[int, ...], kind: int, at: int) -> Tensor:
    import gguf

    kind = gguf.GGMLQuantizationType(kind)  # ValueError when unknown
    if kind not in gguf.GGML_QUANT_SIZES:
        raise ValueError(f"{name} is {kind.name}, of unknown size")
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not shape or 0 in shape or shape[-1] % per_block:
        raise ValueError(f"{name} of shape {shape} cannot be {kind.name}")
    n_bytes = int(np.prod(shape, dtype=object)) // per_block * block_bytes
    if at + n_bytes > len(data):
        raise ValueError(f"{name} is cut short")

    def read() -> np.ndarray:
        raw = np.frombuffer(data, np.uint8, n_bytes, at)
        # Blocks are contiguous in the whole tensor, and gguf works on 16 rows at a time. Fewer and longer
        # rows give the same values in a fifth of the time.
        rows = n_bytes // (shape[-1] // per_block * block_bytes)
        try:
            values = gguf.dequantize(raw.reshape(rows // np.gcd(rows, 16), -1), kind)
        except NotImplementedError as err:
            raise UserError(f"{name}: {one_line(err)}; use another quantization") from err
        return values.reshape(shape)

    return Tensor(shape, read)


def read_config(file: GGUF) -> tuple[Family, LMConfig]:
    """Read the architecture. Raises UserError for one that this code cannot compute exactly."""
    if file.meta.get("general.type") == "adapter":
        raise UserError(
            f"{file.path} is an adapter: merge it into its model by llama.cpp's `llama-export-lora`, and "
            "give the file that this writes"
        )
    arch = file.meta.get("general.architecture")
    known = {family.gguf_name or kind: family for kind, family in FAMILIES.items() if family.gguf}
    if not isinstance(arch, str) or arch not in known:
        raise UserError(f"{file.path}: architecture {short_repr(arch)} is not supported ({', '.join(known)})")
    family = known[arch]
    meta = family.gguf_defaults | {
        key.removeprefix(f"{arch}."): value
        for key, value in file.meta.items()
        if key.startswith(f"{arch}.")
    }
    read = {*READ, *family.gguf_keys, *family.gguf_defaults, *family.gguf_experts}
    read |= {"attention.key_length_swa"} if family.own_global else set()
    for key, value in meta.items():
        fits = value in FIXED[key] if key in FIXED else not value
        if key not in read and not fits:
            raise UserError(f"{file.path}: {arch}.{one_line(key)} = {short_repr(value)} is not supported")
    names = family.gguf
    try:
        d_model, n_heads, n_blocks = (
            meta[key] for key in ("embedding_length", "attention.head_count", "block_count")
        )
        head_dim = meta.get("attention.key_length", d_model // n_heads)
        window, local = _windows(meta, check_blocks(n_blocks))
        wide = n_blocks == family.gguf_wide_blocks and d_model // n_heads != head_dim
        values = dict(
            vocab_size=file.tensors[names["embed"]].shape[0],
            d_model=d_model,
            n_blocks=n_blocks,
            n_heads=n_heads,
            n_kv_heads=meta.get("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            d_ff=meta["feed_forward_length"],
            rope_theta=float(meta.get("rope.freq_base", 10_000.0)),
            norm_eps=_decimal(meta["attention.layer_norm_rms_epsilon"]),
            tied=names["lm_head"] not in file.tensors,
            max_position=meta["context_length"],
            rope_scaling=_scaling(file, meta, arch),
            window=window,
            local=local,
            query_scalar=d_model // n_heads if wide else None,
            **{ours: meta[key] or None for key, ours in family.gguf_keys.items()},
        )
        values |= {**family.lm, **family.gguf_lm}
        if family.gguf_experts and (not family.hf_experts_if or meta.get(family.gguf_experts[0])):
            values |= {"experts": tuple(meta[key] for key in family.gguf_experts), **family.hf_experts_lm}
        if family.own_global:
            values |= gguf_layers.global_heads(family, meta, file.tensors, local)
    except (KeyError, TypeError, ValueError, ArithmeticError) as err:
        raise UserError(f"{file.path}: the metadata is incomplete or invalid ({one_line(err)})") from err
    cfg = make_config(file.path, **values)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(key, head_dim) != head_dim:
            raise UserError(f"{file.path}: {arch}.{key} = {short_repr(meta[key])} is not {head_dim}")
    return family, _add_rope_factors(file, family, cfg)


def _decimal(value: float) -> float:
    """Round a float32 to 7 digits, which restores a number that was written with few digits."""
    return float(f"{value:.7g}")


def _windows(meta: dict, n_blocks: int) -> tuple[int, tuple[bool, ...]]:
    """Return LMConfig's window and local: the last of every `sliding_window_pattern` blocks is global."""
    window, pattern = (meta.get(f"attention.sliding_window{end}", 0) for end in ("", "_pattern"))
    if isinstance(pattern, list):
        local = tuple(map(bool, pattern))
    else:
        local = tuple(bool(pattern) and i % pattern < pattern - 1 for i in range(n_blocks))
    return (window, local) if window and any(local) else (0, ())


def _scaling(file: GGUF, meta: dict, arch: str) -> tuple:
    """Return LMConfig.rope_scaling from the metadata."""
    kind, factor = meta.get("rope.scaling.type", "none"), meta.get("rope.scaling.factor", 0.0)
    if kind == "linear":
        return ("linear", _decimal(factor))
    if kind != "none":
        raise UserError(f"{file.path}: {arch}.rope.scaling.type = {short_repr(kind)} is not supported")
    if factor not in (0.0, 1.0):
        raise UserError(f"{file.path}: {arch}.rope.scaling.factor = {short_repr(factor)} without a type")
    return ()


def _add_rope_factors(file: GGUF, family: Family, cfg: LMConfig) -> LMConfig:
    """Return `cfg` with the scaling of Llama 3 or Gemma 4, which files store as a tensor of divisors of the
    frequencies.

    Of Llama 3, only the published low, high and original length are supported. Raises UserError for others.
    """
    if ROPE_FACTORS not in file.tensors:
        return cfg
    from nla_jax.lm.rotary import frequencies

    factors = file.tensors[ROPE_FACTORS].read().ravel()
    if "proportional" in family.hf_rope_types:
        scaling = gguf_layers.proportional(file.path, ROPE_FACTORS, factors, cfg.kv_heads(local=False)[1])
        return dataclasses.replace(cfg, rope_scaling=scaling)
    known = not cfg.rope_scaling and factors.shape == (cfg.head_dim // 2,) and (factors > 0).all()
    if known and np.isfinite(factors).all():
        scaling = ("llama3", _decimal(factors.max()), 1.0, 4.0, 8192)
        scaled = dataclasses.replace(cfg, rope_scaling=scaling)
        known = np.allclose(factors, np.asarray(frequencies(cfg) / frequencies(scaled)), rtol=1e-4)
    if not known:
        raise UserError(
            f"{file.path}: {ROPE_FACTORS} is not the scaling of Llama 3.1, 3.2 or 3.3; use "
            "the model's directory in Hugging Face layout"
        )
    return scaled


def read_tensors(file: GGUF, family: Family, cfg: LMConfig) -> dict[str, Tensor]:
    """Return the tensors by their names in the file, with q and k in Hugging Face's order of rows."""
    tensors = {name: t for name, t in file.tensors.items() if name != ROPE_FACTORS}
    for ours, heads in family.gguf_permuted.items():
        for block in range(cfg.n_blocks):
            name = family.gguf[ours].format(i=block)
            if name in tensors:
                tensors[name] = _unpermute_tensor(tensors[name], getattr(cfg, heads))
    return regroup(file.path, cfg, family.gguf, tensors)


def _unpermute_tensor(tensor: Tensor, n_heads: int) -> Tensor:
    return Tensor(tensor.shape, lambda: unpermute(tensor.read(), n_heads))


def unpermute(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k: [H*d, D] interleaved pairs -> halves.

    llama.cpp rotates adjacent rows; Hugging Face and this project rotate rows d/2 apart. llama.cpp's
    converter reorders rows by `reshape(H, 2, d/2, D).swapaxes(1, 2)`.
    """
    out, width = w.shape
    pairs = w.reshape(n_heads, out // n_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)
