"""The sharding rules, as one table: which mesh axes split which logical axis, and when.

A logical axis names a dimension of a parameter (`nla_jax.lm.params`) or of an activation. It has a rule for
each of three times:

- At rest, between steps: `fsdp` and `tensor` split parameters and optimizer moments. `data` and `fsdp` split
  a batch.
- In use, in training and scoring: each device has its own rows (data parallel). A block's weights are
  gathered where the block runs, and its gradient is scattered back to where they rest (ZeRO). If all
  devices share the rows (a prompt), the weights stay as they are at rest.
- In decoding, in the loop of a rollout: `tensor` splits the matrices for the whole rollout (tensor parallel).
  Biases are whole, although a bias has the logical axis of its matrix. The cache is split as its rows are.

A dimension is split by as many of the first mesh axes as divide its size.
"""

import math
from typing import NamedTuple


class Rule(NamedTuple):
    """The mesh axes that split a logical axis; () if it is whole, None if it does not occur."""

    counts: str  # what the dimension counts
    at_rest: tuple[str, ...] | None
    in_use: tuple[str, ...] | None
    in_decoding: tuple[str, ...] | None


# docs/scaling.md shows the same table.
PARAMETERS = {
    "block": Rule("stacked blocks", (), (), ()),
    "norm": Rule("entries of a norm's weight", (), (), ()),
    "rank": Rule("rank of an adapter", (), (), ()),
    "model": Rule("d_model", ("fsdp",), (), ()),
    "heads": Rule("query heads × head size", ("tensor",), (), ("tensor",)),
    "kv_heads": Rule("key/value heads × head size", ("tensor",), (), ("tensor",)),
    "mlp": Rule("d_ff", ("tensor",), (), ("tensor",)),
    "expert": Rule("experts of a mixture", (), (), ()),
    "vocab": Rule("vocabulary, also of logits", ("tensor",), ("tensor", "fsdp"), ("tensor",)),
}
_EVERY = ("data", "fsdp", "tensor")
ACTIVATIONS = {
    "rows": Rule("rows of a batch", ("data", "fsdp"), _EVERY, _EVERY),
    "hosts": Rule("rows beside matrices that are split over `fsdp` and `tensor`", None, ("data",), None),
    "embedding": Rule("d_model where ids look up embeddings", None, ("fsdp", "tensor"), ("tensor",)),
}
TABLE = PARAMETERS | ACTIVATIONS


def fitting(size: int, axes: tuple[str, ...], mesh) -> tuple[str, ...]:
    """Returns as many of the first mesh axes as divide a dimension of this size."""
    while axes and size % parts(axes, mesh):
        axes = axes[:-1]
    return axes


def parts(axes: tuple[str, ...], mesh) -> int:
    """Returns the number of parts into which these mesh axes split a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)
