"""Choose the mesh on which a bundle explains, reads and is evaluated: all devices."""

import os

import jax
from jax.sharding import Mesh

from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import hardware

SHARE = 0.5  # of a device's memory for weights; the rest is for caches, activations and temporary copies


def choose_sizes(n: int, at_rest: int, in_decoding: int, memory: int) -> tuple[int, int, int]:
    """Return (data, fsdp, tensor) of n devices: as much data parallelism as their memory allows.

    Weights at rest are sharded over `fsdp` and `tensor`. A rollout's copy of AV is sharded over `tensor`
    only, and each token then communicates over `tensor`. So `tensor` is the smallest that fits.

    Args: bytes of all weights at rest, of AV in decoding, and of one device's memory.
    """
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for m in divisors:
        for tensor in (d for d in divisors if m % d == 0):
            if at_rest / m + in_decoding / tensor <= SHARE * memory:
                return n // m, m // tensor, tensor
    return 1, 1, n


def make_mesh(at_rest: int, in_decoding: int, devices=None) -> Mesh | None:
    """Return a mesh over all devices with the sizes of `choose_sizes`; None for a single device."""
    devices = hardware.devices() if devices is None else devices
    if len(devices) == 1:
        return None
    sizes = choose_sizes(len(devices), at_rest, in_decoding, device_memory(devices))
    return mesh_lib.make(*sizes, devices=devices)


def device_memory(devices) -> int:
    """Return the bytes of memory of one device. CPU devices share that of the host."""
    here = next((d for d in devices if d.process_index == jax.process_index()), devices[0])
    found = here.memory_stats() or {}
    if "bytes_limit" in found:
        return found["bytes_limit"]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host // jax.local_device_count()
