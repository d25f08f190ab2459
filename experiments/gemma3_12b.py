"""Train an NLA of Gemma-3-12B-it with the recipe of the official release: layer 32, injection scale 80000.

    nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/gemma3_12b/store
    nla train --config experiments/gemma3_12b.py:runs/gemma3_12b/store --workdir runs/gemma3_12b/run

`gemma3_12b.py:runs/gemma3_12b/store,lora` trains adapters instead of all weights. Without a store, the
run extracts its own activations: `--config.data.corpus=file:GLOB
--config.data.explanations=FILE.jsonl`. To start from a released pair, use `nla import`, then
`--config.init=BUNDLE` and 0 steps of the warm starts.

The official run's FVE is .768. This file has not been run, because
its authors did not have the accelerators. Gemma's terms of use must be accepted on the Hub.
"""

from nla_jax import recipes


def get_config(arg: str = ""):
    store, _, kind = arg.partition(",")
    c = recipes.official("google/gemma-3-12b-it", layer=32, alpha=80000, marker="\u321c", store=store,
                         lr=1e-5)
    return recipes.adapters(c) if kind == "lora" else c
