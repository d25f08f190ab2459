"""Scans over blocks: of several kinds in a period, and with gradients that are accumulated in place."""

import jax
import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig


def scan_summed(step, carry, blocks, rest, summed):
    """Scan `step` over (blocks, *rest) and return the last carry.

    The gradient of `blocks` is `summed` plus their own. Each block's is added in place, because a plain scan
    would need memory for both. Each step is recomputed in the backward pass. `rest` and the variables that
    `step` closes over get no gradient.
    """
    @jax.custom_vjp
    def run(blocks, summed, carry):
        return jax.lax.scan(lambda c, l: (step(c, l)[0], None), carry, (blocks, *rest))[0]

    def forth(blocks, summed, carry):
        last, before = jax.lax.scan(lambda c, l: (step(c, l)[0], c), carry, (blocks, *rest))
        return last, (blocks, summed, before)

    def back(kept, g):
        blocks, summed, before = kept

        def one(state, layer):
            g, summed = state
            i, p, c, *others = layer
            _, pull = jax.vjp(lambda c, p: step(c, (p, *others))[0], c, p)
            g, dp = pull(g)
            add = lambda s, d: jax.lax.dynamic_update_index_in_dim(s, s[i] + d.astype(s.dtype), i, 0)
            return (g, jax.tree.map(add, summed, dp)), None

        i_L = jnp.arange(len(jax.tree.leaves(blocks)[0]), dtype=jnp.int32)
        (g, summed), _ = jax.lax.scan(one, (g, summed), (i_L, blocks, before, *rest), reverse=True)
        return summed, None, g

    run.defvjp(forth, back)
    return run(blocks, summed, carry)


def scan_kinds(step, carry, cfg: LMConfig, blocks, i_L, past, summed=None):
    """Scan `step` over blocks of two kinds (`LMConfig.kinds`).

    The scan is over periods, such as three linear blocks and one other. Blocks after the last whole period
    are a period of their own. Each kind of block has its own stacks (`params.blocks_of`).

    Args:
      step: as for `forward`, (carry, (block, i, past, None)) -> (carry, what the block keeps, or None).
      past: None, or {kind: stacks of what earlier tokens left}.
      summed: as for `scan_summed`, or None.

    Returns (the last carry, {kind: stacks of what blocks of this kind keep}).
    """
    kinds, L = cfg.kinds, len(i_L)
    period = next(p for p in range(1, L + 1) if all(kinds[i] == kinds[i % p] for i in range(L)))
    kept = {kind: [] for kind in (False, True)}
    for start, stop, size in ((0, L - L % period, period), (L - L % period, L, L % period)):
        if not size:
            continue
        one = cfg.of_blocks(start, start + size)

        def split(tree, n=(stop - start) // size):  # [n * m, ...] -> [n, m, ...]
            return jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), tree)

        def group(carry, layer, one=one, start=start, size=size):
            p, i_P, past, _ = layer
            out = {kind: [] for kind in (False, True)}
            for j in range(size):
                kind = kinds[start + j]
                old = None if past is None else [a[len(out[kind])] for a in past[kind]]
                block = params_lib.one_block(p, one, j)
                carry, new = step(carry, (block, i_P[j], old, None))
                out[kind].append(new)
            return carry, {k: jax.tree.map(lambda *a: jnp.stack(a), *new) for k, new in out.items() if new}

        part, old = split(params_lib.slice_blocks(blocks, cfg, start, stop)), None
        if past is not None:
            counts = {k: [sum(kind == k for kind in kinds[:end]) for end in (start, stop)] for k in past}
            here = {k: c for k, c in counts.items() if c[0] < c[1]}
            old = split({k: jax.tree.map(lambda a, c=c: a[c[0] : c[1]], past[k]) for k, c in here.items()})
        rest = (split(i_L[start:stop]), old, None)
        if summed is not None:
            sums = split(params_lib.slice_blocks(summed, cfg, start, stop))
            carry, new = scan_summed(group, carry, part, rest, sums), {}
        else:
            carry, new = jax.lax.scan(group, carry, (part, *rest))
        for kind, tree in new.items():
            kept[kind].append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree))
    joined = {k: jax.tree.map(lambda *a: jnp.concatenate(a), *trees) for k, trees in kept.items() if trees}
    return carry, joined
