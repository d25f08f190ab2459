"""Train an NLA of Qwen2.5-7B-Instruct with the recipe of the official release: layer 20, injection scale 150.

    nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/qwen2_5_7b/store
    nla train --config experiments/qwen2_5_7b.py:runs/qwen2_5_7b/store --workdir runs/qwen2_5_7b/run

`qwen2_5_7b.py:runs/qwen2_5_7b/store,lora` trains adapters instead of all weights. Without a store, the
run extracts its own activations: `--config.data.corpus=file:GLOB
--config.data.explanations=FILE.jsonl`. To start from a released pair, use `nla import`, then
`--config.init=BUNDLE` and 0 steps of the warm starts.

The official run's FVE is .752. This file has not been run, because
its authors did not have the accelerators.
"""

from nla_jax import recipes


def get_config(arg: str = ""):
    store, _, kind = arg.partition(",")
    c = recipes.official("Qwen/Qwen2.5-7B-Instruct", layer=20, alpha=150, marker="\u320e", store=store)
    c.mu_dtype = "bfloat16"  # float32 first moments do not fit on 16 v5e chips (docs/scaling.md)
    return recipes.adapters(c) if kind == "lora" else c
