"""Every formula of the method as a plain function of arrays. Sources are named; see docs/method.md."""

import math

import jax
import jax.numpy as jnp

from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import unembed

FAILED_MSE = 2.0  # 2(1 - cos) of an orthogonal vector: what an answer that cannot be read scores


def to_sqrt_d(h):
    """h scaled to norm sqrt(D) along its last axis, float32."""
    h = h.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(h * h, -1, keepdims=True), 1e-12))
    return h * (math.sqrt(h.shape[-1]) / norm)


def scaled_mse(h_hat, h):
    """Mean squared difference [...] after both are scaled to norm sqrt(D): equals 2(1 - cos)."""
    return jnp.mean(jnp.square(to_sqrt_d(h_hat) - to_sqrt_d(h)), -1)


def reward(mse, ok, kind: str):
    """Reward of an explanation [...] from its scaled MSE.

    kind "mse": -MSE; "log_mse": -log MSE. Where `ok` is False (no closing tag, cut at the cap) the
    reward is that of an orthogonal reconstruction, -2 or -log 2.
    """
    mse = jnp.where(ok, mse, FAILED_MSE)
    return -mse if kind == "mse" else -jnp.log(jnp.maximum(mse, 1e-8))


def advantages(reward_BG, kind: str):
    """Group-relative advantage [B, G]: reward minus its group's mean ("mean", Dr. GRPO), divided by the
    group's standard deviation as well for "zscore" (GRPO, arXiv:2402.03300)."""
    centred = reward_BG - reward_BG.mean(1, keepdims=True)
    if kind == "mean":
        return centred
    return centred / (reward_BG.std(1, keepdims=True) + 1e-4)


def masked_mean(x, mask):
    """Mean of x where mask, 0 when nothing is masked in."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1.0)


def token_scores(params, cfg: LMConfig, hidden_ND, target_N, ref=None, chunk: int = 1024):
    """Log-probability of each target and exact KL to a reference, without ever holding [N, V].

    Args:
      hidden_ND: hidden states that predict the targets.
      target_N: token ids.
      ref: None, or (params, hidden_ND) of the reference model at the same positions.
      chunk: positions whose logits exist at one time.

    Returns:
      (logp_N, entropy_N, kl_N); kl is KL(policy || reference) summed over the whole vocabulary, zeros without
      `ref`.
    """
    N = target_N.shape[0]
    n_chunks = max(1, -(-N // chunk))
    size = -(-N // n_chunks)
    fill = n_chunks * size - N

    def cut(a):
        a = jnp.pad(a, ((0, fill), *((0, 0),) * (a.ndim - 1)))
        return a.reshape(n_chunks, size, *a.shape[1:])

    @jax.checkpoint
    def one(args):
        x, target, x_ref = args
        logp_V = jax.nn.log_softmax(unembed(params, cfg, x))
        p_V = jnp.exp(logp_V)
        logp = jnp.take_along_axis(logp_V, target[:, None], 1)[:, 0]
        if ref is None:
            kl = jnp.zeros_like(logp)
        else:
            ref_V = jax.nn.log_softmax(unembed(ref[0], cfg, x_ref))
            kl = jnp.sum(p_V * (logp_V - jax.lax.stop_gradient(ref_V)), -1)
        return logp, jax.lax.stop_gradient(-jnp.sum(p_V * logp_V, -1)), kl

    x_ref = hidden_ND[:, :0] if ref is None else ref[1]
    out = jax.lax.map(one, (cut(hidden_ND), cut(target_N), cut(x_ref)))
    return tuple(a.reshape(-1)[:N] for a in out)
