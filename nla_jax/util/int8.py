"""Matrices in 8-bit integers, with one float32 scale for each output channel (weight-only quantization).

A product converts the integers to its dtype, which is exact, and scales the float32 result. So a weight has
no other error than its rounding to one of 255 levels.
"""

import flax.struct
import jax
import jax.numpy as jnp

LEVELS = 127


@flax.struct.dataclass
class Int8:
    """A matrix [..., in, out], equal to q * scale, whose products are computed in `compute`.

    q: int8. scale: float32 [..., 1, out]; of an embedding [V, D] it is [V, 1], one for each token. The class
    has those attributes of arrays that code about weights uses.
    """

    q: jax.Array
    scale: jax.Array
    compute: str = flax.struct.field(pytree_node=False, default="bfloat16")

    shape = property(lambda self: self.q.shape)
    ndim = property(lambda self: self.q.ndim)
    dtype = property(lambda self: jnp.dtype(self.compute))
    T = property(lambda self: self.replace(q=self.q.T, scale=self.scale.T))

    def __len__(self) -> int:
        return len(self.q)

    def astype(self, dtype) -> "Int8":
        """Return the same integers with products in another dtype."""
        return self.replace(compute=jnp.dtype(dtype).name)


def is_int8(a) -> bool:
    return isinstance(a, Int8)


def quantize(w, axis: int = -2, compute: str = "bfloat16") -> Int8:
    """Quantize a matrix, with one scale for each index of the dimensions other than `axis`."""
    w = w.astype(jnp.float32)
    top = jnp.max(jnp.abs(w), axis, keepdims=True)
    scale = jnp.where(top > 0, top / LEVELS, 1.0)
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale, compute)


def dequantize(tree):
    """Return the tree with its `Int8` matrices as float32 arrays."""
    one = lambda a: a.q.astype(jnp.float32) * a.scale if is_int8(a) else a
    return jax.tree.map(one, tree, is_leaf=is_int8)


def channels(w: Int8, ndim: int):
    """Return the scales of the outputs of one matrix, broadcast to an array of `ndim` dimensions."""
    return jax.lax.broadcast_to_rank(w.scale.reshape(-1), ndim)


def take_rows(table, ids):
    """Return rows of an embedding table [V, D], which may be `Int8`, in the dtype of its products."""
    if not is_int8(table):
        return jnp.take(table, ids, axis=0)
    rows = jnp.take(table.q, ids, axis=0).astype(jnp.float32)
    return (rows * jnp.take(table.scale, ids, axis=0)).astype(table.dtype)
