"""Compute rows of many lengths in microbatches of similar length, each at one of a few static widths."""

import functools

import jax
import jax.numpy as jnp

from nla_jax.lm import optimize
from nla_jax.sharding import placement

MULTIPLE = 8  # of tokens


def widths(most: int, n: int) -> tuple[int, ...]:
    """Return up to n widths: equal steps up to `most`, each rounded up to a multiple of MULTIPLE."""
    n = min(n, -(-most // MULTIPLE))
    steps = (-(-most * i // (n * MULTIPLE)) * MULTIPLE for i in range(1, n + 1))
    return tuple(sorted({min(width, most) for width in steps}))


def accumulate(grad_fn, params, batch: dict, length_B, n_widths: int, micro: int, remat: bool = False):
    """Return the result of `optimize.accumulate`; each microbatch has the least width that holds its rows.

    Rows are sorted by length before they are cut into `micro` microbatches. Results of rows are in the order
    of the batch. The step is compiled once for every width, and all devices take the same one.

    Args:
      batch: a dict. The second axis counts tokens in arrays whose names end in T.
      length_B: number of tokens of each row. Tokens after them must have no effect.
      n_widths: number of widths (`widths`). With one, this is `optimize.accumulate`.
    """
    if n_widths == 1:
        return optimize.accumulate(grad_fn, params, batch, micro, remat)
    most = next(a.shape[1] for name, a in batch.items() if name.endswith("T"))
    choices = widths(most, n_widths)

    def at(width, params, rows, summed):
        cut = {name: a[:, :width] if name.endswith("T") else a for name, a in rows.items()}
        return grad_fn(params, cut, summed)

    def at_least(params, part, summed):
        rows, length_B = part
        index = jnp.searchsorted(jnp.array(choices), placement.constrain(length_B.max()))
        return jax.lax.switch(index, [functools.partial(at, w) for w in choices], params, rows, summed)

    part = batch, length_B
    if micro == 1:
        return optimize.accumulate(at_least, params, part, micro, remat)
    order_B = jnp.argsort(placement.constrain(length_B))
    part = jax.tree.map(lambda a: placement.shard_rows(a[order_B]), part)
    grads, scalars, rows = optimize.accumulate(at_least, params, part, micro, remat)
    back_B = jnp.argsort(order_B)
    return grads, scalars, jax.tree.map(lambda a: placement.shard_rows(a[back_B]), rows)
