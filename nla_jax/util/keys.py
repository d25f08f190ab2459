"""Make the random keys of a run, and draw from them.

Every key names its implementation. `JAX_DEFAULT_PRNG_IMPL` would otherwise choose it, and with "rbg" a sample
depends on its batch.
"""

import contextlib

import jax
import jax.numpy as jnp

from nla_jax.errors import UserError

IMPL = "threefry2x32"
SEEDS = 2**32  # seeds are below it: larger and negative ones depend on JAX_ENABLE_X64

# Only append: the index of a purpose is part of its keys.
PURPOSES = ("init_av", "init_ar", "rl", "evaluate", "explain", "watch", "samples", "surface", "recurrence",
            "planted", "rl_drill", "trust")


def new_key(seed: int) -> jax.Array:
    """Return the key of a seed. Raises UserError for a seed below 0 or from `SEEDS` on."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"seed {seed}: must be from 0 to {SEEDS - 1}")
    return jax.random.key(seed, impl=IMPL)


def key_for(seed: int, purpose: str, step=0) -> jax.Array:
    """Return the key of (seed, purpose, step). The caller folds in the row."""
    return jax.random.fold_in(jax.random.fold_in(new_key(seed), PURPOSES.index(purpose)), step)


def to_threefry(key: jax.Array) -> jax.Array:
    """Return a caller's key as a key of IMPL. A seed gives the same key by "rbg" as by IMPL.

    Raises UserError for an array that is no key, and for a key of another implementation.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    impl, words = (str(jax.random.key_impl(key)), jax.random.key_data(key)) if typed else (IMPL, key)
    if impl in ("rbg", "unsafe_rbg"):  # their words are twice those of IMPL
        impl, words = IMPL, words[..., :2]
    if impl != IMPL or words.dtype != jnp.uint32 or words.shape[-1:] != (2,):
        raise UserError(f"a key of {impl}, {words.dtype}{list(words.shape)}: make it by "
                        f"jax.random.key(seed, impl={IMPL!r})")
    return jax.random.wrap_key_data(words, impl=IMPL)


def _fixed_numbers():
    """Return a context in which JAX_THREEFRY_PARTITIONABLE does not change what is drawn."""
    fix = getattr(jax, "threefry_partitionable", None)  # jax will drop the setting
    return contextlib.nullcontext() if fix is None else fix(True)


def uniform(key: jax.Array) -> jax.Array:
    """Draw one float32 from [0, 1)."""
    with _fixed_numbers():
        return jax.random.uniform(key, dtype=jnp.float32)


def normal(key: jax.Array, shape) -> jax.Array:
    """Draw float32 numbers from the standard normal distribution."""
    with _fixed_numbers():
        return jax.random.normal(key, shape, jnp.float32)
