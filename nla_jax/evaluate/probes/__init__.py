"""The probes, one module each; `nla_jax.evaluate.probe_table` lists them."""
