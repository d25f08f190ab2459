"""Random tiny models of every family beside transformers' own, and how far apart the two are.

All parts differ from what they start as: windows are shorter than the texts, texts longer than what
rotary embedding was scaled for, soft caps bite, biases and norm weights are spread around.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from nla_jax import target
from nla_jax.lm import generate, kv_cache, model, weights
from nla_jax.lm.config import LMConfig
from tests.helpers import tiny

LENGTHS = np.array([300, 230, 120])
WINDOW = 37

SIZE = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW, tie_word_embeddings=True)
GEMMA3 = dict(
    GEMMA, num_hidden_layers=7, rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
)
ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = dict(
    rope_type="yarn", rope_theta=100.0, factor=8.0, original_max_position_embeddings=64, beta_fast=8.0)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24)
HYBRID = dict(
    num_hidden_layers=4, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=12, linear_conv_kernel_dim=4,
    rope_parameters=dict(ROPE, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
)
GEMMA4 = dict(
    head_dim=16, sliding_window=WINDOW, hidden_size_per_layer_input=0, attention_k_eq_v=True,
    global_head_dim=32, num_global_key_value_heads=1, final_logit_softcapping=2.0,
    layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    rope_parameters={
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000.0, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
)
WINDOWED = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
CASES = {  # name -> (kind of configuration, what it says beside SIZE)
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama linear": ("Llama", dict(
        head_dim=16, rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0))),
    "mistral": ("Mistral", dict(sliding_window=WINDOW, tie_word_embeddings=False)),
    "mistral tied global": ("Mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 window untied": ("Qwen2", dict(WINDOWED, tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3 window untied": ("Qwen3", dict(WINDOWED, head_dim=8, tie_word_embeddings=False)),
    "gemma2": ("Gemma2", dict(GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=2.0)),
    "olmo2": ("Olmo2", dict(num_key_value_heads=4, rope_parameters=ROPE)),
    "olmo2 tied": ("Olmo2", dict(tie_word_embeddings=True, rope_parameters=ROPE)),
    "olmo3": ("Olmo3", dict(sliding_window=WINDOW, rope_parameters={
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}})),
    "phi3": ("Phi3", dict(head_dim=16, sliding_window=WINDOW, rope_parameters=dict(
        ROPE, partial_rotary_factor=0.75))),
    "phi3 global": ("Phi3", dict(num_key_value_heads=4, sliding_window=None, tie_word_embeddings=True,
                                 rope_parameters=ROPE)),
    "qwen3_moe": ("Qwen3Moe", dict(EXPERTS, head_dim=16, norm_topk_prob=True)),
    "qwen3_moe tied": ("Qwen3Moe", dict(EXPERTS, num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen3_5_text": ("Qwen3_5Text", HYBRID),
    "qwen3_5": ("Qwen3_5", dict(HYBRID, num_hidden_layers=5, tie_word_embeddings=True)),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", dict(HYBRID, **EXPERTS, shared_expert_intermediate_size=40)),
    "gemma3_text": ("Gemma3Text", GEMMA3),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma4_text": ("Gemma4Text", dict(
        GEMMA4, enable_moe_block=True, num_experts=8, top_k_experts=3, moe_intermediate_size=24)),
    "gemma4_text untied": ("Gemma4Text", dict(
        GEMMA4, tie_word_embeddings=False, num_key_value_heads=4, attention_k_eq_v=False,
        final_logit_softcapping=None)),
    "gemma4": ("Gemma4", dict(GEMMA4, use_bidirectional_attention="vision")),
}


def torch_config(name, **changes):
    kind, settings = CASES[name]
    settings = copy.deepcopy({**SIZE, **settings, **changes})  # transformers changes dicts in place
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    if kind == "Gemma3":
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, image_size=28, patch_size=14)
        return transformers.Gemma3Config(
            text_config=settings, vision_config={"model_type": "siglip_vision_model", **vision},
            mm_tokens_per_image=4, image_token_index=98, boi_token_index=97, eoi_token_index=96,
        )
    if kind == "Qwen3_5":
        vision = dict(hidden_size=16, intermediate_size=16, depth=1, num_heads=2, out_hidden_size=32)
        return transformers.Qwen3_5Config(
            text_config=settings, vision_config=vision, image_token_id=98, video_token_id=97,
            vision_start_token_id=96, vision_end_token_id=95,
            tie_word_embeddings=settings["tie_word_embeddings"],
        )
    if kind == "Gemma4":
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=16)
        return transformers.Gemma4Config(text_config=settings, vision_config=vision, image_token_id=98)
    return getattr(transformers, f"{kind}Config")(**settings)


def torch_class(name):
    kind = CASES[name][0]
    if kind == "Gemma3":
        return transformers.Gemma3ForConditionalGeneration
    if kind == "Qwen3_5":
        return transformers.Qwen3_5ForConditionalGeneration
    if kind == "Gemma4":
        return transformers.Gemma4ForConditionalGeneration
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")


def torch_model(name, **changes):
    """A random model: matrices keep the size of what they multiply, the rest is spread around."""
    torch.manual_seed(0)
    net = torch_class(name)(torch_config(name, **changes))
    scales = [(key, p) for key, p in net.named_buffers() if key.endswith("layer_scalar")]
    for key, p in [*net.named_parameters(), *scales]:
        if "A_log" in key:  # decays that remember hundreds of tokens
            p.data.normal_(mean=-3.0)
        elif "norm" in key or key.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
            p.data += 0.3 * torch.randn_like(p)
            if key.endswith("router.scale"):  # smaller scores would choose by chance
                p.data *= p.shape[-1] ** 0.5
            elif "Gemma4" in CASES[name][0] and "q_norm" in key:  # which divides scores there
                p.data *= p.shape[-1] ** -0.5
        elif p.ndim > 1:
            p.data.normal_(std=p.shape[-1] ** -0.5)
        else:
            p.data.normal_(std=0.5)
    return net


def read_torch(folder, kind, dtype=torch.float32):
    net, info = kind.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return net.eval()


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    folder: object
    net: object  # transformers, read back from `folder`
    cfg: LMConfig
    params: dict


@functools.cache
def made(name, root):
    folder = root / name.replace(" ", "_")
    torch_model(name).save_pretrained(folder)
    cfg, params = weights.load(folder)
    return Pair(name, folder, read_torch(folder, torch_class(name)), cfg, params)


def torch_forward(net, ids_BT, valid_BT):
    """(logits_BTV, the output of every block), positions counting real tokens only."""
    inner = net.model.language_model if hasattr(net.model, "language_model") else net.model
    states = []

    def keep(module, args, out):
        states.append((out[0] if isinstance(out, tuple) else out).float().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in inner.layers]
    positions = np.maximum(np.cumsum(valid_BT, 1) - 1, 0)
    with torch.no_grad():
        out = net(
            input_ids=torch.tensor(ids_BT, dtype=torch.long),
            attention_mask=torch.tensor(valid_BT.astype(np.int64)),
            position_ids=torch.tensor(positions, dtype=torch.long), use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    return out.logits.float().numpy(), states


def texts(side="right"):
    """650 tokens in rows of three lengths; garbage stands in the padding."""
    ids_BT = tiny.random_ids(np.random.default_rng(0), (3, 300), 90)
    valid_BT = np.arange(300)[None] < LENGTHS[:, None]
    assert valid_BT.sum() >= 600
    return ids_BT, valid_BT[:, ::-1].copy() if side == "left" else valid_BT


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, cfg, ids_BT, valid_BT):
    x, _ = model.forward(params, cfg, model.embed(params, cfg, ids_BT), valid_BT)
    return model.unembed(params, cfg, x)


capture = jax.jit(target.capture, static_argnums=(1, 2), static_argnames="lead")


# How far apart


def logits_errors(pair: Pair, params, side="right") -> tuple[float, float]:
    """(largest, root mean square) difference of logits over the root mean square of transformers'.

    `params` are the pair's, or those in another dtype; transformers always computes in float32.
    """
    ids_BT, valid_BT = texts(side)
    want = torch_forward(pair.net, ids_BT, valid_BT)[0][valid_BT]
    return _errors(np.asarray(logits_of(params, pair.cfg, ids_BT, valid_BT))[valid_BT], want)


def torch_bfloat16_errors(pair: Pair) -> tuple[float, float]:
    """`logits_errors` of transformers' own model in bfloat16."""
    ids_BT, valid_BT = texts()
    low = read_torch(pair.folder, torch_class(pair.name), torch.bfloat16)
    got, want = (torch_forward(net, ids_BT, valid_BT)[0][valid_BT] for net in (low, pair.net))
    return _errors(got, want)


