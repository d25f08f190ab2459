"""The forward pass: embed -> blocks -> hidden state, and hidden state -> logits.

Shapes are in the names: B rows, T tokens, S cached positions, D d_model, L blocks,
H query heads, K key/value heads, d head size, V vocabulary.

The dtype of a weight decides how its product is computed: float32 weights give float32
products, bfloat16 weights give bfloat16 operands accumulated in float32. The residual
stream itself, norms, softmax and rotary angles are always float32.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from nla_jax.lm.config import LMConfig

_MASKED = -1e30  # finite, so that a row that sees nothing gives a mean and not a NaN


@flax.struct.dataclass
class KV:
    """Keys (after rotary embedding) and values of positions already seen, every block."""

    k_LBKSd: jax.Array
    v_LBKSd: jax.Array
    valid_BS: jax.Array

    @property
    def batch(self) -> int:
        return self.valid_BS.shape[0]

    @property
    def length(self) -> int:
        return self.valid_BS.shape[1]


def _dot(a, b, contract):
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense(x, w, transposed: bool = False):
    """x [..., in] @ w [in, out] (or w [out, in] when `transposed`), float32 out.

    The backward pass keeps the operands in the dtype of `w`. Left to itself, JAX would multiply
    a float32 cotangent with a bfloat16 operand, which every backend widens to float32.
    """
    return _dot(x.astype(w.dtype), w, ((x.ndim - 1,), (1 if transposed else 0,)))


def _dense_fwd(x, w, transposed):
    xw = x.astype(w.dtype)
    return _dot(xw, w, ((x.ndim - 1,), (1 if transposed else 0,))), (xw, w)


def _dense_bwd(transposed, residual, g):
    xw, w = residual
    g = g.astype(w.dtype)
    dx = _dot(g, w, ((g.ndim - 1,), (0 if transposed else 1,)))
    rows = tuple(range(g.ndim - 1))
    a, b = (g, xw) if transposed else (xw, g)
    dw = _dot(a, b, (rows, rows)).astype(w.dtype)
    return dx, dw


dense.defvjp(_dense_fwd, _dense_bwd)


def rms_norm(x, weight, eps: float):
    """x / rms(x) * weight, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight.astype(jnp.float32)


def rotary(pos_BT, cfg: LMConfig):
    """cos and sin [B, T, 1, d/2]; angles in float32 (in bfloat16 position 257 equals 256)."""
    half = cfg.head_dim // 2
    freq = cfg.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = pos_BT.astype(jnp.float32)[..., None, None] * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd, cos, sin):
    """Rotary embedding, halves convention (Hugging Face's, not interleaved)."""
    a, b = jnp.split(x_BTHd, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q_BTHd, k_BKSd, v_BKSd, mask_BTS, dtype):
    """Softmax attention with grouped key/value heads: [B, T, H*d], float32."""
    B, T, H, d = q_BTHd.shape
    K = k_BKSd.shape[1]
    G = H // K
    # The query heads of a group share keys: they become rows of one larger product per key head.
    q = q_BTHd.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d) * d**-0.5
    kw = dict(
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )
    scores = jnp.einsum("bkxd,bksd->bkxs", q.astype(dtype), k_BKSd.astype(dtype), **kw)
    scores = jnp.where(jnp.tile(mask_BTS, (1, G, 1))[:, None], scores, _MASKED)
    probs = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkxs,bksd->bkxd", probs.astype(dtype), v_BKSd.astype(dtype), **kw)
    return out.reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H * d)


def project(p, name, x):
    """x @ p[name], plus the low-rank adapter when the block carries one (`nla_jax.lm.lora`)."""
    y = dense(x, p[name])
    adapter = p.get(name + "_lora")
    return y if adapter is None else y + dense(dense(x, adapter["a"]), adapter["b"])


