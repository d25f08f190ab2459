"""What a family of models says about its files."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `read` returns it in the file's orientation: matrices are [out, in].

    `part`, if the format allows it, reads only a slice; each process of a pod reads its own shards.
    `dtype` is the dtype of the array that `read` returns.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    part: Callable[[tuple[slice, ...]], np.ndarray] | None = None
    dtype: np.dtype = np.dtype(np.float32)


def turn(array):
    """Return a parameter in the other orientation: a matrix, or each of several, is transposed."""
    return array if array.ndim < 2 else array.swapaxes(-1, -2)


def plus(tensor: Tensor, offset: float) -> Tensor:
    """Return the tensor with `offset` added in float32."""
    return Tensor(tensor.shape, lambda: tensor.read().astype(np.float32) + np.float32(offset))


def _field():
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """The file formats of one architecture.

    `{i}` in a tensor name is the block. `*` is the number of an expert, and `NAME[part]` is a part of a fused
    matrix (`nla_jax.lm.files.regroup`).
    """

    hf: dict[str, str]  # our name -> Hugging Face name
    hf_fixed: dict[str, tuple]  # config key -> the only values that this code supports
    hf_class: str  # the transformers class that reads the files of `save_hf`; "" for none
    gguf: dict[str, str] = _field()  # our name -> GGUF name; empty if llama.cpp lacks the family
    lm: dict[str, Any] = _field()  # LMConfig fields that are the same in the whole family
    norm_offset: float = 0.0  # Hugging Face files store norm weights minus this; GGUF files do not
    hf_others: dict[str, str] = _field()  # our name -> the name that some Hugging Face files have instead
    hf_hints: dict[str, str] = _field()  # config key -> what to do if its value is not supported
    hf_keys: dict[str, str] = _field()  # config key -> LMConfig field, in addition to HF_KEYS
    hf_defaults: dict[str, Any] = _field()  # transformers' defaults for missing keys
    hf_harmless: tuple[str, ...] = ()  # config keys that do not change a forward pass, beside HF_HARMLESS
    hf_experts: tuple[str, ...] = ()  # config keys of LMConfig.experts
    hf_experts_if: str = ""  # config key that says whether the model has experts; "" if the family has
    hf_experts_lm: dict[str, Any] = _field()  # LMConfig fields of those models that have experts
    own_global: bool = False  # heads of blocks that are not local have settings of their own
    hf_delta: tuple[str, ...] = ()  # config keys of LMConfig.delta
    plain_norms: tuple[str, ...] = ()  # norms that files store as they are, whatever `norm_offset`
    hf_aliases: dict[str, str] = _field()  # another name of a config key -> the key
    hf_ropes: bool = False  # "rope_parameters" has settings for each kind of attention
    hf_rope_types: tuple[str, ...] = ("default", "linear", "llama3")  # keys of HF_ROPE
    hf_written: dict[str, Any] = _field()  # what `save_hf` adds to config.json
    hf_windows: tuple[str, ...] = ()  # config keys that say which blocks are local
    hf_local: Callable[[dict, int], bool] = lambda raw, i: False  # is block i local, without "layer_types"
    hf_nested: bool = False  # the language model's settings are under text_config
    hf_renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) for tensor names
    hf_ignored: tuple[str, ...] = ()  # tensors that are not parameters of the language model
    gguf_permuted: dict[str, str] = _field()  # our name -> LMConfig field with the number of heads
    gguf_keys: dict[str, str] = _field()  # key -> LMConfig field, in addition to those of every family
    gguf_name: str = ""  # llama.cpp's name of the family, if it is another one
    gguf_lm: dict[str, Any] = _field()  # LMConfig fields that llama.cpp does not store
    gguf_experts: tuple[str, ...] = ()  # keys of LMConfig.experts
    gguf_defaults: dict[str, Any] = _field()  # llama.cpp's defaults for missing keys
    gguf_wide_blocks: int = 0  # with this many blocks llama.cpp divides scores by sqrt(d_model / n_heads)

    def is_offset(self, ours: str) -> bool:
        """Return whether Hugging Face files store this parameter minus `norm_offset`."""
        return bool(self.norm_offset) and "norm" in ours and ours not in self.plain_norms
