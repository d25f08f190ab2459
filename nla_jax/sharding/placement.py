"""Shard values inside a step: sharding constraints, and tracing under a mesh.

The functions read the table of `nla_jax.sharding.rules`. A place is one of three things: a logical axis,
which is split by the table's rule for values in use; mesh axes, as `storage_places` and `decode_places`
return them; or None, which is whole.

Without a mesh, or on one device, every function here returns its input unchanged.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nla_jax.sharding import chips, rules
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import int8


def trace_under_mesh(mesh, step):
    """Return `step`, traced with `mesh` as the abstract mesh; unchanged if the mesh is None."""
    if mesh is None:
        return step

    @functools.wraps(step)
    def placed(*args, **kw):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args, **kw)

    return placed


def jit_by_mesh(function, **options):
    """Return `jax.jit(function, **options)`, traced under the mesh of its arguments' arrays, if any."""
    @functools.cache
    def jitted(mesh):
        return jax.jit(trace_under_mesh(mesh, function), **options)

    @functools.wraps(function)
    def run(*args, **kw):
        found = (mesh_lib.mesh_of(a) for a in jax.tree.leaves((args, kw)))
        return jitted(next((mesh for mesh in found if mesh is not None), None))(*args, **kw)

    return run


# This threshold turns windowed einsum off: XLA would otherwise split the reduction of a weight gradient into
# steps that overlap with the matmul, and send it in float32 and in both directions of the ring.
_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def compiler_options(mesh) -> dict | None:
    """Return XLA's options for a step on several TPU chips; None on other devices.

    XLA uses all of the memory limit to overlap communication. The limit is 90 % of HBM, because XLA does
    not count every allocation.
    """
    if mesh is None or mesh.size == 1 or isinstance(mesh, jax.sharding.AbstractMesh):
        return None
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    chip = chips.of_device(device)
    return _TPU | ({"xla_tpu_max_hbm_size_mib": str(int(chips.LIMIT * chip.memory / 2**20))} if chip else {})


def has_mesh() -> bool:
    """Return whether the current abstract mesh has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def axes_of(size: int, place: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the mesh axes that shard a dimension of this size at this place; None if it is replicated."""
    axes = rules.TABLE[place].in_use if isinstance(place, str) else place or ()
    return rules.fitting(size, axes, jax.sharding.get_abstract_mesh()) or None


def n_shards(size: int, place: str = "rows") -> int:
    """Return the number of shards of a dimension of this size at this place."""
    return rules.parts(axes_of(size, place) or (), jax.sharding.get_abstract_mesh()) if has_mesh() else 1


def spec(shape, places) -> PartitionSpec:
    """Return the PartitionSpec of an array with its dimensions at these places; the rest is replicated."""
    places = (*places, *(None,) * (len(shape) - len(places)))
    return PartitionSpec(*(axes_of(n, p) for n, p in zip(shape, places, strict=True)))


def constrain(x, *places):
    """Constrain the sharding of x: its dimensions at these places, the remaining ones replicated."""
    return jax.lax.with_sharding_constraint(x, spec(x.shape, places)) if has_mesh() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _move(x, there, back, dtype):
    return _constrain_in_turn(x.astype(dtype), there).astype(x.dtype)


def _constrain_in_turn(x, specs):
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, spec)
    return x


_move.defvjp(
    lambda x, there, back, dtype: (_move(x, there, back, dtype), None),
    lambda there, back, dtype, _, g: (_constrain_in_turn(g, back),),
)


def reshard(x, there: tuple, back: tuple, dtype=None, via: tuple | None = None):
    """Reshard x to the places `there`, and its gradient to the places `back`.

    The gradient's sum over devices is then a reduce-scatter. With `constrain`, XLA would all-reduce it.

    Args:
      dtype: dtype of x while it is communicated. via: intermediate places of x and of its gradient.
    """
    if not has_mesh():
        return x
    if int8.is_int8(x):
        return x.replace(q=reshard(x.q, there, back, via=via))
    there, back = ([spec(x.shape, p) for p in (via, end) if p is not None] for end in (there, back))
    return _move(x, tuple(there), tuple(back), jnp.dtype(dtype or x.dtype))


def shard_rows(tree, axis: int = 0):
    """Shard dimension `axis` of every array over all devices; replicate the other dimensions."""
    if not has_mesh():
        return tree
    return jax.tree.map(lambda a: constrain(a, *(None,) * axis, "rows"), tree)


def storage_places(axes) -> tuple:
    """Return the places of a parameter between steps, from its logical axes."""
    return tuple(rules.TABLE[a].at_rest for a in axes)


def in_use(axes) -> tuple:
    """Return the places of a parameter where each device multiplies its own rows, from its logical axes."""
    return tuple(rules.TABLE[a].in_use for a in axes)


def gather_weight(w, axes, n_rows: int, dtype=None):
    """Return a parameter as a training step multiplies it with `n_rows` rows, cast to `dtype` if given.

    If the rows are sharded, this all-gathers the weight and reduce-scatters its gradient. If they are not
    (the shared prompt), the weight stays sharded. The cast comes first, so that less is communicated.
    """
    if int8.is_int8(w):
        w, dtype = w.astype(dtype or w.dtype), None
    if dtype is not None:
        # Without the barrier XLA would hoist the cast of all blocks out of the loop over blocks.
        w = (_barrier(w) if has_mesh() else w).astype(dtype)
    if n_shards(n_rows) == 1:
        return reshard(w, storage_places(axes), storage_places(axes))
    # All devices gather and scatter one dimension, because two at a time would need copies in memory.
    via = tuple("embedding" if a == "model" else None for a in axes) if "model" in axes else None
    return reshard(w, in_use(axes), storage_places(axes), via=via)


@jax.custom_vjp
def _barrier(w):
    return jax.lax.optimization_barrier(w)


_barrier.defvjp(lambda w: (_barrier(w), None), lambda _, g: (g,))


def decode_places(axes) -> tuple:
    """Return the places of a parameter in the decode loop, from its logical axes. Biases are replicated."""
    return tuple(rules.TABLE[a].in_decoding if a and len(axes) > 1 else () for a in axes)


def shard_for_decode(w, axes, stacked: bool = False):
    """Constrain a parameter, or one of all blocks if `stacked`, to its sharding in the decode loop."""
    lead = (None,) if stacked else ()
    return jax.tree.map(lambda a: constrain(a, *lead, *decode_places(axes)), w)  # `Int8` has two arrays


def lookup(table_VD, ids):
    """Look up `ids` in an embedding table [V, D] that is sharded over D; the result's rows are sharded."""
    if not has_mesh():
        return int8.take_rows(table_VD, ids)
    split = (None, "embedding")
    table_VD = reshard(table_VD, split, storage_places(("vocab", "model")), via=split)
    x = int8.take_rows(table_VD, constrain(ids, "hosts"))
    x = constrain(x, "hosts", *(None,) * (ids.ndim - 1), "embedding")
    return constrain(x, "rows")
