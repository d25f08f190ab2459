"""Make the device mesh, and shard parameters by the table of `nla_jax.sharding.rules`.

AV, AR and the target share one mesh. `data` and `fsdp` split the batch; `fsdp` and `tensor` split parameters.
"""

import math

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nla_jax.errors import UserError
from nla_jax.sharding import rules

AXES = ("data", "fsdp", "tensor")


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Make a (data, fsdp, tensor) mesh over all devices. One size may be -1: the remaining devices.

    Raises UserError when the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(data, fsdp, tensor, len(devices))
    # On TPUs, `create_device_mesh` follows the interconnect. On other platforms it keeps the devices' order.
    grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def resolve_sizes(data: int, fsdp: int, tensor: int, n: int) -> tuple[int, int, int]:
    """Return the sizes of a mesh of n devices, with -1 replaced. Raises UserError as `make`."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh sizes {sizes}: must be positive numbers, at most one of them -1")
    known = math.prod(s for s in sizes if s != -1)
    sizes = [max(n // known, 1) if s == -1 else s for s in sizes]
    if math.prod(sizes) != n:
        raise UserError(f"a mesh of {dict(zip(AXES, sizes, strict=True))} needs {math.prod(sizes)} "
                        f"devices; there are {n}")
    return tuple(sizes)


def spec_of(shape, axes, mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of one parameter at rest. Dimensions that do not divide are replicated."""
    axes_of = [rules.TABLE[axis].at_rest for axis in axes]
    return PartitionSpec(*(rules.fitting(n, a, mesh) or None for n, a in zip(shape, axes_of, strict=True)))


def shard_array(value, sharding: NamedSharding) -> jax.Array:
    """Shard an array of which every process of a pod has the whole value.

    `jax.device_put` would first send the whole array between processes to check that the values agree.
    """
    if jax.process_count() == 1 or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    host = np.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def replicated_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Return the replicated sharding, which the host of every process can read; None without a mesh."""
    return NamedSharding(mesh, PartitionSpec()) if mesh else None


def rows_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Return the sharding of a batch: its rows (first axis) over `data` and `fsdp`; None without a mesh."""
    return NamedSharding(mesh, PartitionSpec(rules.TABLE["rows"].at_rest)) if mesh else None


def mesh_of(tree) -> Mesh | None:
    """Return the mesh of a tree's arrays, taken from its first leaf; None if they are on a single device."""
    on = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return on.mesh if isinstance(on, NamedSharding) else None


def shard_params(tree, specs: dict, mesh: Mesh, prefix: str = ""):
    """Shard a nested tree of parameters over the mesh, by the table {"a/b": `params.Spec`}."""
    out = {}
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, dict):
            out[name] = shard_params(value, specs, mesh, path + "/")
        else:
            axes = specs[path].axes
            out[name] = shard_array(value, NamedSharding(mesh, spec_of(value.shape, axes, mesh)))
    return out


def replicate(tree, mesh: Mesh):
    """Replicate every leaf on all devices of the mesh."""
    return jax.tree.map(lambda a: shard_array(a, replicated_sharding(mesh)), tree)


def n_batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch."""
    return rules.parts(rules.TABLE["rows"].at_rest, mesh)


def shard_batch(tree, mesh: Mesh):
    """Shard the rows (first axis) of every leaf over `data` and `fsdp`.

    Every process of a pod passes the whole batch and keeps its own shards. Raises UserError when the number
    of rows is not a multiple of `ways(mesh)`.
    """
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % n_batch_shards(mesh):
            raise UserError(
                f"a batch of {leaf.shape[0]} rows does not divide over {n_batch_shards(mesh)} devices; "
                f"choose a multiple of {n_batch_shards(mesh)}"
            )
    return jax.tree.map(lambda a: shard_array(a, rows_sharding(mesh)), tree)
