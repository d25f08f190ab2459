"""The transformer block, once for training, decoding and decoding on a mesh.

`block` holds the arithmetic of every family. Its callers say two things: how products with weights are
computed (`products`), and how new tokens attend (`attend`). A family with new arithmetic changes `block`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from nla_jax.lm import delta_net, experts
from nla_jax.lm.config import LMConfig
from nla_jax.lm.experts import EXPERTS
from nla_jax.lm.ops import ACTIVATIONS, dense, dtype_of, rms_norm
from nla_jax.lm.rotary import rotate

QKV, GATE_UP = ("wq", "wk", "wv"), ("w_gate", "w_up")  # matrices that multiply the same activations
# The same of blocks with `global_heads`; their values may be their keys (`global_k_is_v`).
GLOBAL_QKV, GLOBAL_QK = ("global_wq", "global_wk", "global_wv"), ("global_wq", "global_wk")


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


def plain_products(cfg: LMConfig, p, names: tuple[str, ...], x) -> list:
    """Return the product of x with each matrix of `names`: the `products` of training."""
    return [experts.apply(p, cfg, x)] if names == EXPERTS else [project(p, name, x) for name in names]


def scale_embedding(cfg: LMConfig, x):
    """Return rows of the embedding table, float32, scaled if the family scales them.

    The product with the scale is in the dtype of the table, as in transformers.
    """
    if cfg.scale_embed:
        x = x * jnp.asarray(math.sqrt(cfg.d_model), x.dtype)
    return x.astype(jnp.float32)


def block(p, cfg: LMConfig, x, cos, sin, attend, products=None):
    """Run one transformer block over new tokens.

    Args:
      p: parameters of one block, in the layout that `products` reads.
      x: the residual stream [B, T, D], or [B, D] where T is 1. float32.
      cos, sin: rotary angles of the new tokens, [B, T, 1, d/2].
      attend: (q [B, T, H, d], k [B, K, T, d], v [B, K, T, d]) -> (heads' outputs, shaped as x with H*d in
        place of D; the keys and values that the caller keeps). For a block with linear attention it is the
        `recur` of `delta_net.mix`, and the caller keeps a state.
      products: (p, names, x) -> x times each matrix, with biases and adapters; `plain_products` by default.
        `names` is QKV, ("wo",), GATE_UP or ("w_down",), with linear attention also DELTA_IN or
        ("delta_out",), with `global_heads` also GLOBAL_QKV or GLOBAL_QK and ("global_wo",). In a mixture of
        experts it is ("router",), EXPERTS or ("shared_gate",); x of EXPERTS is as in `experts.apply`, and so
        is the one result.

    Returns (x, what `attend` keeps).
    """
    eps, products = cfg.norm_eps, products or functools.partial(plain_products, cfg)
    y = norm_if(p, "attn_norm", x, eps)
    if "delta_out" in p:
        a, kept = delta_net.mix(p, cfg, y, attend, products)
    else:
        a, kept = _attention(p, cfg, y, cos, sin, attend, products)
    x = x + norm_if(p, "attn_post_norm", a, eps)
    y = _mlp(p, cfg, norm_if(p, "mlp_norm", x, eps), products)
    if cfg.experts_beside:
        y = experts.beside(p, cfg, x, y, products)
    x = x + norm_if(p, "mlp_post_norm", y, eps)
    if cfg.block_scale:  # it is not trained, as in transformers
        x = x * jax.lax.broadcast_to_rank(jax.lax.stop_gradient(p["block_scale"]), x.ndim)
    return x, kept


def _attention(p, cfg: LMConfig, y, cos, sin, attend, products):
    """Return (softmax attention over normed activations y, what `attend` keeps)."""
    eps, is_global = cfg.norm_eps, "global_wo" in p
    of = "global_" if is_global else ""  # what the names of its parameters begin with
    names = QKV if not is_global else GLOBAL_QK if cfg.global_k_is_v else GLOBAL_QKV
    dtype, n_kv = dtype_of(p[of + "wo"]), cfg.kv_heads(not is_global)[0]

    def heads(y, n):
        return y.reshape(len(y), -1, n, y.shape[-1] // n)

    def normed(name, y, n):
        if cfg.qk_norm_whole:
            return heads(norm_if(p, name, y, eps), n)
        return norm_if(p, name, heads(y, n), eps)

    q, k, *v = products(p, names, y)
    v = heads(*v or [k], n_kv)
    v = rms_norm(v, None, eps) if cfg.v_norm else v
    if cfg.attn_gate:  # of each head: d entries of q, then d of the gate
        q, gate = (a.reshape(*q.shape[:-1], -1) for a in jnp.split(heads(q, cfg.n_heads), 2, -1))
    q = rotate(normed(of + "q_norm", q, cfg.n_heads), cos, sin)
    k = rotate(normed(of + "k_norm", k, n_kv), cos, sin)
    k, v = (a.transpose(0, 2, 1, 3).astype(dtype) for a in (k, v))
    a, kept = attend(q, k, v)
    if cfg.attn_gate:
        a = a * jax.nn.sigmoid(gate)
    (a,) = products(p, (of + "wo",), a)
    return a, kept


def _mlp(p, cfg: LMConfig, y, products):
    if "router" in p and not (cfg.experts_beside or cfg.shared_expert):
        return experts.mlp(p, cfg, y, products)
    gate, up = products(p, GATE_UP, y)
    (out,) = products(p, ("w_down",), ACTIVATIONS[cfg.activation](gate) * up)
    if not cfg.shared_expert:
        return out
    (gate,) = products(p, ("shared_gate",), y)
    return experts.mlp(p, cfg, y, products) + jax.nn.sigmoid(gate) * out
