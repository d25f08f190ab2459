"""Train an NLA of Gemma-3-27B-it with the recipe of the official release: layer 41, injection scale 60000.

    nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/gemma3_27b/store
    nla train --config experiments/gemma3_27b.py:runs/gemma3_27b/store --workdir runs/gemma3_27b/run

`gemma3_27b.py:runs/gemma3_27b/store,lora` trains adapters instead of all weights. Without a store, the
run extracts its own activations: `--config.data.corpus=file:GLOB
--config.data.explanations=FILE.jsonl`. To start from a released pair, use `nla import`, then
`--config.init=BUNDLE` and 0 steps of the warm starts.

The official run's FVE is .763. This file has not been run, because
its authors did not have the accelerators. Gemma's terms of use must be accepted on the Hub.
"""

from nla_jax import recipes


def get_config(arg: str = ""):
    store, _, kind = arg.partition(",")
    c = recipes.official("google/gemma-3-27b-it", layer=41, alpha=60000, marker="\u321c", store=store)
    return recipes.adapters(c) if kind == "lora" else c