def _errors(got, want) -> tuple[float, float]:
    return tiny.relative(got, want), float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def hidden_error(pair: Pair, params, side="right") -> float:
    """The largest difference of any block's output over that output's root mean square."""
    ids_BT, valid_BT = texts(side)
    states = torch_forward(pair.net, ids_BT, valid_BT)[1]
    assert len(states) == pair.cfg.n_blocks
    every = np.where(valid_BT, np.arange(300), -1)
    captured = (capture(params, pair.cfg, k, ids_BT, valid_BT, every) for k in range(len(states)))
    return max(tiny.relative(h[valid_BT], s[valid_BT]) for h, s in zip(captured, states, strict=True))


def decoding_error(pair: Pair) -> float:
    """Logits of 60 tokens, one at a time after a prefill of 20, against the forward pass of all.

    Three rows, one with padding on the left; over the root mean square, in float32.
    """
    n, T, cfg, params = 20, 80, pair.cfg, pair.params
    ids_BT = tiny.random_ids(np.random.default_rng(3), (3, T), 90)
    valid_BT = np.ones((3, T), bool)
    valid_BT[1, :7] = False
    want = logits_of(params, cfg, ids_BT, valid_BT)

    @jax.jit
    def decode(params):
        w = generate.decode_weights(params, cfg, jnp.float32)
        x = model.embed(params, cfg, ids_BT[:, :n])
        _, kv = model.forward(params, cfg, x, valid_BT[:, :n], keep_kv=True)
        prompt = kv_cache.make_levels(kv, 3, jnp.float32)
        written = kv_cache.allocate(cfg, cfg.n_blocks, want[:, n], T - n, jnp.float32, last=kv)

        def step(written, slot):
            logits, written = generate._decode_token(
                w, cfg, jnp.array(ids_BT)[:, n + slot], slot, prompt, written)
            return written, logits

        return jax.lax.scan(step, written, jnp.arange(T - n))[1]

    logits = np.swapaxes(decode(params), 0, 1)
    return tiny.relative(logits, want[:, n:])
