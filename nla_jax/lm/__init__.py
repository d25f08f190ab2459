"""One decoder-only language model as pure functions over a pytree of arrays."""
