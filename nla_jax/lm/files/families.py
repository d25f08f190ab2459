"""Model families: what their files say, for Hugging Face and GGUF."""

import dataclasses

from nla_jax.lm.files.families_recent import RECENT
from nla_jax.lm.files.family import Family
from nla_jax.lm.files.family_names import (
    GGUF,
    GGUF_BIAS,
    GGUF_GEMMA,
    GGUF_QK_NORM,
    HF,
    HF_BIAS,
    HF_GEMMA,
    HF_QK_NORM,
    SILU,
)

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
    hf={**HF_GEMMA, **HF_QK_NORM},
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
        hf=HF,
        gguf=GGUF,
        gguf_permuted={"blocks/wq": "n_heads", "blocks/wk": "n_kv_heads"},
        hf_fixed={
            **SILU,
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
        hf=HF,
        hf_fixed=SILU,
        hf_defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        hf_windows=("sliding_window",),
        hf_local=lambda raw, i: raw["sliding_window"] is not None,
    ),
    "qwen2": Family(
        **_QWEN,
        hf_class="Qwen2ForCausalLM",
        hf={**HF, **HF_BIAS},
        gguf={**GGUF, **GGUF_BIAS},
        lm={"qkv_bias": True},
        hf_fixed={**SILU, "attention_bias": (None, True)},
        hf_defaults=_QWEN_DEFAULTS,
    ),
    "qwen3": Family(
        **_QWEN,
        hf_class="Qwen3ForCausalLM",
        hf={**HF, **HF_QK_NORM},
        gguf={**GGUF, **GGUF_QK_NORM},
        lm={"qk_norm": True},
        hf_fixed={**SILU, "attention_bias": (False, None)},
        hf_defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "gemma2": Family(
        hf_class="Gemma2ForCausalLM",
        hf=HF_GEMMA,
        gguf=GGUF_GEMMA,
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
        gguf={**GGUF_GEMMA, **GGUF_QK_NORM},
        gguf_keys={"rope.freq_base_swa": "local_rope_theta"},
        gguf_defaults={
            "attention.sliding_window": 0,
            "attention.sliding_window_pattern": 6,
            "rope.freq_base_swa": 10_000.0,
        },
        gguf_wide_blocks=62,  # Gemma 3 27B
    ),
    **RECENT,
}
