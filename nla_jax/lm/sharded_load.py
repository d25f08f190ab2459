"""Read weights from a model's files onto the shards of a mesh, one tensor at a time.

The host needs memory for one tensor, or for two during the change. Tensors go to the devices in the
file's layout and dtype; there they are transposed, cast and, if blocks are stacked, written into the stack.
"""

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.family import Tensor, turn
from nla_jax.lm.model import cast
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import int8

# A rounded router would choose other experts. A convolution is not a product with a matrix. All are small.
_NOT_INT8 = ("router", "shared_gate", "delta_conv")


def place(
    path, mesh=None, dtype="float32", *, cfg: LMConfig | None = None, without: tuple[str, ...] = ()
) -> tuple[LMConfig, dict]:
    """Read configuration and parameters of a GGUF file or a Hugging Face directory onto the mesh.

    The values are those of `weights.load`, cast by `model.cast`: matrices in `dtype`, norms and biases in
    float32. The host needs memory for two tensors of the file. In a pod all processes call this. Each
    process reads its own shards of safetensors, but all of a GGUF file.

    Args:
      mesh: None puts everything on the first device.
      dtype: of matrices; "int8" quantizes them (`nla_jax.util.int8`).
      cfg, without: as in `weights.open_files`.

    Raises UserError as `weights.open_files`, and for weights that are not finite.
    """
    files = weights.open_files(path, cfg, without)
    pieces = (
        Piece(ours, block, files.tensors[theirs], ours != "embed" and len(files.tensors[theirs].shape) > 1,
              functools.partial(files.check_finite, theirs=theirs))
        for ours, block, theirs in files.plan
    )
    return files.cfg, stream(pieces, files.specs, kinds_of(files.specs, dtype), mesh)


def kinds_of(specs: dict, dtype) -> dict:
    """Return the dtype of each parameter of a model: `dtype` for matrices, float32 for norms and biases.

    int8 leaves the parameters `_NOT_INT8` in float32 too.
    """
    shapes = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    cast_shapes = jax.eval_shape(functools.partial(cast, dtype=dtype), params_lib.nest(shapes))
    kinds = {name: a.dtype for name, a in traverse_util.flatten_dict(cast_shapes, sep="/").items()}
    is_kept = lambda name: kinds[name] == np.int8 and name.rsplit("/", 1)[-1] in _NOT_INT8
    return {name: np.dtype(np.float32) if is_kept(name) else kind for name, kind in kinds.items()}


class Piece(NamedTuple):
    """A tensor of a file: a parameter, or one block of it.

    turned: whether the file has its transpose. check: raises unless its first argument, whether the values
    are finite in `dtype`, is true.
    """

    name: str
    block: int | None
    tensor: Tensor
    turned: bool
    check: Callable


def pieces_of(tree: dict, where: str) -> Iterator[Piece]:
    """Yield the pieces of a tree of `lazy_params.Array`. where: names the tree's files in the message of the
    UserError for values that are not finite."""
    for name, array in traverse_util.flatten_dict(tree, sep="/").items():
        def check(finite, dtype, name=name):
            if not finite:
                raise UserError(f"{where}: {name} is not finite as {np.dtype(dtype).name}: the file is "
                                "damaged, or the dtype is too narrow")

        for block in array.blocks:
            shape = array.shape if block is None else array.shape[1:]
            read = functools.partial(array.read, block)
            yield Piece(name, block, Tensor(shape, read, dtype=array.dtype), False, check)


def stream(pieces: Iterable[Piece], specs: dict, kinds: dict, mesh=None) -> dict:
    """Read parameters {name: Spec} piece by piece onto the mesh: a tree in the dtypes {name: dtype}.

    The blocks of a parameter must be in order. The host needs memory for two pieces. mesh: as in `place`.
    Parameters whose dtype is int8 are quantized, with one scale for each output channel.
    """
    out = {}
    for piece in pieces:
        name, stacked = piece.name, piece.block is not None
        spec, kind = specs[name], kinds[name]
        whole = _sharding(spec, mesh)
        read = _read(piece.tensor, _sharding(spec, mesh, stacked=stacked, turned=piece.turned))
        over = -1 if name.endswith("embed") else -2  # the dimension that shares a scale
        if not stacked:
            out[name], finite = _one(whole, kind, piece.turned, over)(read)
        else:
            if piece.block == 0:
                out[name] = _empty(whole, kind, spec.shape)()
            out[name], finite = _fill(whole, kind, piece.turned)(out[name], np.int32(piece.block), read)
        # This waits for the devices, so that at most one transfer is in flight.
        piece.check(finite, dtype=kind)
        # jax keeps the host array alive until Python collects garbage.
        read.delete()
        gc.collect(0)
    return params_lib.nest(out)


