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
            "planted", "rl_drill")


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

    Raises UserError for a key of another implementation than these two.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if typed else key
    if words.shape[-1:] == (2,):
        return jax.random.wrap_key_data(words, impl=IMPL)
    if typed and str(jax.random.key_impl(key)) in ("rbg", "unsafe_rbg"):  # its words are twice those of IMPL
        return jax.random.wrap_key_data(words[..., :2], impl=IMPL)
    raise UserError(f"the key is {key.dtype} {key.shape}: make it by jax.random.key(seed, impl={IMPL!r})")


def _fixed_numbers():
    """Return a context in which JAX_THREEFRY_PARTITIONABLE does not change what is drawn."""
    fix = getattr(jax, "threefry_partitionable", None)  # jax will drop the setting
    return fix(True) if fix else contextlib.nullcontext()


def uniform(key: jax.Array) -> jax.Array:
    """Draw one float32 from [0, 1)."""
    with _fixed_numbers():
        return jax.random.uniform(key, dtype=jnp.float32)


def normal(key: jax.Array, shape) -> jax.Array:
    """Draw float32 numbers from the standard normal distribution."""
    with _fixed_numbers():
        return jax.random.normal(key, shape, jnp.float32)
