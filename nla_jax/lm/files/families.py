"""Model families: tables of the names in their files, for Hugging Face and GGUF."""

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


def plus(tensor: Tensor, offset: float) -> Tensor:
    """Return the tensor with `offset` added in float32."""
    return Tensor(tensor.shape, lambda: tensor.read().astype(np.float32) + np.float32(offset))


def _field():
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """The file formats of one architecture. `{i}` in a tensor name is the block."""

    hf: dict[str, str]  # our name -> Hugging Face name
    hf_fixed: dict[str, tuple]  # config key -> the only values that this code supports
    hf_class: str  # the transformers class that reads the files of `save_hf`; "" for none
    gguf: dict[str, str] = _field()  # our name -> GGUF name; empty if llama.cpp lacks the family
    lm: dict[str, Any] = _field()  # LMConfig fields that are the same in the whole family
    norm_offset: float = 0.0  # Hugging Face files store norm weights minus this; GGUF files do not
    hf_keys: dict[str, str] = _field()  # config key -> LMConfig field, in addition to HF_KEYS
    hf_defaults: dict[str, Any] = _field()  # transformers' defaults for missing keys
    hf_windows: tuple[str, ...] = ()  # config keys that say which blocks are local
    hf_local: Callable[[dict, int], bool] = lambda raw, i: False  # is block i local, without "layer_types"
    hf_nested: bool = False  # the language model's settings are under text_config
    hf_renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) for tensor names
    hf_ignored: tuple[str, ...] = ()  # tensors that are not parameters of the language model
    gguf_permuted: dict[str, str] = _field()  # our name -> LMConfig field with the number of heads
    gguf_keys: dict[str, str] = _field()  # key -> LMConfig field, in addition to those of every family
    gguf_defaults: dict[str, Any] = _field()  # llama.cpp's defaults for missing keys
    gguf_wide_blocks: int = 0  # with this many blocks llama.cpp divides scores by sqrt(d_model / n_heads)


