"""Give the minimal time of work on a TPU chip, from its peak rates."""

import dataclasses

from nla_jax.errors import UserError
from nla_jax.sharding.chips import CHIPS, Chip


def chip_of(topology: str) -> Chip:
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
