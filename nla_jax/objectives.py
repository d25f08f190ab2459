"""Every formula of the method as a plain function of arrays; see docs/method.md."""

import functools
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


def _head(params: dict) -> dict:
    """What of a model's parameters `unembed` reads."""
    return {name: params[name] for name in ("final_norm", "embed", "lm_head") if name in params}


def _scores(logits_NV, target_N, ref_logits_NV, stats: bool):
    """(logp, entropy, kl), each [N], and what gradients need: logsumexp [N] and sum p (l - l_ref) [N].

    Sums of p * logits rather than log-softmaxes: each pass over [N, V] costs.
    """
    lse = jax.nn.logsumexp(logits_NV, -1)
    logp = jnp.take_along_axis(logits_NV, target_N[:, None], 1)[:, 0] - lse
    zero = jnp.zeros_like(logp)
    if not stats:
        return (logp, zero, zero), (lse, zero)
    p_NV = jnp.exp(logits_NV - lse[:, None])
    entropy = lse - jnp.sum(p_NV * logits_NV, -1)
    if ref_logits_NV is None:
        return (logp, entropy, zero), (lse, zero)
    apart = jnp.sum(p_NV * (logits_NV - ref_logits_NV), -1)
    kl = apart - lse + jax.nn.logsumexp(ref_logits_NV, -1)
    return (logp, entropy, kl), (lse, apart)


def _in_chunks(one, chunk: int, rows: tuple, first=None):
    """`one(carry, part) -> (carry, out)` over the rows in equal parts of at most `chunk`, the last one
    filled up with zeros: (carry, out of all rows)."""
    N = jax.tree.leaves(rows)[0].shape[0]
    n = max(1, -(-N // chunk))
    size = -(-N // n)

    def cut(a):
        a = jnp.pad(a, ((0, n * size - N), *((0, 0),) * (a.ndim - 1)))
        return a.reshape(n, size, *a.shape[1:])

    carry, out = jax.lax.scan(one, first, jax.tree.map(cut, rows))
    return carry, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:N], out)


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
      zeros without `ref`. Meant for figures: what is trained takes `weighted_scores`.
    """
    x_ref = hidden_ND[:, :0] if ref is None else ref[1]

    def one(_, part):
        x, target, x_ref = part
        ref_logits = None if ref is None else unembed(ref[0], cfg, x_ref)
        return None, _scores(unembed(params, cfg, x), target, ref_logits, stats)[0]

    return _in_chunks(one, chunk, (hidden_ND, target_N, x_ref))[1]


def weighted_scores(params, cfg: LMConfig, hidden_ND, target_N, weight_N, kl_weight_N=None, ref=None,
                    chunk: int = 1024, stats: bool = True):
    """sum(weight * logp + kl_weight * kl) and, without gradient, (logp_N, entropy_N, kl_N) as `token_scores`.

    Where it is differentiated, the gradient for hidden states and unembedding is made in the forward pass,
    while a chunk's logits are at hand: they are computed once, and not again in the backward pass. With p the
    policy's probabilities, l its logits and l' the reference's,

        d/dl = weight (onehot - p) + kl_weight p (l - l' - sum p (l - l'))

    Args:
      weight_N, kl_weight_N: constants; no gradient flows to them or to the reference.
    """
    kl_weight_N = jnp.zeros_like(weight_N) if kl_weight_N is None else kl_weight_N
    weights = jax.lax.stop_gradient((weight_N, kl_weight_N))
    reference = jax.lax.stop_gradient(None if ref is None else (_head(ref[0]), ref[1]))
    return _weighted(cfg, chunk, stats, _head(params), hidden_ND, target_N, weights, reference)


def _weighted_chunks(cfg, chunk, stats, head, hidden_ND, target_N, weights, reference, wanted):
    """(value, scores of all rows), gradients of the head and of hidden_ND; `wanted`: which of the two are."""
    x_ref = hidden_ND[:, :0] if reference is None else reference[1]
    of_head, of_hidden = wanted

    def one(carry, part):
        x, target, (weight, kl_weight), x_ref = part
        ref_logits = None if reference is None else unembed(reference[0], cfg, x_ref)
        if of_head:
            logits, back = jax.vjp(lambda head, x: unembed(head, cfg, x), head, x)
        elif of_hidden:
            logits, back = jax.vjp(lambda x: unembed(head, cfg, x), x)
        else:
            logits, back = unembed(head, cfg, x), None
        scores, (lse, apart) = _scores(logits, target, ref_logits, stats)
        value, sums = carry
        value += jnp.sum(weight * scores[0] + kl_weight * scores[2])
        if back is None:
            return (value, sums), (scores, None)
        slope = -weight[:, None]
        if ref_logits is not None and stats:
            slope += kl_weight[:, None] * (logits - ref_logits - apart[:, None])
        hit = jnp.arange(logits.shape[-1]) == target[:, None]
        *g_head, g_x = back(jnp.exp(logits - lse[:, None]) * slope + jnp.where(hit, weight[:, None], 0.0))
        return (value, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, tuple(g_head))), (scores, g_x)

    zeros = (jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head),) if of_head else ()
    (value, sums), (scores, g_x) = _in_chunks(
        one, chunk, (hidden_ND, target_N, weights, x_ref), (jnp.float32(0), zeros))
    return (value, scores), (sums, g_x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted(cfg, chunk, stats, head, hidden_ND, target_N, weights, reference):
    given = (head, hidden_ND, target_N, weights, reference)
    return _weighted_chunks(cfg, chunk, stats, *given, wanted=(False, False))[0]


def _weighted_fwd(cfg, chunk, stats, head, hidden_ND, target_N, weights, reference):
    given = (head, hidden_ND, target_N, weights, reference)
    is_leaf = lambda a: isinstance(a, jax.custom_derivatives.CustomVJPPrimal)  # noqa: E731
    wanted = tuple(any(a.perturbed for a in jax.tree.leaves(t, is_leaf=is_leaf)) for t in given[:2])
    plain = jax.tree.map(lambda a: a.value, given, is_leaf=is_leaf)
    out, (sums, g_x) = _weighted_chunks(cfg, chunk, stats, *plain, wanted)
    kinds = jax.tree.map(lambda a: jnp.zeros((0,), a.dtype), plain[:2])
    return out, (sums, g_x if wanted[1] else None, kinds)


def _weighted_bwd(cfg, chunk, stats, residual, g):
    sums, g_x, (head, hidden) = residual
    scale = g[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    times = lambda a, like: (scale * a).astype(like.dtype)  # noqa: E731
    g_head = jax.tree.map(times, sums[0], head) if sums else None
    return g_head, None if g_x is None else times(g_x, hidden), None, None, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd, symbolic_zeros=True)
