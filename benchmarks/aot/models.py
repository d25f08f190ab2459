"""Describe the targets of the recipes without downloads: architecture and prompt lengths.

Lengths are those of `nla_jax.prompts` in each tokenizer with its chat template, to within a few tokens. An
error of ten tokens changes the work of a step by about 4 %.
"""

import dataclasses

from nla_jax import specs
from nla_jax.lm import attention_kernels, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.prompts import ARPrompt, AVPrompt


@dataclasses.dataclass(frozen=True)
class Known:
    """A target: its architecture, and the numbers of AV prompt tokens before and after the marker."""

    lm: LMConfig
    before: int
    after: int


def _gemma3(d_model, n_blocks, n_heads, n_kv_heads, head_dim, d_ff, query_scalar) -> LMConfig:
    return LMConfig(
        vocab_size=262208, d_model=d_model, n_blocks=n_blocks, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=head_dim, d_ff=d_ff, rope_theta=1e6, norm_eps=1e-6, tied=True, max_position=131072,
        rope_scaling=("linear", 8.0), window=1024, local=tuple((i + 1) % 6 != 0 for i in range(n_blocks)),
        local_rope_theta=1e4, qk_norm=True, post_norms=True, activation="gelu_tanh", scale_embed=True,
        query_scalar=query_scalar,
    )


KNOWN = {
    "Qwen/Qwen3.6-27B": Known(  # the text part
        LMConfig(
            vocab_size=248320, d_model=5120, n_blocks=64, n_heads=24, n_kv_heads=4, head_dim=256, d_ff=17408,
            rope_theta=1e7, norm_eps=1e-6, tied=False, max_position=262144, qk_norm=True, rotary_dim=64,
            attn_gate=True, linear=(True, True, True, False) * 16, delta=(16, 48, 128, 128, 4),
        ),
        before=38, after=13,  # the template closes an empty thought after the prompt
    ),
    "Qwen/Qwen2.5-7B-Instruct": Known(
        LMConfig(
            vocab_size=152064, d_model=3584, n_blocks=28, n_heads=28, n_kv_heads=4, head_dim=128, d_ff=18944,
            rope_theta=1e6, norm_eps=1e-6, tied=False, max_position=32768, qkv_bias=True,
        ),
        before=60, after=9,
    ),
    "google/gemma-3-12b-it": Known(_gemma3(3840, 48, 16, 8, 256, 15360, 256.0), before=42, after=9),
    "google/gemma-3-27b-it": Known(_gemma3(5376, 62, 32, 16, 128, 21504, 168.0), before=42, after=9),
    "meta-llama/Llama-3.3-70B-Instruct": Known(
        LMConfig(
            vocab_size=128256, d_model=8192, n_blocks=80, n_heads=64, n_kv_heads=8, head_dim=128, d_ff=28672,
            rope_theta=5e5, norm_eps=1e-5, tied=False, max_position=131072,
            rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192.0),
        ),
        before=66, after=9,
    ),
}


def spec_of(config, device=None) -> specs.Spec:
    """Return the Spec of a config whose target is in KNOWN, or is a local file or directory.

    device: a device that the steps are compiled for; None means plain attention. Raises UserError if the
    target cannot be read.
    """
    def kernel(lm):
        return attention_kernels.resolve(config.attention, device, lm, config.dtype) if device else "plain"

    if known := KNOWN.get(config.target):
        lm, layer = known.lm, config.layer if config.layer != -1 else known.lm.default_layer()
        av = AVPrompt(
            before=(0,) * known.before, marker=1, after=(0,) * known.after, open=(2, 3, 4), close=(5, 6, 7),
            newline=(8,), end_of_turn=9, eos=(9,), pad=9, injection=config.av.injection,
        )
        ar = ARPrompt((0,) * 4, (0,) * 8, 9)
        return specs.Spec(lm, layer, config.alpha or 1.0, av, ar, config.dtype, config.remat,
                          config.vocab_chunk, attention=kernel(lm))
    path = weights.resolve(config.target)
    tok = tok_lib.load(path)
    tok.chat_template = config.chat_template or tok.chat_template
    lm = weights.read_config(path)
    return specs.make_spec(
        lm, tok, layer=config.layer, dtype=config.dtype, alpha=config.alpha or 1.0,
        marker=config.marker, av_template=config.av_template, ar_template=config.ar_template,
        injection=config.av.injection, remat=config.remat, vocab_chunk=config.vocab_chunk,
        attention=kernel(lm),
    )
