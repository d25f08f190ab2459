"""Parameters that are read only when they are written, so that copying a model needs the memory of one block.

A `lazy_params.Array` replaces an array in a tree. `nla_jax.util.checkpoint.save_tree` and
`nla_jax.lm.files.hf_write.save_hf` accept both.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Array:
    """A parameter of this shape and dtype, in a file.

    If `stacked`, the first axis is the block, and `read(i)` reads block i. Otherwise `read(None)` reads the
    whole parameter. Nothing is cached."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int | None], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def blocks(self):
        """Return the arguments of `read` that together cover the parameter."""
        return range(self.shape[0]) if self.stacked else (None,)

    def whole(self) -> np.ndarray:
        """Read the whole parameter into memory."""
        return np.stack([self.read(i) for i in self.blocks]) if self.stacked else self.read(None)


def wrap(array, stacked: bool) -> Array:
    """Wrap an array that is in host memory or on devices."""
    host = np.asarray(array)
    return Array(host.shape, host.dtype, stacked, lambda i: host if i is None else host[i])
