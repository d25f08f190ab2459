"""Matrix products with weights and in attention, with their backward passes.

Forward and backward, operands are in the dtype of the weights and sums in float32.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from nla_jax.util import int8

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
_MASKED = -1e30  # finite, because a row without visible keys would otherwise give NaN


class GatheredMatrix(NamedTuple):
    """An all-gathered matrix, and float32 zeros that receive its gradient before it is rounded."""

    whole: jax.Array
    gradient: jax.Array


def dtype_of(w):
    """Return the dtype of products with a matrix, which may be `Int8` or `GatheredMatrix`."""
    return w.whole.dtype if isinstance(w, GatheredMatrix) else w.dtype


def array_of(w):
    """Return a parameter as an array; its gradient is that of a `GatheredMatrix` if it is one."""
    return w.whole + w.gradient.astype(w.whole.dtype) if isinstance(w, GatheredMatrix) else w


def rms_norm(x, weight, eps: float):
    """Return x / rms(x) * weight, computed in float32. weight: None means 1."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return x if weight is None else x * jax.lax.broadcast_to_rank(weight.astype(jnp.float32), x.ndim)


def _dot(a, b, contract):
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def dense(x, w, transposed: bool = False):
    """Return x [..., in] @ w [in, out] in float32; w is [out, in] if `transposed`. It may be `Int8` or a
    `GatheredMatrix`."""
    if not int8.is_int8(w):
        return _dense(x, w, transposed)
    y = _dense(x, w.q.astype(w.dtype), transposed)
    return y * int8.channels(w, y.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dense(x, w, transposed: bool):
    """Compute `dense` with a matrix of floats.

    The backward pass keeps the operands in the dtype of `w`. By default, JAX would multiply a float32
    cotangent with a bfloat16 operand, which every backend widens to float32.
    """
    return _dense_fwd(x, w, transposed)[0]


def _dense_fwd(x, w, transposed):
    whole = w.whole if isinstance(w, GatheredMatrix) else w
    xw = x.astype(whole.dtype)
    residual = (xw, GatheredMatrix(whole, None) if isinstance(w, GatheredMatrix) else w)
    return _dot(xw, whole, ((x.ndim - 1,), (1 if transposed else 0,))), residual


def _dense_bwd(transposed, residual, g):
    xw, w = residual
    whole = w.whole if isinstance(w, GatheredMatrix) else w
    g = g.astype(whole.dtype)
    dx = _dot(g, whole, ((g.ndim - 1,), (0 if transposed else 1,)))
    x_Ni, g_No = (a.reshape(-1, a.shape[-1]) for a in (xw, g))
    a, b = (g_No, x_Ni) if transposed else (x_Ni, g_No)
    dw = contract_rows(a, b)
    return dx, GatheredMatrix(None, dw) if isinstance(w, GatheredMatrix) else dw.astype(w.dtype)


def contract_rows(a, b):
    """Contract rows, as in gradients of weights: [..., N, i], [..., N, o] -> [..., i, o], float32.

    XLA's CPU backend has a fast bfloat16 product only if the first operand is contracted over its last axis
    *in memory*. The narrower operand is therefore transposed first. With AMX this is twice as fast, the
    transpose included.
    """
    lead = tuple(range(a.ndim - 2))
    rows = a.ndim - 2

    def plain(a, b):
        return jax.lax.dot_general(
            a, b, (((rows,), (rows,)), (lead, lead)), preferred_element_type=jnp.float32,
            precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        )

    def turned(a, b):
        if a.shape[-1] > b.shape[-1]:
            # Without the barrier, the compiler would transpose the operands back.
            return jnp.swapaxes(jax.lax.optimization_barrier(turned(b, a)), -1, -2)
        order = (*lead, rows, rows + 1)
        a = with_layout_constraint(jnp.swapaxes(a, -1, -2), Layout(order))
        return jax.lax.dot_general(
            jax.lax.optimization_barrier(a), b, (((rows + 1,), (rows,)), (lead, lead)),
            preferred_element_type=jnp.float32,
        )

    if a.dtype == jnp.float32:
        return plain(a, b)
    return jax.lax.platform_dependent(a, b, cpu=turned, default=plain)


_dense.defvjp(_dense_fwd, _dense_bwd)


def softcap(x, cap: float | None):
    """Return cap * tanh(x / cap), or x if there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(q_BTHd, k_BKSd, v_BKSd, mask_BTS, dtype, scalar: float | None = None,
           cap: float | None = None):
    """Compute softmax attention with grouped key/value heads: [B, T, H*d], float32.

    Scores are q k / sqrt(scalar), with scalar = d by default, and then soft-capped.
    """
    B, T, H, d = q_BTHd.shape
    K = k_BKSd.shape[1]
    G = H // K
    # The query heads of a group share keys, so they are rows of one larger product per key head.
    q = q_BTHd.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    q = q * (scalar or d) ** -0.5
    operands = (q.astype(dtype), k_BKSd.astype(dtype), v_BKSd.astype(dtype), jnp.tile(mask_BTS, (1, G, 1)))
    out = _attention(*operands) if cap is None else _softmax_of(*operands, cap)[0]
    return out.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H * d)


def attend_levels(q_NHd, parts, masks, dtype, scalar: float | None = None, cap: float | None = None):
    """Compute `attend` for one token per row over keys and values that rows share: [N, H*d], float32.

    Args:
      parts: (k, v) [b, K, S, d] where b divides N; N / b adjacent rows share each of the b.
      masks: of each part, [b, N / b or 1, S].

    There is one softmax over all parts. Queries are regrouped by the part's batch. Each key head then needs
    one product for all rows that share it, and a part is read once.
    """
    N, H, d = q_NHd.shape
    K = parts[0][0].shape[1]
    q = (q_NHd.reshape(N, K, H // K, d) * (scalar or d) ** -0.5).astype(dtype)

    def shared(a, b):  # [N, K, ...] -> [b, K, N / b, ...]
        return a.reshape(b, N // b, *a.shape[1:]).swapaxes(1, 2)

    def rows(a):  # and back
        return a.swapaxes(1, 2).reshape(N, *a.shape[1:2], *a.shape[3:])

    scores = []
    for (k, _), mask in zip(parts, masks, strict=True):
        s = softcap(_product("bkngd,bksd->bkngs", shared(q, len(k)), k), cap)
        scores.append(jnp.where(mask[:, None, :, None], s, _MASKED))
    top = functools.reduce(jnp.maximum, [rows(s.max(-1)) for s in scores])
    out = total = 0.0
    for s, (_, v) in zip(scores, parts, strict=True):
        weights = jnp.exp(s - shared(top, len(v))[..., None])
        total = total + rows(weights.sum(-1))
        out = out + rows(_product("bkngs,bksd->bkngd", weights.astype(dtype), v))
    return (out / total[..., None]).reshape(N, H * d)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32,
                      precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def _softmax_of(q_BKXd, k_BKSd, v_BKSd, mask_BXS, cap=None):
    """Return (softmax(q k) v in float32, the probabilities in the operands' dtype)."""
    scores = softcap(_product("bkxd,bksd->bkxs", q_BKXd, k_BKSd), cap)
    scores = jnp.where(mask_BXS[:, None], scores, _MASKED)
    probs = jax.nn.softmax(scores, axis=-1).astype(q_BKXd.dtype)
    return _product("bkxs,bksd->bkxd", probs, v_BKSd), probs


@jax.custom_vjp
def _attention(q_BKXd, k_BKSd, v_BKSd, mask_BXS):
    """Return softmax(q k) v, float32. As in `dense`, the backward pass keeps the operands in their dtype."""
    return _softmax_of(q_BKXd, k_BKSd, v_BKSd, mask_BXS)[0]


def _attention_fwd(q, k, v, mask):
    out, probs = _softmax_of(q, k, v, mask)
    return out, (q, k, v, probs, out)


def _attention_bwd(residual, g_BKXd):
    q, k, v, probs, out = residual
    mean = jnp.sum(g_BKXd * out, -1, keepdims=True)  # of the gradient of the probabilities
    g = g_BKXd.astype(q.dtype)
    scores = probs.astype(jnp.float32) * (_product("bkxd,bksd->bkxs", g, v) - mean)
    scores = scores.astype(q.dtype)
    dq = _product("bkxs,bksd->bkxd", scores, k)
    dk, dv = contract_rows(scores, q), contract_rows(probs, g)
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)
