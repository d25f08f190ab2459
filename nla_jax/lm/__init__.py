"""A decoder-only language model as pure functions of a pytree of arrays."""
