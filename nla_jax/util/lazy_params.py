"""Parameters that are read when they are written: who copies a model holds a tensor of it, not the model.

A `lazy_params.Array` stands in a tree where an array would. `nla_jax.util.checkpoint.save_tree` and
`nla_jax.lm.files.hf_write.save_hf` take either.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Array:
    """A parameter of this shape and dtype. `read(i)` gives block i of a stacked one, `read(None)` another
    one whole, each time anew."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int | None], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self):
        """What `read` is called with, one after the other, for all of it."""
        return range(self.shape[0]) if self.stacked else (None,)

    def whole(self) -> np.ndarray:
        """All of it in memory."""
        return np.stack([self.read(i) for i in self.blocks]) if self.stacked else self.read(None)


def of(array, stacked: bool) -> Array:
    """An array that is in memory (or on devices) already."""
    host = np.asarray(array)
    return Array(host.shape, host.dtype, stacked, lambda i: host if i is None else host[i])
