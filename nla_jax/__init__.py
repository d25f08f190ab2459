"""Natural language autoencoders in JAX.

The verbalizer reads an activation of a frozen language model and describes it in plain English.
The reconstructor rebuilds the activation from that text alone.

    nla = nla_jax.load("runs/quickstart/bundle")
    h = nla.capture("The cat sat on the")          # [T, D] activations at block K
    z = nla.verbalize(h[-1:], key=jax.random.key(0))
    h_hat = nla.reconstruct(z)                      # [1, D]
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "load": "nla_jax.api",
    "NLA": "nla_jax.api",
    "TokenReport": "nla_jax.api",
    "UserError": "nla_jax.errors",
    "LMConfig": "nla_jax.lm.config",
    "Spec": "nla_jax.specs",
    "default_config": "nla_jax.configs",
    "run": "nla_jax.pipeline.stages",
    "explain_file": "nla_jax.pipeline.explain_batch",
    "explain_rows": "nla_jax.pipeline.explain_batch",
}
__all__ = ["NLA", "LMConfig", "Spec", "TokenReport", "UserError", "default_config", "explain_file",
           "explain_rows", "load", "run"]


def __getattr__(name: str):
    # Import lazily: `import nla_jax` must neither initialise a device nor load a heavy package.
    if name not in _HOMES:
        raise AttributeError(f"module 'nla_jax' has no attribute {name!r}")
    attribute = {"default_config": "default"}.get(name, name)
    return getattr(importlib.import_module(_HOMES[name]), attribute)


def __dir__():
    return sorted([*globals(), *__all__])
