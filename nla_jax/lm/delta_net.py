"""Gated DeltaNet: linear attention with a recurrent state, computed in float32 (arXiv:2412.06464).

A head's state S [dk, dv] changes with each token, whose key is k, value v, decay g <= 0 and rate beta:

    S <- exp(g) S;    S <- S + beta k (v - S^T k)^T;    output S^T q

A short causal convolution comes before q, k and v. Its last W - 1 inputs are the other part of the state.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nla_jax.lm.config import LMConfig
from nla_jax.lm.ops import array_of, rms_norm

DELTA_IN = ("delta_qkv", "delta_z", "delta_b", "delta_a")  # matrices that multiply the same activations
CHUNK = 64  # tokens that are computed together; the state goes from chunk to chunk
ROWS = 16  # size of the blocks of a chunk's matrix that are inverted row by row


class Order(NamedTuple):
    """The order of tokens that has padding last, and its inverse. There may be padding between tokens."""

    order_BT: jax.Array
    inverse_BT: jax.Array
    count_B1: jax.Array  # number of tokens that are not padding


def order_of(valid_BT) -> Order:
    order_BT = jnp.argsort(~valid_BT, axis=1, stable=True)
    return Order(order_BT, jnp.argsort(order_BT, axis=1), valid_BT.sum(1, keepdims=True))


@jax.custom_vjp
def _permute(a_BTC, order_BT, inverse_BT):
    """Permute tokens. The gradient is permuted back, which is faster than a scatter."""
    return jnp.take_along_axis(a_BTC, order_BT[..., None], 1)


_permute.defvjp(
    lambda a, order, inverse: (_permute(a, order, inverse), (order, inverse)),
    lambda kept, g: (_permute(g, *kept[::-1]), None, None),
)


def sizes(cfg: LMConfig) -> tuple[int, int, int]:
    """Return the numbers of entries of (q and k together with v, v alone, a value head)."""
    key_heads, value_heads, dk, dv, _ = cfg.delta
    return 2 * key_heads * dk + value_heads * dv, value_heads * dv, dv


def mix(p, cfg: LMConfig, y, recur, products):
    """Return (the layer's output, shaped as normed activations y [B, T, D] or [B, D]; the new state).

    recur: `over_sequence` or `over_token` with its first arguments: (qkv [B, T, C], convolution [C, W], g and
    beta [B, T, H]) -> (output [B, T, H, dv], state). products: as for `block.block`.
    """
    qkv, z, b, a = products(p, DELTA_IN, y)
    rate = -jnp.exp(p["delta_a_log"].astype(jnp.float32))
    bias = p["delta_dt_bias"].astype(jnp.float32)
    decay = jax.lax.broadcast_to_rank(rate, a.ndim) * jax.nn.softplus(
        a + jax.lax.broadcast_to_rank(bias, a.ndim))
    qkv, decay, beta = (c.reshape(len(c), -1, c.shape[-1]) for c in (qkv, decay, jax.nn.sigmoid(b)))
    o, state = recur(qkv, array_of(p["delta_conv"])[..., 0].astype(jnp.float32), decay, beta)
    o = rms_norm(o, p["delta_norm"], cfg.norm_eps).reshape(z.shape) * jax.nn.silu(z)
    (out,) = products(p, ("delta_out",), o)
    return out, state


def over_sequence(cfg: LMConfig, order: Order | None, past, qkv_BTC, conv_CW, decay_BTH, beta_BTH):
    """Compute the outputs [B, T, H, dv] and the state after the last token.

    order: None if there is no padding. past: the state (inputs of the convolution [B or 1, W - 1, C], S
    [B or 1, H, dk, dv]) before these tokens, or None.
    """
    B, T, C = qkv_BTC.shape
    _, H, dk, dv, W = cfg.delta
    shapes = (B, W - 1, C), (B, H, dk, dv)
    conv, S = [jnp.zeros(s, jnp.float32) for s in shapes] if past is None else [
        jnp.broadcast_to(a, s) for a, s in zip(past, shapes, strict=True)]
    if order is not None:
        qkv_BTC, decay_BTH, beta_BTH = (
            _permute(a, order.order_BT, order.inverse_BT) for a in (qkv_BTC, decay_BTH, beta_BTH))
        real_BT1 = (jnp.arange(T)[None] < order.count_B1)[..., None]
        decay_BTH, beta_BTH = (jnp.where(real_BT1, a, 0.0) for a in (decay_BTH, beta_BTH))
    x = jnp.concatenate([conv, qkv_BTC], 1)
    u = sum(x[:, j : j + T] * conv_CW[None, None, :, j] for j in range(W))
    if order is None:
        conv = x[:, T:]
    else:
        conv = jnp.take_along_axis(x, (order.count_B1 + jnp.arange(W - 1)[None])[..., None], 1)
    o, S = _chunks(*_heads(cfg, jax.nn.silu(u)), decay_BTH, beta_BTH, S)
    if order is not None:
        o = _permute(o.reshape(B, T, -1), order.inverse_BT, order.order_BT).reshape(o.shape)
    return o, (conv, S)


def over_token(cfg: LMConfig, past, qkv_B1C, conv_CW, decay_B1H, beta_B1H):
    """Do what `over_sequence` does, for one token of each row."""
    conv, S = past
    x = jnp.concatenate([conv, qkv_B1C], 1)
    u = jnp.sum(x * conv_CW.T[None], 1, keepdims=True)
    q, k, v = (a[:, 0] for a in _heads(cfg, jax.nn.silu(u)))
    S = S * jnp.exp(decay_B1H[:, 0])[..., None, None]
    # Both sums read the state before the token, so that one pass over it serves both.
    of_k, of_q = (jnp.sum(S * a[..., None], -2) for a in (k, q))
    error = (v - of_k) * beta_B1H[:, 0, :, None]
    o = of_q + jnp.sum(k * q, -1, keepdims=True) * error
    return o[:, None], (x[:, 1:], S + k[..., None] * error[..., None, :])


def _heads(cfg: LMConfig, u_BTC):
    """Return q, k, v [B, T, H, d]: q and k of norm 1 (q also over sqrt(dk)), for each value head."""
    key_heads, H, dk, dv, _ = cfg.delta
    q, k, v = jnp.split(u_BTC, [key_heads * dk, 2 * key_heads * dk], -1)
    B, T, _ = u_BTC.shape

    def unit(a):
        a = a.reshape(B, T, key_heads, dk)
        a = a * jax.lax.rsqrt(jnp.sum(a * a, -1, keepdims=True) + 1e-6)
        return jnp.repeat(a, H // key_heads, 2)

    return unit(q) * dk**-0.5, unit(k), v.reshape(B, T, H, dv)


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _invert(a_BHNcc):
    """Return the inverses of lower triangular matrices with ones on the diagonal.

    Only the entries below the diagonal are read. Blocks of ROWS on the diagonal are inverted row by row. Then
    the blocks double: the inverse of [[A, 0], [C, B]] has -B^-1 C A^-1 in its corner. The product of powers
    (I - N)(I + N^2)(I + N^4)... would be shorter, but powers of N are huge if keys are alike.

    Not `triangular_solve`: on several CPU devices, LAPACK's calls wait for each other's threads without end.
    """
    *lead, n, _ = a_BHNcc.shape
    b = min(ROWS, n)
    size = b * 2 ** math.ceil(math.log2(n / b))
    below = jnp.pad(jnp.tril(a_BHNcc, -1), [(0, 0)] * len(lead) + [(0, size - n)] * 2)
    whole = _invert_rows(jnp.stack([below[..., i : i + b, i : i + b] for i in range(0, size, b)], -3))
    while b < size:
        corner = jnp.stack([below[..., i + b : i + 2 * b, i : i + b] for i in range(0, size, 2 * b)], -3)
        first, second = whole[..., ::2, :, :], whole[..., 1::2, :, :]
        corner = -_product("bhnpij,bhnpjk->bhnpik", _product("bhnpij,bhnpjk->bhnpik", second, corner), first)
        whole = jnp.concatenate([jnp.concatenate([first, jnp.zeros_like(corner)], -1),
                                 jnp.concatenate([corner, second], -1)], -2)
        b *= 2
    return whole[..., 0, :n, :n]


def _invert_rows(below):
    """Return the inverses [..., b, b] of I plus strictly lower triangular matrices, row by row."""
    b = below.shape[-1]
    below_bbM = below.reshape(-1, b, b).transpose(1, 2, 0)  # the last axis fills a TPU's lanes
    eye = jnp.broadcast_to(jnp.eye(b, dtype=below.dtype)[..., None], below_bbM.shape)

    def row(i, whole):
        of_i = jax.lax.dynamic_index_in_dim(below_bbM, i, keepdims=False)
        one = jax.lax.dynamic_index_in_dim(whole, i, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(whole, one - jnp.sum(of_i[:, None] * whole, 0), i, 0)

    return jax.lax.fori_loop(1, b, row, eye).transpose(2, 0, 1).reshape(below.shape)


def _invert_bwd(whole, g):
    g = _product("bhnji,bhnjk->bhnik", whole, g)
    return (-jnp.tril(_product("bhnij,bhnkj->bhnik", g, whole), -1),)


_invert.defvjp(lambda a: (_invert(a),) * 2, _invert_bwd)


def _chunks(q, k, v, decay, beta, S):
    """Compute the recurrence over [B, T, H, ...] from S on, chunk by chunk: (outputs, the last S).

    Inside a chunk, the values that each token writes solve a triangular system.
    """
    T = q.shape[1]
    c = min(CHUNK, T)

    def chunked(a):  # [B, T, H, ...] -> [B, H, N, c, ...]; tokens after the last do not change the state
        a = jnp.pad(a, [(0, 0), (0, -T % c)] + [(0, 0)] * (a.ndim - 2))
        a = a.reshape(len(a), -1, c, *a.shape[2:])
        return jnp.moveaxis(a, 3, 1)

    q, k, v, decay, beta = (chunked(a) for a in (q, k, v, decay, beta))
    lower = jnp.tril(jnp.ones((1, 1, 1, c, c), bool))
    # The decays of tokens j + 1 to i, summed on their own: a difference of two long sums would be inexact.
    after_j = jnp.where(jnp.tril(lower, -1), decay[..., :, None], 0.0)
    between = jnp.where(lower, jnp.exp(jnp.cumsum(after_j, -2)), 0.0)
    start, end = jnp.exp(jnp.cumsum(decay, -1))[..., None], between[..., -1, :, None]
    k_beta = k * beta[..., None]
    system = _product("bhnid,bhnjd->bhnij", k_beta, k) * between
    wanted = jnp.concatenate([v * beta[..., None], k_beta * start], -1)
    solved = _product("bhnij,bhnjd->bhnid", _invert(system), wanted)
    new, read = jnp.split(solved, [v.shape[-1]], -1)
    inside = _product("bhnid,bhnjd->bhnij", q, k) * between
    q, k = q * start, k * end

    def step(S, chunk):
        q, k, new, read, inside, kept = chunk
        written = new - _product("bhck,bhkv->bhcv", read, S)
        o = _product("bhck,bhkv->bhcv", q, S) + _product("bhij,bhjv->bhiv", inside, written)
        return S * kept[..., None] + _product("bhck,bhcv->bhkv", k, written), o

    parts = (q, k, new, read, inside, start[..., -1, :])
    S, o = jax.lax.scan(step, S, [jnp.moveaxis(a, 2, 0) for a in parts])
    o = jnp.moveaxis(o, 0, 2)  # [B, H, N, c, dv]
    o = jnp.moveaxis(o.reshape(*o.shape[:2], -1, o.shape[-1]), 1, 2)
    return o[:, :T], S
