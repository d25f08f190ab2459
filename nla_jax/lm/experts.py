"""A mixture of experts in place of the MLP: a router chooses a few small MLPs for each token."""

import jax
import jax.numpy as jnp

from nla_jax.lm.config import LMConfig
from nla_jax.lm.ops import ACTIVATIONS, array_of, rms_norm
from nla_jax.util import int8

EXPERTS = ("experts_gate", "experts_up", "experts_down")


def mlp(p, cfg: LMConfig, y, products):
    """Return the mixture [..., D] of normed activations y [..., D]. products: as for `block.block`."""
    (out,) = products(p, EXPERTS, (y, *_route(p, cfg, y, products)))
    return out


def beside(p, cfg: LMConfig, x, y, products):
    """Return the MLP's output y plus a mixture of x, the residual stream before the MLP (Gemma 4).

    The experts, the router, and both results have norms of their own. Each expert has a scale.
    """
    eps = cfg.norm_eps
    routed = rms_norm(x, p["router_norm"], eps) * cfg.d_model**-0.5
    weight, index = _route(p, cfg, routed, products)
    weight = weight * p["experts_scale"][index]
    (out,) = products(p, EXPERTS, (rms_norm(x, p["experts_norm"], eps), weight, index))
    return rms_norm(y, p["mlp_own_norm"], eps) + rms_norm(out, p["experts_post_norm"], eps)


def _route(p, cfg: LMConfig, y, products):
    """Return (weights, experts) [..., k] of each token."""
    (scores,) = products(p, ("router",), y)
    weight, index = jax.lax.top_k(jax.nn.softmax(scores, -1), cfg.experts[1])
    if cfg.experts_normed:
        weight = weight / jnp.sum(weight, -1, keepdims=True)
    return weight, index


def apply(p, cfg: LMConfig, routed):
    """Return the weighted sum [..., D], float32, of the experts of each token.

    routed: (activations [..., D], weights [..., k], experts [..., k]). Rows are sorted by expert, and each
    expert multiplies its own (a grouped product). The matrices may have some of the columns of the experts
    only; the result is then a part of the sum.
    """
    y, weight, index = routed
    n, k, _ = cfg.experts
    x_ND, of_X, weight_X = y.reshape(-1, y.shape[-1]), index.reshape(-1), weight.reshape(-1)
    order_X = jnp.argsort(of_X, stable=True)
    rows = jnp.bincount(of_X, length=n).astype(jnp.int32), of_X[order_X]
    gate, up, down = (array_of(p[name]) for name in EXPERTS)
    x_XD = x_ND[order_X // k]
    h_XF = ACTIVATIONS[cfg.activation](_grouped(x_XD, gate, *rows)) * _grouped(x_XD, up, *rows)
    out_XD = _grouped(h_XF, down, *rows) * weight_X[order_X][:, None]
    return jnp.sum(out_XD[jnp.argsort(order_X)].reshape(len(x_ND), k, -1), 1).reshape(y.shape)


def _grouped(x_XI, w_EIO, sizes, of_X):
    """Return the product, float32, of `sizes[e]` rows after another with the matrix of expert e.

    The matrices may be `Int8`. of_X: the expert of each row.
    """
    exact = jax.lax.Precision.HIGHEST if w_EIO.dtype == jnp.float32 else None
    floats = w_EIO.q.astype(w_EIO.dtype) if int8.is_int8(w_EIO) else w_EIO
    y_XO = jax.lax.ragged_dot(x_XI.astype(w_EIO.dtype), floats, sizes, exact, jnp.float32)
    return y_XO * w_EIO.scale[of_X, 0] if int8.is_int8(w_EIO) else y_XO
