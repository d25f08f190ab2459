"""Make the mesh of a run. With mesh.tensor=0, the size of `tensor` is the one that decodes fastest."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nla_jax import configs, reconstructor, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import decode_cost
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.sharding import chips, inference
from nla_jax.sharding import mesh as mesh_lib

PROMPT = 64, 16  # tokens before the marker and from it on; the choice hardly depends on them
SHARE = 0.85  # of a chip's memory, because compiled rollouts take more than the formulas (docs/scaling.md)


def make(config, lm: LMConfig, devices=None) -> Mesh:
    """Return the mesh of a config on all devices, or on these. Raises UserError as `mesh.make`."""
    if config.mesh.tensor:
        return mesh_lib.make(**config.mesh, devices=devices)
    devices = jax.devices() if devices is None else devices
    chip = chips.of_device(devices[0])
    memory = chip.memory if chip else inference.device_memory(devices)
    tensor = choose_tensor(config, lm, len(devices), memory, chip)
    return mesh_lib.make(config.mesh.data, config.mesh.fsdp, tensor, devices=devices)


def choose_tensor(config, lm: LMConfig, n: int, memory: float, chip: chips.Chip | None,
                  hop: float = decode_cost.HOP) -> int:
    """Return the size of `tensor` that decodes fastest on n devices, by `decode_cost.choose_tensor`.

    memory: bytes of a device. Raises UserError if no size gives a mesh of n devices.
    """
    resting = resting_by_tensor(config, lm, n)
    return decode_cost.choose_tensor(lm, rollout_of(config), n, resting, SHARE * memory, chip, hop)


def resting_by_tensor(config, lm: LMConfig, n: int) -> dict[int, float]:
    """Return {size of `tensor`: bytes that rest on a device during the rollout}, for each possible size."""
    out, faults, total = {}, [], resting_bytes(config, lm)
    for tensor in (t for t in range(1, n + 1) if n % t == 0):
        try:
            data, fsdp, _ = mesh_lib.resolve_sizes(config.mesh.data, config.mesh.fsdp, tensor, n)
            check_batches(config, data * fsdp)
        except UserError as fault:
            faults.append(fault)
        else:
            out[tensor] = total / (fsdp * tensor)
    if not out:
        raise faults[-1]
    return out


def check_batches(config, ways: int) -> None:
    """Raise UserError if a batch of the config does not divide over `ways` shards of rows."""
    sizes = {"rl.written_ar": config.rl.written_ar}
    sizes |= {f"{name}.batch": config[name].batch for name in ("data", *configs.STAGES, "rl")
              if config[name].get("steps", 1)}
    for name, size in sizes.items():
        if size % ways:
            raise UserError(f"config {name}={size} does not divide over {ways} devices; choose a multiple of "
                            f"{ways}")


def rollout_of(config) -> decode_cost.Rollout:
    """Return the shape of a config's rollout, whose prompt is not known yet."""
    o = config.rl
    return decode_cost.Rollout(o.batch * o.group, o.batch, *PROMPT, o.max_new)


def resting_bytes(config, lm: LMConfig) -> float:
    """Return the bytes, on all devices, of what an RL step holds: parameters, Adam's moments, the reference,
    and the target if adapters or the frozen target share it."""
    layer = config.layer if config.layer != -1 else lm.default_layer()
    av = _entries(verbalizer.table(lm, rank=config.av.rank, affine=config.av.affine != "none"))
    ar = _entries(reconstructor.table(lm, layer, rank=config.ar.rank, kind=config.ar.kind))
    item = jnp.dtype(config.dtype).itemsize
    moments = jnp.dtype(config.mu_dtype).itemsize + 4
    shared = bool(config.av.rank or config.ar.rank or config.ar.kind == "frozen")
    return (av + ar) * (4 + moments) + av * item + shared * item * _entries(params_lib.table(lm))


def _entries(table: dict) -> int:
    return sum(math.prod(spec.shape) for spec in table.values())
