"""Families since 2024: Gemma 4, OLMo 2 and 3, Phi-3 and 4, Qwen3-MoE, Qwen3.5 and 3.6."""

import dataclasses

from nla_jax.lm.files.family import Family
from nla_jax.lm.files.family_names import (
    GGUF,
    GGUF_GEMMA,
    GGUF_QK_NORM,
    HF,
    HF_GEMMA,
    HF_QK_NORM,
    SILU,
)

_POST_ONLY = {"attn_norm", "mlp_norm"}  # norms that OLMo lacks
_OLMO2 = Family(
    hf_class="Olmo2ForCausalLM",
    hf={
        **{ours: theirs for ours, theirs in HF.items() if ours.removeprefix("blocks/") not in _POST_ONLY},
        **HF_QK_NORM,
        "blocks/attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
        "blocks/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
    },
    gguf={
        **{ours: theirs for ours, theirs in GGUF.items() if ours.removeprefix("blocks/") not in _POST_ONLY},
        **GGUF_QK_NORM,
        "blocks/attn_post_norm": "blk.{i}.post_attention_norm.weight",
        "blocks/mlp_post_norm": "blk.{i}.post_ffw_norm.weight",
    },
    lm={"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_whole": True},
    hf_fixed={**SILU, "attention_bias": (False, None), "partial_rotary_factor": (1.0, None)},
    hf_defaults={"rms_norm_eps": 1e-5},
)
_FUSED = {
    "blocks/wq": "model.layers.{i}.self_attn.qkv_proj.weight[q]",
    "blocks/wk": "model.layers.{i}.self_attn.qkv_proj.weight[k]",
    "blocks/wv": "model.layers.{i}.self_attn.qkv_proj.weight[v]",
    "blocks/w_gate": "model.layers.{i}.mlp.gate_up_proj.weight[gate]",
    "blocks/w_up": "model.layers.{i}.mlp.gate_up_proj.weight[up]",
}
_FUSED_GGUF = {
    "blocks/wq": "blk.{i}.attn_qkv.weight[q]",
    "blocks/wk": "blk.{i}.attn_qkv.weight[k]",
    "blocks/wv": "blk.{i}.attn_qkv.weight[v]",
    "blocks/w_gate": "blk.{i}.ffn_up.weight[gate]",
    "blocks/w_up": "blk.{i}.ffn_up.weight[up]",
}

