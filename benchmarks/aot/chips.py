"""Give the peak rates of each kind of TPU chip, from public figures, and the minimal time of work on it."""

import dataclasses

from nla_jax.errors import UserError

GIB = 2**30


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
LIMIT = 0.9  # usable share of the memory, because the compiler does not count every allocation


def of(topology: str) -> Chip:
    """Return the chip of a topology such as "v5e:4x4". Raises UserError for an unknown kind."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"--topology {topology}: one of {', '.join(CHIPS)}, then a shape, such as v5e:4x4")
    return CHIPS[kind]


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one phase at peak rates: for products, memory traffic and communication."""

    products: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """Return the time if all three overlap."""
        return max(self.products, self.memory, self.links)

    @property
    def worst(self) -> float:
        """Return the time if nothing overlaps."""
        return self.products + self.memory + self.links


def time(chip: Chip, flops: float, hbm: float, ici: float) -> Time:
    """Return the Time of one chip's work: operations, bytes of memory traffic, bytes sent."""
    return Time(flops / chip.flops, hbm / chip.hbm, ici / chip.ici)
