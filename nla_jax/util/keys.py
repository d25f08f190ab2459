"""Derive the random keys of a run."""

import jax

# Only append: the index of a purpose is part of its keys.
PURPOSES = ("init_av", "init_ar", "rl", "evaluate", "explain", "watch", "samples", "surface", "recurrence",
            "planted", "rl_drill", "trust")


def key_for(seed: int, purpose: str, step=0) -> jax.Array:
    """Return the key of (seed, purpose, step). The caller folds in the row."""
    key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    return jax.random.fold_in(key, step)
