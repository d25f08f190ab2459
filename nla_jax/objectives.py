"""The formulas of the method as functions of arrays; see docs/method.md."""

import functools
import math

import jax
import jax.numpy as jnp

from nla_jax.lm.config import LMConfig
from nla_jax.lm.loss_weights import POLICY_LOSSES
from nla_jax.lm.model import unembed, unembed_params
from nla_jax.sharding import placement
from nla_jax.util.choices import choose

FAILED_MSE = 2.0  # 2(1 - cos) of an orthogonal vector: the score of an answer that cannot be parsed


def to_sqrt_d(h):
    """Scale h to norm sqrt(D) along its last axis, in float32."""
    h = h.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(h * h, -1, keepdims=True), 1e-12))
    return h * (math.sqrt(h.shape[-1]) / norm)


def scaled_mse(h_hat, h):
    """Return the mean squared difference [...] after scaling both to norm sqrt(D): 2(1 - cos)."""
    return jnp.mean(jnp.square(to_sqrt_d(h_hat) - to_sqrt_d(h)), -1)


REWARDS = {
    "mse": lambda mse: -mse,
    "log_mse": lambda mse: -jnp.log(jnp.maximum(mse, 1e-8)),
}


def reward(mse, ok, kind: str):
    """Return the reward [...] of explanations from their scaled MSE [...].

    kind: a name of REWARDS ("mse": -MSE; "log_mse": -log MSE), or "module:function" of your own
    (docs/howto/own.md).
    If `ok` is False (no closing tag, or truncated at the cap), the MSE is that of an orthogonal
    reconstruction, 2.
    Raises UserError for an unknown kind.
    """
    return choose(REWARDS, kind, "rl.reward")(jnp.where(ok, mse, FAILED_MSE))


def _subtract_group_mean(reward_BG):
    return reward_BG - reward_BG.mean(1, keepdims=True)


def has_spread(reward_BG):
    """Return whether the rewards of each group [B] differ. A group without spread teaches nothing."""
    return reward_BG.max(1) > reward_BG.min(1)


def _over_batch_std(reward_BG):
    """Divide the mean-free rewards by their root mean square over all groups that have a spread."""
    free_BG = _subtract_group_mean(reward_BG)
    count = jnp.maximum(has_spread(reward_BG).sum() * reward_BG.shape[1], 1).astype(jnp.float32)
    return free_BG / (jnp.sqrt(jnp.sum(free_BG**2) / count) + 1e-4)


ADVANTAGES = {
    "mean": _subtract_group_mean,
    "batch": _over_batch_std,
    "zscore": lambda reward_BG: _subtract_group_mean(reward_BG) / (reward_BG.std(1, keepdims=True) + 1e-4),
}


def advantages(reward_BG, kind: str):
    """Return the group-relative advantage [B, G].

    kind: a name of ADVANTAGES, or "module:function" of your own. "mean": reward minus its group's mean
    (Dr. GRPO, arXiv:2503.20783). "zscore": "mean" divided by the group's standard deviation (GRPO,
    arXiv:2402.03300). "batch": "mean" divided by its standard deviation over the batch's groups that have a
    spread (ScaleRL, arXiv:2510.13786).
    Raises UserError for an unknown kind.
    """
    return choose(ADVANTAGES, kind, "rl.advantage")(reward_BG)


def length_cost(length, cap: int, free: int = 0):
    """Return the length penalty [...], linear in the length in tokens: 0 up to `free`, 1 at the cap.

    With free > 0 it is a hinge: only answers longer than `free` are penalised.
    """
    return jnp.maximum(length - free, 0).astype(jnp.float32) / (cap - free)


