"""Compile programs for TPU topologies with libtpu, without a TPU."""

import dataclasses
import importlib.util
import math
import os
import time

import jax
import numpy as np

from nla_jax.errors import UserError

LIBTPU = 'pip install "libtpu==0.0.42.*"'


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The result of one compilation. Bytes are per chip."""

    text: str  # the optimised HLO of one chip
    arguments: int
    outputs: int
    aliased: int  # outputs in the memory of donated arguments
    temporary: int
    code: int
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


def devices(topology: str):
    """Return the devices of a TPU topology such as "v5e:4x4".

    Raises UserError if libtpu is not installed or the name is unknown."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"compiling for a TPU needs libtpu, which is not installed: {LIBTPU}")
    # libtpu must not query a metadata server, and must not lock a TPU of this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as err:
        reason = " ".join(str(err).split())[:200]
        raise UserError(f"--topology {topology}: {reason}; give one such as v5e:4x4 or v5p:2x2x2") from err


def count(topology: str) -> int:
    """Return the number of chips of a topology from its name. Raises UserError for an invalid name."""
    try:
        return math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    except ValueError as err:
        raise UserError(f"--topology {topology}: give one such as v5e:4x4 or v5p:2x2x2") from err


def fake_devices(topology: str):
    """Return as many fake CPU devices as the topology has chips. Raises UserError if jax has fewer."""
    n = count(topology)
    if len(jax.devices()) < n:
        raise UserError(f"{n} devices are needed, jax has {len(jax.devices())}: start with "
                        f"XLA_FLAGS=--xla_force_host_platform_device_count={n}")
    return jax.devices()[:n]


def compile_program(program, platform: str = "tpu") -> Compiled:
    """Compile one program for the devices of its arguments. Raises UserError if it does not fit in memory."""
    began = time.monotonic()
    lowered = program.jitted.trace(*program.args).lower(lowering_platforms=(platform,))
    try:
        out = lowered.compile()
    except jax.errors.JaxRuntimeError as err:
        if "RESOURCE_EXHAUSTED" not in str(err):
            raise
        said = " ".join(str(err).split())[:300]
        raise UserError(f"{program.name} does not fit in memory: {said}") from err
    m = out.memory_analysis()
    return Compiled(
        out.as_text(),
        m.argument_size_in_bytes,
        m.output_size_in_bytes,
        m.alias_size_in_bytes,
        m.temp_size_in_bytes,
        m.generated_code_size_in_bytes,
        time.monotonic() - began,
    )


def bytes_of(tree) -> int:
    """Return the bytes per device of a tree of arrays or shapes with shardings."""
    return sum(
        int(np.prod(a.sharding.shard_shape(a.shape), dtype=np.int64)) * a.dtype.itemsize
        for a in jax.tree.leaves(tree)
    )