_QWEN3_5 = Family(  # Qwen3.6 too
    hf_class="Qwen3_5ForCausalLM",
    hf={
        **HF,
        **HF_QK_NORM,
        "blocks/delta_qkv": "model.layers.{i}.linear_attn.in_proj_qkv.weight",
        "blocks/delta_z": "model.layers.{i}.linear_attn.in_proj_z.weight",
        "blocks/delta_b": "model.layers.{i}.linear_attn.in_proj_b.weight",
        "blocks/delta_a": "model.layers.{i}.linear_attn.in_proj_a.weight",
        "blocks/delta_conv": "model.layers.{i}.linear_attn.conv1d.weight",
        "blocks/delta_dt_bias": "model.layers.{i}.linear_attn.dt_bias",
        "blocks/delta_a_log": "model.layers.{i}.linear_attn.A_log",
        "blocks/delta_norm": "model.layers.{i}.linear_attn.norm.weight",
        "blocks/delta_out": "model.layers.{i}.linear_attn.out_proj.weight",
    },
    lm={"qk_norm": True, "attn_gate": True},
    norm_offset=1.0,
    plain_norms=("blocks/delta_norm",),
    hf_fixed={
        **SILU, "attention_bias": (False, None), "attn_output_gate": (True, None),
        "mamba_ssm_dtype": ("float32", None), "output_gate_type": ("swish", None),
    },
    hf_keys={"partial_rotary_factor": "rotary_dim"},
    hf_delta=("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
              "linear_value_head_dim", "linear_conv_kernel_dim"),
    hf_defaults={
        "partial_rotary_factor": 0.25, "head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 16,
        "max_position_embeddings": 32_768, "full_attention_interval": 4, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    hf_rope_types=("default",),
    hf_harmless=("full_attention_interval", "layer_types", "mrope_interleaved", "mrope_section",
                 "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
    hf_ignored=(r"mtp\..*",),
)
_SMALL = ", which Gemma 4 E2B and E4B need: take Gemma 4 12B, 26B-A4B or 31B"
_GLOBAL = ("wq", "wk", "wv", "wo", "q_norm", "k_norm")  # what has another shape in blocks that are not local
_GEMMA4 = Family(
    hf_class="Gemma4ForCausalLM",
    hf={
        **HF_GEMMA,
        **HF_QK_NORM,
        **{f"blocks/global_{n}": {**HF, **HF_QK_NORM}[f"blocks/{n}"] for n in _GLOBAL},
        "blocks/block_scale": "model.layers.{i}.layer_scalar",
        "blocks/router": "model.layers.{i}.router.proj.weight",
        "blocks/router_norm": "model.layers.{i}.router.scale",
        "blocks/experts_scale": "model.layers.{i}.router.per_expert_scale",
        "blocks/experts_gate": "model.layers.{i}.experts.gate_up_proj[gate]",
        "blocks/experts_up": "model.layers.{i}.experts.gate_up_proj[up]",
        "blocks/experts_down": "model.layers.{i}.experts.down_proj",
        "blocks/experts_norm": "model.layers.{i}.pre_feedforward_layernorm_2.weight",
        "blocks/experts_post_norm": "model.layers.{i}.post_feedforward_layernorm_2.weight",
        "blocks/mlp_own_norm": "model.layers.{i}.post_feedforward_layernorm_1.weight",
    },
    gguf={
        **GGUF_GEMMA,
        **GGUF_QK_NORM,
        **{f"blocks/global_{n}": {**GGUF, **GGUF_QK_NORM}[f"blocks/{n}"] for n in _GLOBAL},
        "blocks/block_scale": "blk.{i}.layer_output_scale.weight",
        "blocks/router": "blk.{i}.ffn_gate_inp.weight",
        "blocks/router_norm": "blk.{i}.ffn_gate_inp.scale",
        "blocks/experts_scale": "blk.{i}.ffn_down_exps.scale",
        "blocks/experts_gate": "blk.{i}.ffn_gate_up_exps.weight[gate]",
        "blocks/experts_up": "blk.{i}.ffn_gate_up_exps.weight[up]",
        "blocks/experts_down": "blk.{i}.ffn_down_exps.weight",
        "blocks/experts_norm": "blk.{i}.pre_ffw_norm_2.weight",
        "blocks/experts_post_norm": "blk.{i}.post_ffw_norm_2.weight",
        "blocks/mlp_own_norm": "blk.{i}.post_ffw_norm_1.weight",
    },
    gguf_name="gemma4",
    gguf_keys={"rope.freq_base_swa": "local_rope_theta", "final_logit_softcapping": "final_softcap"},
    gguf_experts=("expert_count", "expert_used_count", "expert_feed_forward_length"),
    gguf_defaults={
        "attention.sliding_window": 0, "attention.sliding_window_pattern": 6, "rope.freq_base_swa": 10_000.0,
        "final_logit_softcapping": 0.0, "attention.value_length_swa": None, "rope.dimension_count_swa": None,
    },
    lm={"qk_norm": True, "v_norm": True, "post_norms": True, "activation": "gelu_tanh", "scale_embed": True,
        "query_scalar": 1.0, "block_scale": True},
    hf_fixed={
        "hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False, None),
        "use_bidirectional_attention": (None, False, "vision"),  # text is causal in all of these
        "hidden_size_per_layer_input": (0, None), "num_kv_shared_layers": (0, None),
    },
    hf_hints={"hidden_size_per_layer_input": _SMALL, "num_kv_shared_layers": _SMALL},
    hf_keys={"final_logit_softcapping": "final_softcap"},
    hf_experts=("num_experts", "top_k_experts", "moe_intermediate_size"),
    hf_experts_if="enable_moe_block",
    hf_experts_lm={"experts_beside": True, "experts_normed": True},
    own_global=True,
    hf_defaults={
        "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
        "max_position_embeddings": 131_072, "tie_word_embeddings": True, "sliding_window": 512,
        "final_logit_softcapping": None, "attention_k_eq_v": False, "enable_moe_block": False,
        "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
        },
    },
    hf_ropes=True,
    hf_rope_types=("default", "proportional"),
    hf_windows=("sliding_window", "layer_types"),
    hf_local=lambda raw, i: (i + 1) % 6 != 0 and i + 1 < raw["num_hidden_layers"],
    hf_written={"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    hf_harmless=("use_double_wide_mlp", "vocab_size_per_layer_input"),
)
_GEMMA4_12B = dataclasses.replace(
    _GEMMA4,
    hf_class="",  # `save_hf` writes it as the others
    gguf={},
    hf_defaults={**_GEMMA4.hf_defaults, "max_position_embeddings": 262_144, "sliding_window": 1024,
                 "hidden_size_per_layer_input": 0},
)
_GEMMA4_NESTED = dict(  # a checkpoint that reads images and sound too
    hf_class="",
    gguf={},
    hf_nested=True,
    hf_renamed=((r"^model\.language_model\.", "model."),),
    hf_ignored=(r"model\.(vision_tower|vision_embedder|embed_vision|audio_tower|embed_audio)\..*",),
    hf_harmless=(*_GEMMA4.hf_harmless, "audio_config", "audio_token_id", "boa_token_id", "boi_token_id",
                 "eoa_token_id", "eoa_token_index", "eoi_token_id", "vision_soft_tokens_per_image"),
)


def _experts(names: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    """Return the names with those of experts in place of the MLP's."""
    mlp = ("blocks/w_gate", "blocks/w_up", "blocks/w_down")
    return {ours: theirs for ours, theirs in names.items() if ours not in mlp} | more


_QWEN3_5_MOE = dataclasses.replace(
    _QWEN3_5,
    hf_class="Qwen3_5MoeForCausalLM",
    hf=_experts(_QWEN3_5.hf, {
        "blocks/router": "model.layers.{i}.mlp.gate.weight",
        "blocks/experts_gate": "model.layers.{i}.mlp.experts.*.gate_proj.weight",
        "blocks/experts_up": "model.layers.{i}.mlp.experts.*.up_proj.weight",
        "blocks/experts_down": "model.layers.{i}.mlp.experts.*.down_proj.weight",
        "blocks/w_gate": "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
        "blocks/w_up": "model.layers.{i}.mlp.shared_expert.up_proj.weight",
        "blocks/w_down": "model.layers.{i}.mlp.shared_expert.down_proj.weight",
        "blocks/shared_gate": "model.layers.{i}.mlp.shared_expert_gate.weight",
    }),
    hf_others={
        "blocks/experts_gate": "model.layers.{i}.mlp.experts.gate_up_proj[gate]",
        "blocks/experts_up": "model.layers.{i}.mlp.experts.gate_up_proj[up]",
        "blocks/experts_down": "model.layers.{i}.mlp.experts.down_proj",
    },
    lm={**_QWEN3_5.lm, "experts_normed": True, "shared_expert": True},
    hf_keys={**_QWEN3_5.hf_keys, "shared_expert_intermediate_size": "d_ff"},
    hf_experts=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    hf_defaults={
        **_QWEN3_5.hf_defaults, "num_key_value_heads": 2, "intermediate_size": 0, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
    hf_harmless=(*_QWEN3_5.hf_harmless, "output_router_logits", "router_aux_loss_coef"),
)
_QWEN3_5_NESTED = dict(  # a checkpoint that reads images too
    hf_class="",
    hf_nested=True,
    hf_renamed=((r"^model\.language_model\.", "model."),),
    hf_ignored=(*_QWEN3_5.hf_ignored, r"model\.visual\..*"),
)
RECENT = {
    "gemma4_text": _GEMMA4,
    "gemma4": dataclasses.replace(_GEMMA4, **_GEMMA4_NESTED),
    "gemma4_unified_text": _GEMMA4_12B,
    "gemma4_unified": dataclasses.replace(_GEMMA4_12B, **_GEMMA4_NESTED),
    "olmo2": _OLMO2,
    "olmo3": dataclasses.replace(
        _OLMO2,
        hf_class="Olmo3ForCausalLM",
        gguf={},  # llama.cpp has it as "olmo2", with windows
        hf_defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
        hf_ropes=True,
        hf_rope_types=("default", "linear", "llama3", "yarn"),
        hf_windows=("sliding_window", "layer_types"),
        hf_local=lambda raw, i: (i + 1) % 4 != 0,
    ),
    "phi3": Family(  # Phi-3, and Phi-4 too
        hf_class="Phi3ForCausalLM",
        hf={**HF, **_FUSED},
        gguf={**GGUF, **_FUSED_GGUF},
        hf_fixed={**SILU, "attention_bias": (False, None)},
        hf_keys={"partial_rotary_factor": "rotary_dim"},
        hf_defaults={
            "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, "sliding_window": None,
            "max_position_embeddings": 4096,
        },
        hf_rope_types=("default",),
        hf_harmless=("auto_map", "embd_pdrop", "original_max_position_embeddings", "resid_pdrop"),
        hf_written={"pad_token_id": None},  # transformers' default is not in every vocabulary
        hf_windows=("sliding_window",),
        hf_local=lambda raw, i: raw["sliding_window"] is not None,
        gguf_defaults={"rope.scaling.original_context_length": 0},
    ),
    "qwen3_moe": Family(
        hf_class="Qwen3MoeForCausalLM",
        hf=_experts({**HF, **HF_QK_NORM}, {
            "blocks/router": "model.layers.{i}.mlp.gate.weight",
            "blocks/experts_gate": "model.layers.{i}.mlp.experts.*.gate_proj.weight",
            "blocks/experts_up": "model.layers.{i}.mlp.experts.*.up_proj.weight",
            "blocks/experts_down": "model.layers.{i}.mlp.experts.*.down_proj.weight",
        }),
        gguf_name="qwen3moe",
        gguf=_experts({**GGUF, **GGUF_QK_NORM}, {
            "blocks/router": "blk.{i}.ffn_gate_inp.weight",
            "blocks/experts_gate": "blk.{i}.ffn_gate_exps.weight",
            "blocks/experts_up": "blk.{i}.ffn_up_exps.weight",
            "blocks/experts_down": "blk.{i}.ffn_down_exps.weight",
        }),
        gguf_lm={"experts_normed": True},
        gguf_experts=("expert_count", "expert_used_count", "expert_feed_forward_length"),
        lm={"qk_norm": True},
        hf_fixed={
            **SILU, "attention_bias": (False, None), "decoder_sparse_step": (1, None),
            "use_sliding_window": (False, None),
        },
        hf_keys={"norm_topk_prob": "experts_normed"},
        hf_aliases={"num_local_experts": "num_experts"},
        hf_experts=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        hf_defaults={
            "num_key_value_heads": 4, "norm_topk_prob": False, "num_experts": 128, "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        hf_harmless=("max_window_layers", "output_router_logits", "router_aux_loss_coef", "sliding_window"),
    ),
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5": dataclasses.replace(_QWEN3_5, **_QWEN3_5_NESTED),
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_5_moe": dataclasses.replace(_QWEN3_5_MOE, **_QWEN3_5_NESTED),
}
