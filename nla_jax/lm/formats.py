"""What each family of models is called in files: tables, and what both kinds of file share."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, which `read` gives in the file's orientation: matrices are [out, in]."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def one_line(err: Exception) -> str:
    """The message of an exception, short and without line breaks."""
    return " ".join(str(err).split())[:200] or type(err).__name__


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is written in files. `{i}` in a tensor name is the block."""

    hf: dict[str, str]  # our name -> Hugging Face name
    gguf: dict[str, str]  # our name -> GGUF name
    gguf_permuted: dict[str, str]  # our name -> LMConfig field with the number of heads
    hf_fixed: dict[str, tuple]  # config key -> the only values that this code computes
    hf_ignored: tuple[str, ...] = ()  # buffers that older files hold


FAMILIES = {
    "llama": Family(
        hf={
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
        },
        gguf={
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
        },
        gguf_permuted={"blocks/wq": "n_heads", "blocks/wk": "n_kv_heads"},
        hf_fixed={
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "partial_rotary_factor": (1.0, None),
            "sliding_window": (None,),
            "pretraining_tp": (1, None),
            "rope_interleaved": (False, None),
        },
        hf_ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )
}

# Keys of config.json that do not change what a forward pass computes.
HF_READ = {
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "rope_theta", "rope_parameters",
    "rope_scaling",
    "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
}  # fmt: skip
HF_HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "id2label",
    "initializer_range", "is_llama_config", "label2id", "name_or_path", "pad_token_id",
    "torch_dtype", "transformers_version", "transformers.js_config", "unk_token_id", "use_cache",
}  # fmt: skip
# Keys of GGUF metadata, without the architecture in front.
GGUF_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.freq_base",
    "rope.dimension_count", "vocab_size",
}  # fmt: skip
GGUF_FIXED = {"rope.scaling.type": ("none",), "attention.causal": (True,)}
