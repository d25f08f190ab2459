"""Where values are inside a step, and how a step is put under a mesh.

The functions read the table of `nla_jax.sharding.rules`. A place is one of three things: a logical axis,
which is split by the table's rule for values in use; mesh axes, as `at_rest` and `decoded` return them; or
None, which is whole.

Without a mesh, or on one device, every function here gives back what it was given.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nla_jax.sharding import rules


def under(mesh, step):
    """`step`, traced with the mesh at hand; as it is where the mesh is None."""
    if mesh is None:
        return step

    @functools.wraps(step)
    def placed(*args, **kw):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*args, **kw)

    return placed


# A gradient of a weight, summed over devices, is sent once as it is; cut into steps that overlap with the
# product, it would be sent in float32 and in both directions of the ring.
_TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_MEMORY = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}  # GiB of a chip


def compiler_options(mesh) -> dict | None:
    """What a step's compiler is told beside the program.

    It spends what memory there is on overlap; a tenth is kept for what it does not count.
    """
    if mesh is None or mesh.size == 1 or isinstance(mesh, jax.sharding.AbstractMesh):
        return None
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    gib = _MEMORY.get(device.device_kind)
    return _TPU | ({"xla_tpu_max_hbm_size_mib": str(int(0.9 * gib * 1024))} if gib else {})


def active() -> bool:
    """Whether there is a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def axes_of(size: int, place: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The mesh axes that split a dimension of this size at this place."""
    axes = rules.TABLE[place].in_use if isinstance(place, str) else place or ()
    return rules.fitting(size, axes, jax.sharding.get_abstract_mesh()) or None


def ways(size: int, place: str = "rows") -> int:
    """Into how many parts a dimension of this size is split at this place."""
    return rules.parts(axes_of(size, place) or (), jax.sharding.get_abstract_mesh()) if active() else 1


def spec(shape, places) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are at these places (those not named are whole)."""
    places = (*places, *(None,) * (len(shape) - len(places)))
    return PartitionSpec(*(axes_of(n, p) for n, p in zip(shape, places, strict=True)))


def constrain(x, *places):
    """x with its dimensions at these places (those not named are whole)."""
    return jax.lax.with_sharding_constraint(x, spec(x.shape, places)) if active() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _move(x, there, back, dtype):
    return _along(x.astype(dtype), there).astype(x.dtype)


def _along(x, specs):
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, spec)
    return x


_move.defvjp(
    lambda x, there, back, dtype: (_move(x, there, back, dtype), None),
    lambda there, back, dtype, _, g: (_along(g, back),),
)


def move(x, there: tuple, back: tuple, dtype=None, via: tuple | None = None):
    """x at the places `there`, its gradient at `back`: a sum over devices is then only made where it is
    kept (a reduce-scatter), where `constrain` would give it to every device.

    Args:
      dtype: what it travels as. via: places that x and its gradient pass through.
    """
    if not active():
        return x
    there, back = ([spec(x.shape, p) for p in (via, end) if p is not None] for end in (there, back))
    return _move(x, tuple(there), tuple(back), jnp.dtype(dtype or x.dtype))


def rows(tree, axis: int = 0):
    """Every array with its rows (dimension `axis`) dealt to all devices and the rest whole."""
    if not active():
        return tree
    return jax.tree.map(lambda a: constrain(a, *(None,) * axis, "rows"), tree)


def at_rest(axes) -> tuple:
    """The places of a parameter between steps, from its logical axes."""
    return tuple(rules.TABLE[a].at_rest for a in axes)


def in_use(axes) -> tuple:
    """The places of a parameter where each device multiplies its own rows, from its logical axes."""
    return tuple(rules.TABLE[a].in_use for a in axes)


def weight(w, axes, n_rows: int, dtype=None):
    """A parameter where `n_rows` rows meet it in training, cast to `dtype` before it is sent around.

    Rows that are dealt to devices need all of it. Rows that are not (a prompt that all share) come to
    the parameter, which stays where it is.
    """
    if dtype is not None:
        # Else the compiler would cast all blocks before the loop that takes them one by one.
        w = (_kept(w) if active() else w).astype(dtype)
    if ways(n_rows) == 1:
        return move(w, at_rest(axes), at_rest(axes))
    # One dimension is gathered and scattered by all devices: two at a time are copied around in memory.
    via = tuple("embedding" if a == "model" else None for a in axes) if "model" in axes else None
    return move(w, in_use(axes), at_rest(axes), via=via)


@jax.custom_vjp
def _kept(w):
    return jax.lax.optimization_barrier(w)


_kept.defvjp(lambda w: (_kept(w), None), lambda _, g: (g,))


def decoded(axes) -> tuple:
    """The places of a parameter in the decode loop, from its logical axes (None: whole). Biases are whole."""
    return tuple(rules.TABLE[a].in_decoding if a and len(axes) > 1 else () for a in axes)


def decoding(w, axes):
    """A parameter as the decode loop reads it."""
    return constrain(w, *decoded(axes))


def lookup(table_VD, ids):
    """Rows of an embedding table, which is split by columns where the ids come to it."""
    if not active():
        return jnp.take(table_VD, ids, axis=0)
    split = (None, "embedding")
    table_VD = move(table_VD, split, at_rest(("vocab", "model")), via=split)
    x = jnp.take(table_VD, constrain(ids, "hosts"), axis=0)
    x = constrain(x, "hosts", *(None,) * (ids.ndim - 1), "embedding")
    return constrain(x, "rows")