def most_different(reward_BG, k: int):
    """Return indices [B, k] of the k // 2 lowest and the k - k // 2 highest rewards of each group.

    The k rewards of largest variance are always lowest and highest ones (arXiv:2504.13818).
    """
    order_BG = jnp.argsort(reward_BG, 1)
    return jnp.concatenate([order_BG[:, : k // 2], order_BG[:, reward_BG.shape[1] - (k - k // 2) :]], 1)


def masked_mean(x, mask):
    """Return the mean of x where mask is True, and 0 if it is nowhere True."""
    mask = mask.astype(jnp.float32)
    return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1.0)


def _target_logit(logits_V, target):
    """Return logits_V[..., target]. On a mesh it is a masked sum, because the vocabulary is sharded."""
    if not placement.has_mesh():
        return jnp.take_along_axis(logits_V, target[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(_is_target(logits_V, target), logits_V, 0.0), -1)


def _is_target(logits_V, target):
    """[..., V]: whether a token of the vocabulary is the target."""
    ids = jnp.arange(logits_V.shape[-1])
    return jax.lax.broadcast_to_rank(ids, logits_V.ndim) == target[..., None]


def _exponentials(logits_V):
    """Return (the largest logit [...], e^(logits - largest) [..., V], their sum [...])."""
    most = jax.lax.stop_gradient(jnp.max(logits_V, -1))
    exp_V = jnp.exp(logits_V - most[..., None])
    return most, exp_V, jnp.sum(exp_V, -1)


def _scores(logits_V, target, ref_logits_V, stats: bool):
    """Return (logp, entropy, kl) of logits [..., V], and for the gradients p and sum p (l - l_ref).

    Passes over the vocabulary are expensive. Each exponential is therefore computed once, and expectations
    are sums of exponentials times logits instead of log-softmaxes. The largest logit is subtracted first,
    for precision.
    """
    most, exp_V, total = _exponentials(logits_V)
    lse = jnp.log(total) + most
    logp = _target_logit(logits_V, target) - lse
    zero = jnp.zeros_like(logp)
    p_V = exp_V / total[..., None]
    if not stats:
        return (logp, zero, zero), (p_V, zero)
    mean = jnp.sum(exp_V * (logits_V - most[..., None]), -1) / total  # E[l] - largest
    entropy = jnp.log(total) - mean
    if ref_logits_V is None:
        return (logp, entropy, zero), (p_V, zero)
    ref_most, _, ref_total = _exponentials(ref_logits_V)
    ref_mean = jnp.sum(exp_V * (ref_logits_V - ref_most[..., None]), -1) / total
    kl = jnp.log(ref_total) - ref_mean - entropy
    return (logp, entropy, kl), (p_V, mean + most - ref_mean - ref_most)


def _in_chunks(one, chunk: int, rows, first=None):
    """Scan `one(carry, part) -> (carry, out)` over all rows: (carry, out of all rows).

    The parts have equal size, at most `chunk`; the last is padded with zeros. On a mesh a part is
    [devices, rows of each, ...].
    """
    N = jax.tree.leaves(rows)[0].shape[0]
    n = max(1, -(-N // chunk))
    ways = placement.n_shards(N)  # each part contains an equal number of rows from every device
    size = -(-N // (n * ways))

    def cut(a):
        a = placement.shard_rows(a).reshape(ways, N // ways, *a.shape[1:])
        a = jnp.pad(a, ((0, 0), (0, n * size - N // ways), *((0, 0),) * (a.ndim - 2)))
        a = a.reshape(ways, n, size, *a.shape[2:]).swapaxes(0, 1)
        return placement.shard_rows(a, 1) if ways > 1 else a[:, 0]

    def whole(a):
        if ways == 1:
            return a.reshape(-1, *a.shape[2:])[:N]
        a = placement.shard_rows(a.swapaxes(0, 1)).reshape(ways, n * size, *a.shape[3:])[:, : N // ways]
        return placement.shard_rows(a.reshape(N, *a.shape[2:]))

    carry, out = jax.lax.scan(one, first, jax.tree.map(cut, rows))
    return carry, jax.tree.map(whole, out)


def token_scores(params, cfg: LMConfig, hidden_ND, target_N, ref=None, chunk: int = 1024,
                 stats: bool = True):
    """Compute the log-probability of each target and the exact KL to a reference, without storing [N, V].

    Args:
      hidden_ND: hidden states that predict the targets.
      target_N: token ids.
      ref: None, or (params, hidden_ND) of the reference model at the same positions.
      chunk: number of positions whose logits are in memory at once.
      stats: compute entropy and KL too; else they are zeros. The supervised loss needs neither.

    Returns:
      (logp_N, entropy_N, kl_N) in nats; kl is KL(policy || reference) summed over the whole vocabulary,
      zeros without `ref`. Use it for evaluation; training uses `weighted_scores`.
    """
    head, (ref_head, x_ref) = unembed_params(params, cfg), _reference(ref, cfg)

    def one(_, part):
        x, target, x_ref = part
        ref_logits = None if ref is None else unembed(ref_head, cfg, x_ref)
        return None, _scores(unembed(head, cfg, x), target, ref_logits, stats)[0]

    return _in_chunks(one, chunk, (hidden_ND, target_N, x_ref))[1]


def _reference(ref, cfg: LMConfig):
    return (None, None) if ref is None else (unembed_params(ref[0], cfg), ref[1])


def weighted_scores(params, cfg: LMConfig, hidden_ND, target_N, weight_N, kl_weight_N=None, ref=None,
                    chunk: int = 1024, stats: bool = True, policy: str = "reinforce", sampled_logp_N=None):
    """Return sum(weight * logp + kl_weight * kl) and, without gradient, the result of `token_scores`.

    Under differentiation, the forward pass also computes the gradients of hidden states and unembedding,
    while a chunk's logits are in memory. The backward pass would otherwise compute the logits again. With p
    the policy's probabilities, l its logits and l' the reference's,

        d/dl = weight (onehot - p) + kl_weight p (l - l' - sum p (l - l'))

    Args:
      weight_N, kl_weight_N: constants; no gradient flows to them or to the reference.
      policy: a name of POLICY_LOSSES, whose factor multiplies weight. sampled_logp_N: the log-probabilities
        when the targets were sampled, of which factors other than 1 need the ratio.
    """
    kl_weight_N = jnp.zeros_like(weight_N) if kl_weight_N is None else kl_weight_N
    old_N = sampled_logp_N if POLICY_LOSSES[policy] else None
    weights = jax.lax.stop_gradient((weight_N, kl_weight_N, old_N))
    reference = jax.lax.stop_gradient(_reference(ref, cfg))
    static = (cfg, chunk, stats, policy)
    return _weighted(static, unembed_params(params, cfg), hidden_ND, target_N, weights, reference)


def _weighted_chunks(static, head, hidden_ND, target_N, weights, reference, wanted):
    """Return ((value, scores of all rows), (gradients of the head, gradient of hidden_ND)).

    wanted: two booleans that say which of the two gradients to compute.
    """
    cfg, chunk, stats, policy = static
    ref_head, x_ref = reference
    of_head, of_hidden = wanted

    def one(carry, part):
        x, target, (weight, kl_weight, old_logp), x_ref = part
        ref_logits = None if x_ref is None else unembed(ref_head, cfg, x_ref)
        if of_head:
            logits, back = jax.vjp(lambda head, x: unembed(head, cfg, x), head, x)
        elif of_hidden:
            logits, back = jax.vjp(lambda x: unembed(head, cfg, x), x)
        else:
            logits, back = unembed(head, cfg, x), None
        scores, (p_V, apart) = _scores(logits, target, ref_logits, stats)
        if old_logp is not None:
            weight = weight * POLICY_LOSSES[policy](jnp.exp(scores[0] - old_logp))
        value, sums = carry
        value += jnp.sum(weight * scores[0] + kl_weight * scores[2])
        if back is None:
            return (value, sums), (scores, None)
        slope = -weight[..., None]
        if ref_logits is not None and stats:
            slope += kl_weight[..., None] * (logits - ref_logits - apart[..., None])
        hit = jnp.where(_is_target(logits, target), weight[..., None], 0.0)
        *g_head, g_x = back(p_V * slope + hit)
        return (value, jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, tuple(g_head))), (scores, g_x)

    zeros = (jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head),) if of_head else ()
    (value, sums), (scores, g_x) = _in_chunks(
        one, chunk, (hidden_ND, target_N, weights, x_ref), (jnp.float32(0), zeros))
    return (value, scores), (sums, g_x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(static, head, hidden_ND, target_N, weights, reference):
    given = (head, hidden_ND, target_N, weights, reference)
    return _weighted_chunks(static, *given, wanted=(False, False))[0]


def _weighted_fwd(static, head, hidden_ND, target_N, weights, reference):
    given = (head, hidden_ND, target_N, weights, reference)
    is_leaf = lambda a: isinstance(a, jax.custom_derivatives.CustomVJPPrimal)
    wanted = tuple(any(a.perturbed for a in jax.tree.leaves(t, is_leaf=is_leaf)) for t in given[:2])
    plain = jax.tree.map(lambda a: a.value, given, is_leaf=is_leaf)
    out, (sums, g_x) = _weighted_chunks(static, *plain, wanted)
    kinds = jax.tree.map(lambda a: jnp.zeros((0,), a.dtype), plain[:2])
    return out, (sums, g_x if wanted[1] else None, kinds)


def _weighted_bwd(static, residual, g):
    sums, g_x, (head, hidden) = residual
    scale = g[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    times = lambda a, like: (scale * a).astype(like.dtype)
    g_head = jax.tree.map(times, sums[0], head) if sums else None
    return g_head, None if g_x is None else times(g_x, hidden), None, None, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd, symbolic_zeros=True)