def _sharding(spec, mesh, *, stacked: bool = False, turned: bool = False) -> Sharding:
    """Return the sharding of a parameter, of one of its blocks if `stacked`, or of [out, in] if `turned`."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    parts = tuple(mesh_lib.spec_of(spec.shape, spec.axes, mesh))[int(stacked) :]
    return NamedSharding(mesh, PartitionSpec(*((*parts[:-2], *parts[-2:][::-1]) if turned else parts)))


def _read(tensor: Tensor, where: Sharding) -> jax.Array:
    """Read a tensor in the file's layout; each slice that this process's devices need is read once."""
    whole = None if tensor.part else tensor.read()
    found = {}

    def part(index):
        key = tuple((s.start, s.stop) for s in index)
        if key not in found:
            array = whole[index] if tensor.part is None else tensor.part(index)
            with np.errstate(over="ignore"):  # reported by the caller, with the name of the tensor
                found[key] = array.astype(np.float32) if array.dtype == np.float64 else array
        return found[key]

    return jax.make_array_from_callback(tensor.shape, where, part)


# The caches below keep one compiled program per shape and sharding for the life of the process.


def _place_of(where: Sharding, kind):
    """Return the shardings of a stored parameter. Scales of `Int8` are replicated."""
    return int8.Int8(where, _replicated(where)) if kind == np.int8 else where


def _replicated(where: Sharding) -> Sharding:
    return NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where


def _store(x, kind, turned: bool, over: int = -2):
    """Return a tensor of a file as it is stored."""
    x = turn(x) if turned else x
    return int8.quantize(x, over) if kind == np.int8 else x.astype(kind)


@functools.cache
def _empty(where: Sharding, kind, shape):
    def empty():
        if kind != np.int8:
            return jnp.zeros(shape, kind)
        return int8.Int8(jnp.zeros(shape, kind), jnp.zeros((*shape[:-2], 1, shape[-1]), jnp.float32))

    return jax.jit(empty, out_shardings=_place_of(where, kind))


@functools.cache
def _one(where: Sharding, kind, turned: bool, over: int):
    def one(x):
        finite = jnp.isfinite(x if kind == np.int8 else x.astype(kind)).all()
        return _store(x, kind, turned, over), finite

    return jax.jit(one, out_shardings=(_place_of(where, kind), _replicated(where)))


@functools.cache
def _fill(where: Sharding, kind, turned: bool):
    def fill(stack, i, x):
        finite = jnp.isfinite(x if kind == np.int8 else x.astype(kind)).all()
        put = lambda s, a: jax.lax.dynamic_update_index_in_dim(s, a, i, 0)
        return jax.tree.map(put, stack, _store(x, kind, turned)), finite

    places = _place_of(where, kind), _replicated(where)
    return jax.jit(fill, donate_argnums=0, out_shardings=places)


def open_target(uri: str, dtype: str):
    """Open a target: (path, LMConfig, params in `dtype` on the first device, tokenizer)."""
    path = weights.resolve(uri)
    tok = tok_lib.load(path)
    tok_lib.check_vocabulary(tok, weights.read_config(path).vocab_size)
    return path, *place(path, dtype=dtype), tok


def abstract(table: dict, mesh=None) -> dict:
    """Return the float32 shapes and shardings of a role's tree, from its table and the mesh, if any."""
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shape(s):
        on = jax.sharding.NamedSharding(mesh, mesh_lib.spec_of(s.shape, s.axes, mesh)) if mesh else alone
        return jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=on)

    return params_lib.nest({n: shape(s) for n, s in table.items()})
