"""Names of tensors and of settings in the files of many families."""

HF = {
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
HF_BIAS = {
    "blocks/wq_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blocks/wk_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blocks/wv_bias": "model.layers.{i}.self_attn.v_proj.bias",
}
HF_QK_NORM = {
    "blocks/q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks/k_norm": "model.layers.{i}.self_attn.k_norm.weight",
}
HF_GEMMA = {
    **HF,
    "blocks/attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks/mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "blocks/mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
GGUF = {
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
GGUF_BIAS = {
    "blocks/wq_bias": "blk.{i}.attn_q.bias",
    "blocks/wk_bias": "blk.{i}.attn_k.bias",
    "blocks/wv_bias": "blk.{i}.attn_v.bias",
}
GGUF_QK_NORM = {
    "blocks/q_norm": "blk.{i}.attn_q_norm.weight",
    "blocks/k_norm": "blk.{i}.attn_k_norm.weight",
}
GGUF_GEMMA = {
    **GGUF,
    "blocks/attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "blocks/mlp_post_norm": "blk.{i}.post_ffw_norm.weight",
}
SILU = {"hidden_act": ("silu", "swish")}

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
# Keys of heads of blocks that are not local (`Family.own_global`).
HF_GLOBAL = {"attention_k_eq_v", "global_head_dim", "num_global_key_value_heads", "per_layer_config"}
# The same as HF_HARMLESS for keys next to text_config, which describe the vision part too.
HF_HARMLESS_NESTED = HF_HARMLESS | {
    "boi_token_index", "eoi_token_index", "image_token_id", "image_token_index", "mm_tokens_per_image",
    "model_type", "text_config", "tie_word_embeddings", "video_token_id", "vision_config",
    "vision_end_token_id", "vision_start_token_id",
}
# rope_type -> names of its numbers, in the order of LMConfig.rope_scaling.
HF_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "attention_factor"),
    "proportional": ("partial_rotary_factor",),
}
