"""Train an NLA of Qwen3.6-27B with EasyNLA's recipe: layer 42, adapters, norm-matched injection.

    nla train --config experiments/qwen3_6_27b.py:runs/qwen3_6_27b/store --workdir runs/qwen3_6_27b/run

The store is one that `nla data import` made. Without a store, the run extracts its own activations:
`--config.data.corpus=file:GLOB --config.data.explanations=FILE.jsonl`. To start from a released pair, use
`nla import`, then `--config.init=BUNDLE` and 0 steps of the warm starts.

EasyNLA's reference run has FVE .735 after 150 steps and .78 after 800. This file has not been run, because
its authors did not have the accelerators. docs/scaling.md has the slices of TPUs that it fits.
"""

from nla_jax import recipes


def get_config(store: str = ""):
    return recipes.easy_nla("Qwen/Qwen3.6-27B", layer=42, marker="\u321c", store=store)
