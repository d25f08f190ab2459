"""Compare nla_jax's speed and memory with a PyTorch reference and a floor (docs/performance.md)."""
