"""Random keys of a run."""

import jax

# Purposes of random keys: key(seed, purpose) is folded with the step, then with the row.
PURPOSES = ("init_av", "init_ar", "rl", "evaluate", "explain", "watch", "samples", "surface", "recurrence",
            "planted", "rl_drill")


def key_for(seed: int, purpose: str, step=0) -> jax.Array:
    """The key of (seed, purpose, step); rows are folded in where they are used."""
    key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(key, step)
