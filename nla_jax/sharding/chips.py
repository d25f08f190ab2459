"""The memory and the peak rates of TPU chips, from public figures."""

import dataclasses

GIB = 2**30
LIMIT = 0.9  # usable share of the memory, because the compiler does not count every allocation


@dataclasses.dataclass(frozen=True)
class Chip:
    """Memory and peak rates. `ici`: bytes per second along one axis of the torus, in both directions."""

    memory: int  # bytes
    flops: float  # bfloat16 operations per second
    hbm: float  # bytes per second
    ici: float


# cloud.google.com/tpu/docs, pages of each version; links of 45 GB/s each way (v5e) and 90 GB/s (v5p, v6e).
CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 90e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 180e9),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 180e9),
}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # by `device_kind`


def of_device(device) -> Chip | None:
    """Return the chip of a jax device; None if it is not a TPU of the table."""
    return CHIPS.get(_KINDS.get(device.device_kind, "")) if device.platform == "tpu" else None
