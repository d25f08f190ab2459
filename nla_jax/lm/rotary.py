"""Rotary position embedding."""

import math

import jax.numpy as jnp

from nla_jax.lm.config import LMConfig


def frequencies(cfg: LMConfig, local: bool = False):
    """Return the rotation per position of each pair of a head: radians [d/2].

    "linear" divides all frequencies by a factor. "llama3" (Llama 3.1) counts turns over the original length.
    It divides frequencies below `low` turns, keeps those above `high`, and interpolates between. "yarn"
    (arXiv:2309.00071) does so between the pairs that make `fast` and `slow` turns. "proportional" rotates
    the first pairs of a head only.
    """
    half = (cfg.rotary_dim or cfg.kv_heads(local)[1]) // 2
    own_base = local and cfg.local_rope_theta is not None
    theta = cfg.local_rope_theta if own_base else cfg.rope_theta
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    match () if own_base else cfg.rope_scaling:
        case ("linear", factor):
            freq = freq / factor
        case ("llama3", factor, low, high, length):
            turns = length * freq / (2 * math.pi)
            keep = jnp.clip((turns - low) / (high - low), 0, 1)
            freq = (1 - keep) * freq / factor + keep * freq
        case ("yarn", factor, fast, slow, length, _):
            at = lambda turns: half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)
            low, high = max(math.floor(at(fast)), 0), min(math.ceil(at(slow)), 2 * half - 1)
            high = high + 0.001 if low == high else high
            far = jnp.clip((jnp.arange(half, dtype=jnp.float32) - low) / (high - low), 0, 1)
            freq = far * freq / factor + (1 - far) * freq
        case ("proportional", share):
            freq = jnp.where(jnp.arange(half) < int(share * 2 * half // 2), freq, 0.0)
    return freq


def rotary(pos_BT, cfg: LMConfig, local: bool = False):
    """Return cos and sin [B, T, 1, n] of n pairs: d/2, or fewer by `LMConfig.rotary_dim`.

    Angles are float32, because bfloat16 rounds position 257 to 256.
    """
    angle = pos_BT.astype(jnp.float32)[..., None, None] * frequencies(cfg, local)[None, None, None]
    if cfg.rope_scaling[:1] == ("yarn",) and not (local and cfg.local_rope_theta is not None):
        return jnp.cos(angle) * cfg.rope_scaling[-1], jnp.sin(angle) * cfg.rope_scaling[-1]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd, cos, sin):
    """Apply rotary embedding in Hugging Face's convention: the n pairs are n apart, not interleaved."""
    if (n := 2 * cos.shape[-1]) < x_BTHd.shape[-1]:  # the rest of a head is not rotated
        return jnp.concatenate([rotate(x_BTHd[..., :n], cos, sin), x_BTHd[..., n:]], -1)
    a, b = jnp.split(x_BTHd, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
