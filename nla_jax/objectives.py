"""Every formula of the method as a plain function of arrays; see docs/method.md."""

import math

import jax
import jax.numpy as jnp

from nla_jax import layout
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import for_logits, unembed

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
    """Group-relative advantage [B, G].

    kind "mean": reward minus its group's mean (Dr. GRPO, arXiv:2503.20783); "zscore": that over
    the group's standard deviation (GRPO, arXiv:2402.03300).
    """
    centred = reward_BG - reward_BG.mean(1, keepdims=True)
    if kind == "mean":
        return centred
    return centred / (reward_BG.std(1, keepdims=True) + 1e-4)


def masked_mean(x, mask):
    """Mean of x where mask, 0 when nothing is masked in."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1.0)


def token_scores(params, cfg: LMConfig, hidden_ND, target_N, ref=None, chunk: int = 1024,
                 stats: bool = True):
    """Log-probability of each target and exact KL to a reference, without ever holding [N, V].

    Args:
      hidden_ND: hidden states that predict the targets.
      target_N: token ids.
      ref: None, or (params, hidden_ND) of the reference model at the same positions.
      chunk: positions whose logits exist at one time.
      stats: also the entropy and KL (else zeros): the supervised loss needs neither.

    Returns:
      (logp_N, entropy_N, kl_N); kl is KL(policy || reference) summed over the whole vocabulary,
      zeros without `ref`. No gradient flows through the entropy or the reference.
    """
    N = target_N.shape[0]
    n_chunks = max(1, -(-N // chunk))
    ways = layout.ways(N)  # each chunk takes its share of every device's rows
    size = -(-N // (n_chunks * ways))
    fill = n_chunks * size - N // ways
    params = for_logits(params, cfg)
    ref_params = None if ref is None else for_logits(ref[0], cfg)

    def cut(a):
        a = layout.rows(a).reshape(ways, N // ways, *a.shape[1:])
        a = jnp.pad(a, ((0, 0), (0, fill), *((0, 0),) * (a.ndim - 2)))
        a = a.reshape(ways, n_chunks, size, *a.shape[2:]).swapaxes(0, 1)
        return layout.rows(a, 1) if ways > 1 else a[:, 0]

    @jax.checkpoint
    def one(args):
        # Sums of p * logits rather than log-softmaxes: each pass over [chunk, V] costs.
        x, target, x_ref = args
        logits = unembed(params, cfg, x)
        lse = jax.nn.logsumexp(logits, -1)
        logp = _picked(logits, target) - lse
        if not stats:
            return logp, jnp.zeros_like(logp), jnp.zeros_like(logp)
        p_V = jnp.exp(logits - lse[..., None])
        entropy = jax.lax.stop_gradient(lse - jnp.sum(p_V * logits, -1))
        if ref is None:
            return logp, entropy, jnp.zeros_like(logp)
        ref_logits = jax.lax.stop_gradient(unembed(ref_params, cfg, x_ref))
        ref_lse = jax.nn.logsumexp(ref_logits, -1)
        kl = jnp.sum(p_V * (logits - ref_logits), -1) - lse + ref_lse
        return logp, entropy, kl

    x_ref = hidden_ND[:, :0] if ref is None else ref[1]
    out = jax.lax.map(one, (cut(hidden_ND), cut(target_N), cut(x_ref)))
    if ways == 1:
        return tuple(a.reshape(-1)[:N] for a in out)
    back = lambda a: layout.rows(a.swapaxes(0, 1)).reshape(ways, -1)[:, : N // ways]  # noqa: E731
    return tuple(layout.rows(back(a).reshape(N)) for a in out)


def _picked(logits_V, target):
    """logits_V[..., target]; on a mesh without a gather from the vocabulary, which is split."""
    if not layout.active():
        return jnp.take_along_axis(logits_V, target[..., None], -1)[..., 0]
    here = jnp.arange(logits_V.shape[-1]) == target[..., None]
    return jnp.sum(jnp.where(here, logits_V, 0.0), -1)
