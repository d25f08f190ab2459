"""A scan over blocks whose gradients are accumulated in place."""

import jax
import jax.numpy as jnp


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
