"""Speed and memory of nla_jax beside a PyTorch reference and the machine's floor; see docs/performance.md."""
