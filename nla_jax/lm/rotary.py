"""Rotary position embedding."""

import math

import jax.numpy as jnp

from nla_jax.lm.config import LMConfig


def frequencies(cfg: LMConfig, local: bool = False):
    """Radians [d/2] by which each pair of a head turns from one position to the next.

    "linear" divides all by a factor. "llama3" (Llama 3.1) divides those that turn fewer than `low`
    times over the original length, keeps those that turn more than `high` times, and mixes between.
    """
    half = cfg.head_dim // 2
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
    return freq


def rotary(pos_BT, cfg: LMConfig, local: bool = False):
    """cos and sin [B, T, 1, d/2]; angles in float32 (in bfloat16 position 257 equals 256)."""
    angle = pos_BT.astype(jnp.float32)[..., None, None] * frequencies(cfg, local)[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd, cos, sin):
    """Rotary embedding, halves convention (Hugging Face's, not interleaved)."""
    a, b = jnp.split(x_BTHd, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
