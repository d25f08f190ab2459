"""Read weights from a model's files onto the shards of a mesh, one tensor at a time.

The host needs memory for one tensor, or for two during the change. Tensors go to the devices in the
file's layout and dtype; there they are transposed, cast and, if blocks are stacked, written into the stack.
"""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.family import Tensor, turn
from nla_jax.lm.model import cast
from nla_jax.sharding import mesh as mesh_lib


def place(
    path, mesh=None, dtype="float32", *, cfg: LMConfig | None = None, without: tuple[str, ...] = ()
) -> tuple[LMConfig, dict]:
    """Read configuration and parameters of a GGUF file or a Hugging Face directory onto the mesh.

    The values are those of `weights.load`, cast by `model.cast`: matrices in `dtype`, norms and biases in
    float32. The host needs memory for two tensors of the file. In a pod all processes call this. Each
    process reads its own shards of safetensors, but all of a GGUF file.

    Args:
      mesh: None puts everything on the first device.
      cfg, without: as in `weights.open_files`.

    Raises UserError as `weights.open_files`, and for weights that are not finite.
    """
    files = weights.open_files(path, cfg, without)
    kinds = jax.eval_shape(functools.partial(cast, dtype=dtype), params_lib.nest({
        name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in files.specs.items()
    }))
    kinds = traverse_util.flatten_dict(kinds, sep="/")
    out = {}
    for ours, block, theirs in files.plan:
        spec, kind, tensor = files.specs[ours], kinds[ours].dtype, files.tensors[theirs]
        turned = ours != "embed" and len(tensor.shape) > 1
        whole = _sharding(spec, mesh)
        read = _read(tensor, _sharding(spec, mesh, stacked=block is not None, turned=turned))
        if block is None:
            out[ours], finite = _one(whole, kind, turned)(read)
        else:
            if block == 0:
                out[ours] = _empty(whole, kind, spec.shape)()
            out[ours], finite = _fill(whole, turned)(out[ours], np.int32(block), read)
        # This waits for the devices, so that at most one transfer is in flight.
        files.check_finite(finite, theirs, kind)
        # jax keeps the host array alive until Python collects garbage.
        read.delete()
        gc.collect(0)
    return files.cfg, params_lib.nest(out)


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


def _places(where: Sharding):
    """Return the shardings of a parameter and of its finite flag, which is replicated."""
    return where, NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where


@functools.cache
def _empty(where: Sharding, kind, shape):
    return jax.jit(lambda: jnp.zeros(shape, kind), out_shardings=where)


@functools.cache
def _one(where: Sharding, kind, turned: bool):
    def one(x):
        x = (turn(x) if turned else x).astype(kind)
        return x, jnp.isfinite(x).all()

    return jax.jit(one, out_shardings=_places(where))


@functools.cache
def _fill(where: Sharding, turned: bool):
    def fill(stack, i, x):
        x = (turn(x) if turned else x).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, x, i, 0), jnp.isfinite(x).all()

    return jax.jit(fill, donate_argnums=0, out_shardings=_places(where))


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
