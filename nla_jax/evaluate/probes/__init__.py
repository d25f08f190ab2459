"""Families of figures; `nla_jax.evaluate.probe_table` lists them."""
