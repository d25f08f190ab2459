"""Scans over blocks: of several kinds in a period, and with gradients that are accumulated in place."""

import jax
import jax.numpy as jnp

from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig


def index_frozen(step, blocks: dict, n_blocks: int, frozen: bool):
    """Return (step, stacks) for a scan over the first n blocks, in which the step indexes frozen matrices.

    XLA's CPU backend slices bfloat16 arrays in float32. A scan over them converts the whole stack before its
    loop, which takes longer than a pass over a short text. Other arrays are scanned over, as usual.

    frozen: whether the matrices get no gradient. If they do get one after all, it is correct and slow.
    """
    whole = {name: w for name, w in blocks.items() if frozen and params_lib.is_indexed(w)}

    def index(carry, layer):
        p, i, *rest = layer
        # Tied to the block's number, or XLA converts the stacks before the loop.
        here, i_here = jax.lax.optimization_barrier((whole, i))
        p = {**p, **{n: jax.lax.dynamic_index_in_dim(w, i_here, keepdims=False) for n, w in here.items()}}
        return step(carry, (p, i, *rest))

    rest = {name: w for name, w in blocks.items() if name not in whole}
    rest = jax.tree.map(lambda a: a if len(a) == n_blocks else a[:n_blocks], rest)
    return (index if whole else step), rest


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


def scan_kinds(step, carry, cfg: LMConfig, blocks, i_L, past, summed=None, remat: bool = False):
    """Scan `step` over blocks of two kinds (`LMConfig.kinds`).

    The scan is over periods, such as three linear blocks and one other. Blocks after the last whole period
    are a period of their own. Each kind of block has its own stacks (`params.blocks_of`).

    Args:
      step: as for `forward`, (carry, (block, i, past, None)) -> (carry, what the block keeps, or None).
      i_L: a number for each block. past: {kind: stacks of what earlier tokens left}; a kind may be missing.
      summed: as for `scan_summed`, or None. remat: recompute each block in the backward pass.

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

        # Slices of stacks are made inside, because a checkpoint would save them: a copy of all weights.
        def run(j, n, carry, layer, one=one, start=start):
            p, i_P, past, _ = layer
            old = past.get(kinds[start + j])
            old = None if old is None else jax.tree.map(lambda a: a[n], old)
            return step(carry, (params_lib.one_block(p, one, j), i_P[j], old, None))

        run = jax.checkpoint(run, static_argnums=(0, 1)) if remat else run

        def group(carry, layer, run=run, start=start, size=size):
            out = {kind: [] for kind in (False, True)}
            for j in range(size):
                kept_here = out[kinds[start + j]]
                carry, new = run(j, len(kept_here), carry, layer)
                kept_here.append(new)
            return carry, {k: jax.tree.map(lambda *a: jnp.stack(a), *new) for k, new in out.items() if new}

        part = split(params_lib.slice_blocks(blocks, cfg, start, stop))
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
