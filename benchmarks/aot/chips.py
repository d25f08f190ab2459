"""What one chip of each kind can do, by its maker's public figures, and the time that work takes at best."""

import dataclasses

from nla_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates. `ici`: bytes a second that a chip sends along one axis of the torus, both directions."""

    memory: int  # bytes
    flops: float  # bfloat16, a second
    hbm: float  # bytes a second
    ici: float


# cloud.google.com/tpu/docs, pages of each version; links of 45 GB/s each way (v5e) and 90 GB/s (v5p, v6e).
CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 90e9),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 180e9),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 180e9),
}
LIMIT = 0.9  # of the memory: the rest is for what no compiler counts


def of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4". Raises UserError for one that is not known here."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"--topology {topology}: one of {', '.join(CHIPS)}, then a shape, such as v5e:4x4")
    return CHIPS[kind]


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one phase, by what would take them."""

    products: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """All three at once."""
        return max(self.products, self.memory, self.links)

    @property
    def worst(self) -> float:
        """One after the other, each at its peak rate."""
        return self.products + self.memory + self.links


def time(chip: Chip, flops: float, hbm: float, ici: float) -> Time:
    """Of one chip's work: operations, bytes of memory, bytes sent."""
    return Time(flops / chip.flops, hbm / chip.hbm, ici / chip.ici)
