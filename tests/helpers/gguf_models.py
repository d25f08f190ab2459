"""GGUF files of transformers models, as llama.cpp's converter writes them."""

import re

import gguf
import numpy as np

from tests.helpers.family_pairs import LLAMA3

CASES = {  # case -> (architecture, changes that llama.cpp's metadata can say)
    "llama": ("llama", {}),
    "llama linear": ("llama", {}),
    "llama llama3": ("llama", dict(rope_parameters={
        **LLAMA3, "rope_theta": 500_000.0, "factor": 32.0, "original_max_position_embeddings": 8192})),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "olmo2 tied": ("olmo2", {}),
    "phi3 global": ("phi3", {}),
    "qwen3_moe": ("qwen3moe", {}),
    "gemma2": ("gemma2", dict(query_pre_attn_scalar=16)),
    "gemma3_text": ("gemma3", dict(query_pre_attn_scalar=16)),
    "gemma4_text": ("gemma4", {}),
    "gemma4_text untied": ("gemma4", {}),
}


def permute(w, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def write_gguf(path, arch, net, extra=()):
    """A GGUF file of a transformers model, as llama.cpp's converter writes it."""
    config = net.config
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if arch != "gemma4":
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gemma4":
        add_global_heads(writer, config)
    elif head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if near := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(near["rope_theta"])
    if arch in ("gemma2", "gemma3", "gemma4"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "gemma4" and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(getattr(config, "num_experts_per_tok", None) or config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "phi3":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_scaling_orig_ctx_len(4096)
    for key, value in extra:
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config.head_dim))
    if arch == "gemma4":
        rotated = int(config.per_layer_config["full_attention"].head_dim * rope["partial_rotary_factor"] / 2)
        rest = config.per_layer_config["full_attention"].head_dim // 2 - rotated
        writer.add_tensor("rope_freqs.weight", np.array([1.0] * rotated + [1e30] * rest, np.float32))
    kinds = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    for name, tensor in as_converted(arch, net.state_dict()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            w = permute(w, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            w = permute(w, config.num_key_value_heads)
        if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            w = w + 1
        by_hand = SCALES.get(name.rsplit("router.")[-1], "").format(*re.findall(r"\d+", name))
        writer.add_tensor(by_hand or names.get_name(name, try_suffixes=(".weight", ".bias")), w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Names that the converter gives by hand.
SCALES = {"scale": "blk.{}.ffn_gate_inp.scale", "per_expert_scale": "blk.{}.ffn_down_exps.scale"}


def add_global_heads(writer, config):
    """Gemma4Model.set_gguf_parameters of the converter."""
    near, far = (config.per_layer_config[f"{kind}_attention"] for kind in ("sliding", "full"))
    local = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_head_count_kv([(near if n else far).num_key_value_heads for n in local])
    writer.add_key_length(far.head_dim)
    writer.add_value_length(far.head_dim)
    writer.add_key_length_swa(near.head_dim)
    writer.add_value_length_swa(near.head_dim)
    writer.add_rope_dimension_count(far.head_dim)
    writer.add_rope_dimension_count_swa(near.head_dim)
    writer.add_sliding_window_pattern(local)
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)


def as_converted(arch, state):
    """(name, tensor) of every tensor; the experts' fused matrices are halved, but not Gemma 4's."""
    for name, tensor in state.items():
        if arch == "gemma4" and name.endswith(("layer_scalar", "experts.gate_up_proj")):
            yield name + ".weight", tensor
        elif name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                yield name.replace("gate_up_proj", f"{part}_proj.weight"), half.contiguous()
        else:
            yield name + ".weight" * name.endswith("experts.down_proj"), tensor


def llama3_factors(rope, head_dim):
    """LlamaModel.generate_extra_tensors of the converter."""
    out = []
    for freq in rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim):
        turns = rope["original_max_position_embeddings"] * freq / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = (turns - low) / (high - low)
        mixed = 1 / ((1 - keep) / rope["factor"] + keep)
        out.append(1.0 if turns > high else rope["factor"] if turns < low else mixed)
    return np.array(out, np.float32)