_HF = {
    "embed": "model.embed_tokens.weight",
    "blocks/attn_norm": "model.layers.{i}.input_layernorm.weight",
    "blocks/wq": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks/wk": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks/wv": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks/wo": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks/mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks/w_gate": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks/w_up": "model.layers.{i}.mlp.up_proj.weight",
    "blocks/w_down": "model.layers.{i}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_HF_BIAS = {
    "blocks/wq_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blocks/wk_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blocks/wv_bias": "model.layers.{i}.self_attn.v_proj.bias",
}
_HF_QK_NORM = {
    "blocks/q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks/k_norm": "model.layers.{i}.self_attn.k_norm.weight",
}
_HF_GEMMA = {
    **_HF,
    "blocks/attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "blocks/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
_GGUF = {
    "embed": "token_embd.weight",
    "blocks/attn_norm": "blk.{i}.attn_norm.weight",
    "blocks/wq": "blk.{i}.attn_q.weight",
    "blocks/wk": "blk.{i}.attn_k.weight",
    "blocks/wv": "blk.{i}.attn_v.weight",
    "blocks/wo": "blk.{i}.attn_output.weight",
    "blocks/mlp_norm": "blk.{i}.ffn_norm.weight",
    "blocks/w_gate": "blk.{i}.ffn_gate.weight",
    "blocks/w_up": "blk.{i}.ffn_up.weight",
    "blocks/w_down": "blk.{i}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_GGUF_BIAS = {
    "blocks/wq_bias": "blk.{i}.attn_q.bias",
    "blocks/wk_bias": "blk.{i}.attn_k.bias",
    "blocks/wv_bias": "blk.{i}.attn_v.bias",
}
_GGUF_QK_NORM = {
    "blocks/q_norm": "blk.{i}.attn_q_norm.weight",
    "blocks/k_norm": "blk.{i}.attn_k_norm.weight",
}
_GGUF_GEMMA = {
    **_GGUF,
    "blocks/attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "blocks/mlp_post_norm": "blk.{i}.post_ffw_norm.weight",
}
_SILU = {"hidden_act": ("silu", "swish")}
_GELU = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
}
_QWEN = dict(
    hf_windows=("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    hf_local=lambda raw, i: bool(raw["use_sliding_window"]) and i >= raw["max_window_layers"],
)
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_GEMMA3 = Family(
    hf_class="Gemma3ForCausalLM",
    hf={**_HF_GEMMA, **_HF_QK_NORM},
    lm={"qk_norm": True, "post_norms": True, "activation": "gelu_tanh", "scale_embed": True},
    norm_offset=1.0,
    hf_fixed={**_GELU, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    hf_keys={"query_pre_attn_scalar": "query_scalar", "rope_local_base_freq": "local_rope_theta"},
    hf_defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    hf_windows=("sliding_window", "sliding_window_pattern", "layer_types"),
    hf_local=lambda raw, i: (i + 1) % raw["sliding_window_pattern"] != 0,
)

# By model_type of config.json. `save_hf` uses the first family that can express the model.
FAMILIES = {
    "llama": Family(
        hf_class="LlamaForCausalLM",
        hf=_HF,
        gguf=_GGUF,
        gguf_permuted={"blocks/wq": "n_heads", "blocks/wk": "n_kv_heads"},
        hf_fixed={
            **_SILU,
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "partial_rotary_factor": (1.0, None),
            "sliding_window": (None,),
            "pretraining_tp": (1, None),
            "rope_interleaved": (False, None),
        },
        hf_ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    ),
    "mistral": Family(
        hf_class="MistralForCausalLM",
        hf=_HF,
        hf_fixed=_SILU,
        hf_defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        hf_windows=("sliding_window",),
        hf_local=lambda raw, i: raw["sliding_window"] is not None,
    ),
    "qwen2": Family(
        **_QWEN,
        hf_class="Qwen2ForCausalLM",
        hf={**_HF, **_HF_BIAS},
        gguf={**_GGUF, **_GGUF_BIAS},
        lm={"qkv_bias": True},
        hf_fixed={**_SILU, "attention_bias": (None, True)},
        hf_defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        **_QWEN,
        hf_class="Qwen3ForCausalLM",
        hf={**_HF, **_HF_QK_NORM},
        gguf={**_GGUF, **_GGUF_QK_NORM},
        lm={"qk_norm": True},
        hf_fixed={**_SILU, "attention_bias": (False, None)},
        hf_defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "gemma2": Family(
        hf_class="Gemma2ForCausalLM",
        hf=_HF_GEMMA,
        gguf=_GGUF_GEMMA,
        lm={"post_norms": True, "activation": "gelu_tanh", "scale_embed": True},
        norm_offset=1.0,
        hf_fixed=_GELU,
        hf_keys={
            "attn_logit_softcapping": "attn_softcap",
            "final_logit_softcapping": "final_softcap",
            "query_pre_attn_scalar": "query_scalar",
        },
        hf_defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        hf_windows=("sliding_window", "layer_types"),
        hf_local=lambda raw, i: i % 2 == 0,
        gguf_keys={
            "attn_logit_softcapping": "attn_softcap",
            "final_logit_softcapping": "final_softcap",
        },
        gguf_defaults={
            "attention.sliding_window": 4096,
            "attention.sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        gguf_wide_blocks=46,  # Gemma 2 27B
    ),
    "gemma3_text": _GEMMA3,
    # A checkpoint with a vision tower; llama.cpp uses the same name for the language model.
    "gemma3": dataclasses.replace(
        _GEMMA3,
        hf_class="",
        hf_nested=True,
        hf_renamed=(
            (r"^(language_model\.model|model\.language_model)\.", "model."),
            (r"^language_model\.lm_head\.", "lm_head."),
        ),
        hf_ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        gguf={**_GGUF_GEMMA, **_GGUF_QK_NORM},
        gguf_keys={"rope.freq_base_swa": "local_rope_theta"},
        gguf_defaults={
            "attention.sliding_window": 0,
            "attention.sliding_window_pattern": 6,
            "rope.freq_base_swa": 10_000.0,
        },
        gguf_wide_blocks=62,  # Gemma 3 27B
    ),
}

# Keys of config.json -> fields of LMConfig, in every family.
HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_blocks",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "max_position_embeddings": "max_position",
    "rope_theta": "rope_theta",
}
HF_DEFAULTS = {
    "head_dim": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
HF_READ = {"model_type", "rope_parameters", "rope_scaling"}
# Keys of config.json that do not change what a forward pass computes.
HF_HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "cache_implementation", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "name_or_path",
    "pad_token_id", "torch_dtype", "transformers_version", "transformers.js_config", "unk_token_id",
    "use_cache",
}
# The same for keys next to text_config, which describe the vision part too.
HF_HARMLESS_NESTED = HF_HARMLESS | {
    "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "model_type",
    "text_config", "tie_word_embeddings", "vision_config",
}
# rope_type -> names of its numbers, in the order of LMConfig.rope_scaling.
HF_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}
