"""The order in which training draws rows: random access by step, without state to save."""

import numpy as np

from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError


def epoch_indices(n: int, batch: int, seed: int, purpose: str):
    """Return a Grain data set whose element `step` is the row numbers [batch] of training step `step`.

    Every n consecutive draws are a new permutation of the rows; a batch may contain draws of two. A resumed
    run needs only its step: `ds[step]`. A host's part of a batch is `ds[step][host::n_hosts]`.

    Raises:
        UserError: there is no row, or the batch is empty.
    """
    import grain

    if n < 1 or batch < 1:
        raise UserError(f"cannot draw batches of {batch} from {n} rows: both must be at least 1")
    # Hash the seed, because Grain's shuffle adds the epoch to it: adjacent seeds would share permutations.
    key = keyed_hash("order", seed, purpose) % 2**32
    return grain.MapDataset.source(range(n)).seed(key).shuffle().repeat().batch(batch)


def batch_epochs(n: int, batch: int, step: int) -> np.ndarray:
    """Return the epoch (from 0) of each element of `epoch_indices(n, batch, ...)[step]`: [batch] int64."""
    return (step * batch + np.arange(batch, dtype=np.int64)) // n
