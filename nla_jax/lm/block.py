"""The transformer block, once for training, decoding and decoding on a mesh.

`block` holds the arithmetic of every family. Its callers say two things: how products with weights are
computed (`products`), and how new tokens attend (`attend`). A family with new arithmetic changes `block`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from nla_jax.lm.config import LMConfig
from nla_jax.lm.ops import dense, dtype_of
from nla_jax.lm.rotary import rotate

QKV, GATE_UP = ("wq", "wk", "wv"), ("w_gate", "w_up")  # matrices that multiply the same activations
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def rms_norm(x, weight, eps: float):
    """Return x / rms(x) * weight, computed in float32."""
    x = x.astype(jnp.float32)
    weight = jax.lax.broadcast_to_rank(weight.astype(jnp.float32), x.ndim)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def norm_if(p, name, x, eps: float):
    """Return `rms_norm` with p[name], or x if the architecture has no such norm."""
    return rms_norm(x, p[name], eps) if name in p else x


def add_bias(p, name, y):
    """Return y plus the bias of p[name], or y if the block has no such bias."""
    if name + "_bias" not in p:
        return y
    return y + jax.lax.broadcast_to_rank(p[name + "_bias"].astype(jnp.float32), y.ndim)


def project(p, name, x):
    """Return x @ p[name], plus the bias and the adapter (`nla_jax.lm.lora`) if the block has them."""
    return add_adapter(p, name, x, add_bias(p, name, dense(x, p[name])))


def add_adapter(p, name, x, y):
    """Return y plus the product of x with the adapter of p[name], or y if the block has no such adapter."""
    adapter = p.get(name + "_lora")
    return y if adapter is None else y + dense(dense(x, adapter["a"]), adapter["b"])


def plain_products(p, names: tuple[str, ...], x) -> list:
    """Return the product of x with each matrix of `names`: the `products` of training."""
    return [project(p, name, x) for name in names]


def scale_embedding(cfg: LMConfig, x):
    """Return rows of the embedding table, float32, scaled if the family scales them.

    The product with the scale is in the dtype of the table, as in transformers.
    """
    if cfg.scale_embed:
        x = x * jnp.asarray(math.sqrt(cfg.d_model), x.dtype)
    return x.astype(jnp.float32)


def block(p, cfg: LMConfig, x, cos, sin, attend, products=plain_products):
    """Run one transformer block over new tokens.

    Args:
      p: parameters of one block, in the layout that `products` reads.
      x: the residual stream [B, T, D], or [B, D] where T is 1. float32.
      cos, sin: rotary angles of the new tokens, [B, T, 1, d/2].
      attend: (q [B, T, H, d], k [B, K, T, d], v [B, K, T, d]) -> (heads' outputs, shaped as x with H*d in
        place of D; the keys and values that the caller keeps).
      products: (p, names, x) -> x times each matrix, with biases and adapters. `names` is QKV, ("wo",),
        GATE_UP or ("w_down",).

    Returns (x, what `attend` keeps).
    """
    eps, dtype = cfg.norm_eps, dtype_of(p["wo"])

    def heads(y, n):
        return y.reshape(len(y), -1, n, cfg.head_dim)

    q, k, v = products(p, QKV, rms_norm(x, p["attn_norm"], eps))
    q = rotate(norm_if(p, "q_norm", heads(q, cfg.n_heads), eps), cos, sin)
    k = rotate(norm_if(p, "k_norm", heads(k, cfg.n_kv_heads), eps), cos, sin)
    k, v = (a.transpose(0, 2, 1, 3).astype(dtype) for a in (k, heads(v, cfg.n_kv_heads)))
    a, kept = attend(q, k, v)
    (a,) = products(p, ("wo",), a)
    x = x + norm_if(p, "attn_post_norm", a, eps)
    gate, up = products(p, GATE_UP, rms_norm(x, p["mlp_norm"], eps))
    (y,) = products(p, ("w_down",), _ACTIVATIONS[cfg.activation](gate) * up)
    return x + norm_if(p, "mlp_post_norm", y, eps), kept