def block(p, cfg: LMConfig, x_BTD, cos, sin, mask_BTS, past=None):
    """One transformer block. `past`: (k, v) [B or 1, K, S, d] that come before these tokens.

    Returns (x_BTD, (k, v)) with the keys and values of these tokens only.
    """
    B, T, _ = x_BTD.shape
    dtype = p["wq"].dtype
    y = rms_norm(x_BTD, p["attn_norm"], cfg.norm_eps)
    q = rotate(project(p, "wq", y).reshape(B, T, cfg.n_heads, cfg.head_dim), cos, sin)
    k = rotate(project(p, "wk", y).reshape(B, T, cfg.n_kv_heads, cfg.head_dim), cos, sin)
    k = k.transpose(0, 2, 1, 3).astype(dtype)
    v = project(p, "wv", y).reshape(B, T, cfg.n_kv_heads, cfg.head_dim)
    v = v.transpose(0, 2, 1, 3).astype(dtype)
    keys, values = k, v
    if past is not None:
        widen = [jnp.broadcast_to(a, (B, *a.shape[1:])) for a in past]
        keys, values = (jnp.concatenate(pair, 2) for pair in zip(widen, (k, v), strict=True))
    x_BTD = x_BTD + project(p, "wo", attend(q, keys, values, mask_BTS, dtype))
    y = rms_norm(x_BTD, p["mlp_norm"], cfg.norm_eps)
    y = jax.nn.silu(project(p, "w_gate", y)) * project(p, "w_up", y)
    return x_BTD + project(p, "w_down", y), (k, v)


def embed(params, ids_BT):
    """Token embeddings [B, T, D], float32."""
    return jnp.take(params["embed"], ids_BT, axis=0).astype(jnp.float32)


def forward(params, cfg: LMConfig, x_BTD, valid_BT, *, past: KV | None = None,
            keep_kv: bool = False, remat: bool = False):
    """Run every block that `params` holds over embeddings x_BTD.

    Args:
      params: {"embed", "blocks", ...}; as many blocks run as are stacked in "blocks".
      x_BTD: float32 embeddings, where injected activations already stand.
      valid_BT: bool; False marks padding, on either side. Positions count valid tokens only.
      past: keys and values that precede x in every row; its batch may be 1 (shared prefix).
      keep_kv: also return the keys and values of these tokens.
      remat: recompute blocks in the backward pass instead of storing them.

    Returns:
      (x_BTD, kv): the residual stream after the last block, before the final norm, and a `KV` of
      these tokens without `past` (None unless `keep_kv`).
    """
    B, T, _ = x_BTD.shape
    before = jnp.zeros((1, 0), bool) if past is None else past.valid_BS
    pos_BT = before.sum(1, keepdims=True) + jnp.maximum(jnp.cumsum(valid_BT, 1) - 1, 0)
    cos, sin = rotary(pos_BT, cfg)
    causal = jnp.tril(jnp.ones((T, T), bool))[None] & valid_BT[:, None, :]
    seen = jnp.broadcast_to(before[:, None, :], (B, T, before.shape[1]))
    mask_BTS = jnp.concatenate([seen, causal], -1)

    def step(x, layer):
        p, old = layer
        x, kv = block(p, cfg, x, cos, sin, mask_BTS, old)
        return x, kv if keep_kv else None

    if remat:
        step = jax.checkpoint(step)
    old = None if past is None else (past.k_LBKSd, past.v_LBKSd)
    x_BTD, kv = jax.lax.scan(step, x_BTD.astype(jnp.float32), (params["blocks"], old))
    return x_BTD, KV(*kv, valid_BT) if keep_kv else None


def join(first: KV, second: KV) -> KV:
    """The two caches one after the other; a batch of 1 in `first` is repeated."""
    B = second.batch

    def cat(a, b):
        return jnp.concatenate([jnp.broadcast_to(a, (a.shape[0], B, *a.shape[2:])), b], 3)

    valid = jnp.broadcast_to(first.valid_BS, (B, first.length))
    return KV(
        cat(first.k_LBKSd, second.k_LBKSd),
        cat(first.v_LBKSd, second.v_LBKSd),
        jnp.concatenate([valid, second.valid_BS], 1),
    )


def unembed(params, cfg: LMConfig, x):
    """Logits [..., V] in float32 from residual-stream vectors [..., D]."""
    y = rms_norm(x, params["final_norm"], cfg.norm_eps)
    return dense(y, params["embed"], True) if cfg.tied else dense(y, params["lm_head"])


def cast(params, dtype):
    """Matrices to `dtype`; norm weights (and anything else with fewer axes) stay as they are."""

    def one(path, a):
        is_norm = any("norm" in str(getattr(k, "key", k)) for k in path)
        return a if is_norm else a.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)
