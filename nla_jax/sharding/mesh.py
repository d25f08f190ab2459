"""One device mesh for every role; `nla_jax.sharding.rules` is the table of what its axes split.

Axes of the mesh: `data` and `fsdp` split the batch; `fsdp` and `tensor` split parameters.
"""

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nla_jax.errors import UserError
from nla_jax.sharding import rules

AXES = ("data", "fsdp", "tensor")


def make(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one size may be -1 and takes what is left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = sizes_of(data, fsdp, tensor, len(devices))
    # Neighbours in the mesh are neighbours in a TPU's wiring; elsewhere devices stand in their order.
    grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def sizes_of(data: int, fsdp: int, tensor: int, n: int) -> tuple[int, int, int]:
    """The sizes of a mesh of n devices, with -1 replaced. Raises UserError as `make`."""
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh sizes {sizes}: positive numbers, at most one of them -1")
    known = int(np.prod([s for s in sizes if s != -1]))
    sizes = [max(n // known, 1) if s == -1 else s for s in sizes]
    if int(np.prod(sizes)) != n:
        raise UserError(f"a mesh of {dict(zip(AXES, sizes, strict=True))} needs {np.prod(sizes)} "
                        f"devices; there are {n}")
    return tuple(sizes)


def spec_of(shape, axes, mesh: Mesh) -> PartitionSpec:
    """Where one parameter is at rest. A dimension that its mesh axis does not divide is whole."""
    axes_of = [rules.TABLE[axis].at_rest for axis in axes]
    return PartitionSpec(*(rules.fitting(n, a, mesh) or None for n, a in zip(shape, axes_of, strict=True)))


def put(value, sharding: NamedSharding) -> jax.Array:
    """An array that every process of a pod holds whole, laid out over the mesh.

    `jax.device_put` would first send all of it around, to see that it is the same everywhere.
    """
    if jax.process_count() == 1 or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    host = np.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """A whole copy on every device: what the host of any process can read. None where there is no mesh."""
    return NamedSharding(mesh, PartitionSpec()) if mesh else None


def mesh_of(tree) -> Mesh | None:
    """The mesh that the arrays of a tree lie on, None when they are on a device of their own."""
    on = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return on.mesh if isinstance(on, NamedSharding) else None


def place(tree, specs: dict, mesh: Mesh, prefix: str = ""):
    """Put a nested tree of parameters on the mesh by the Spec table {"a/b": Spec}."""
    out = {}
    for name, value in tree.items():
        path = prefix + name
        if isinstance(value, dict):
            out[name] = place(value, specs, mesh, path + "/")
        else:
            axes = specs[path].axes
            out[name] = put(value, NamedSharding(mesh, spec_of(value.shape, axes, mesh)))
    return out


def replicated(tree, mesh: Mesh):
    """A copy of every leaf on every device."""
    return jax.tree.map(lambda a: put(a, everywhere(mesh)), tree)


def ways(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return rules.parts(rules.TABLE["rows"].at_rest, mesh)


def batch(tree, mesh: Mesh):
    """Rows over `data` and `fsdp`; every process of a pod gives the whole batch, and keeps its part.

    Raises UserError when the rows do not divide.
    """
    for leaf in jax.tree.leaves(tree):
        if leaf.shape[0] % ways(mesh):
            raise UserError(f"a batch of {leaf.shape[0]} rows does not divide over {ways(mesh)} devices; "
                            f"choose a multiple of {ways(mesh)}")
    rows = NamedSharding(mesh, PartitionSpec(rules.TABLE["rows"].at_rest))
    return jax.tree.map(lambda a: put(a, rows), tree)
