"""FSDP: a transformer block in training on a mesh, with sharded rows and all-gathered weights.

Each device runs the block on its own rows; all collectives are explicit (`shard_map`). The gradient of a
weight is reduce-scattered in float32. With automatic partitioning, the compiler would all-reduce it, at twice
the cost.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nla_jax.lm.ops import GatheredMatrix
from nla_jax.sharding import placement
from nla_jax.util import int8


def run(block, p, axes: dict, dtype, keeps, rows: tuple, past):
    """Run `block(p, *rows, past)` on a mesh; its results are arrays [B, ...].

    Args:
      p: one block's parameters, sharded as stored. axes: the logical axes of each, by path.
      keeps: parameters for which `keeps(name)` is True are not cast to `dtype`.
      rows: arrays [B, ...] with at least one row per device, sharded by row.
      past: arrays [B or 1, ...], or None; a batch of 1 is replicated.
    """
    B = rows[0].shape[0]
    dealt, whole = PartitionSpec(placement.axes_of(B, "rows")), PartitionSpec()
    def stored(path, a):
        spec = placement.spec(a.shape, placement.storage_places(axes["/".join(k.key for k in path)]))
        return a.replace(q=spec, scale=PartitionSpec()) if int8.is_int8(a) else spec

    specs = jax.tree_util.tree_map_with_path(stored, p, is_leaf=int8.is_int8)
    by_row = past is not None and jax.tree.leaves(past)[0].shape[0] == B

    def own(p, rows, past):
        p = {
            name: jax.tree.map(
                functools.partial(_gather_parameter, None if keeps(name) else dtype), a, specs[name],
                is_leaf=int8.is_int8,
            )
            for name, a in p.items()
        }
        return block(p, *rows, past)

    return jax.shard_map(own, in_specs=(specs, dealt, dealt if by_row else whole), out_specs=dealt,
                         check_vma=False)(p, rows, past)


def _gather_parameter(dtype, w, spec: PartitionSpec):
    """All-gather a parameter from its shards; the result is a `GatheredMatrix` for a matrix of floats."""
    if int8.is_int8(w):
        return w.replace(q=_gather(spec.q, jax.lax.optimization_barrier(w.q))).astype(dtype or w.dtype)
    if w.ndim < 2:
        return _gather(spec, w)
    whole, gradient = _gather_with_gradient(spec, jnp.dtype(dtype or w.dtype), w)
    return GatheredMatrix(jax.lax.stop_gradient(whole), gradient)


def _sharded_dims(spec: PartitionSpec) -> dict[str, int]:
    """Return {mesh axis: the dimension that it shards}, in the order of dimensions."""
    return {axis: d for d, axis in enumerate(spec) if axis and jax.lax.axis_size(axis) > 1}


def _gathers_rows_only(at: dict[str, int], shape) -> bool:
    """Return whether to gather along the first dimension only, over both mesh axes.

    Shards of two dimensions would otherwise be copied in memory, and sums of shards of the last dimension
    would be sent whole.
    """
    return len(at) == len(shape) == 2 and shape[0] % jax.lax.axis_size(list(at)[1]) == 0


def _gather(spec: PartitionSpec, w):
    at = _sharded_dims(spec)
    if _gathers_rows_only(at, w.shape):
        w = jax.lax.all_to_all(w, list(at)[1], 0, 1, tiled=True)
        return jax.lax.all_gather(w, tuple(at), axis=0, tiled=True)
    for axis, d in at.items():
        w = jax.lax.all_gather(w, axis, axis=d, tiled=True)
    return w


def _scatter(spec: PartitionSpec, g, shape):
    """Reduce-scatter g; each device keeps the shard of this shape that `_gather` reads from it."""
    at = _sharded_dims(spec)
    by_rows = _gathers_rows_only(at, shape)
    # One axis after the other, because the TPU compiler replaces a scatter over both by an all-reduce.
    for axis, d in at.items():
        g = jax.lax.psum_scatter(g, axis, scatter_dimension=0 if by_rows else d, tiled=True)
    return jax.lax.all_to_all(g, list(at)[1], 1, 0, tiled=True) if by_rows else g


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_with_gradient(spec: PartitionSpec, dtype, w):
    """Return (all of w in `dtype`, float32 zeros of its shape). The gradient of the zeros is w's gradient."""
    # The barrier is needed because XLA would otherwise hoist the cast of all blocks out of the scan.
    whole = _gather(spec, jax.lax.optimization_barrier(w).astype(dtype))
    return whole, jnp.zeros(whole.shape, jnp.float32)


def _gathered_fwd(spec, dtype, w):
    return _gather_with_gradient(spec, dtype, w), jnp.zeros((*w.shape, 0), w.dtype)  # its shape and dtype


def _gathered_bwd(spec, dtype, like, g):
    return (_scatter(spec, g[1], like.shape[:-1]).astype(like.dtype),)


_gather_with_gradient.defvjp(_gathered_fwd, _gathered_bwd)
