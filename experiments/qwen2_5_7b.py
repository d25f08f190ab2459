"""Qwen2.5-7B-Instruct on the recipe of the official release: layer 20, injection scale 150.

    nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/qwen2_5_7b/store
    nla train --config experiments/qwen2_5_7b.py:runs/qwen2_5_7b/store --workdir runs/qwen2_5_7b/run

With adapters instead of full fine-tuning: `qwen2_5_7b.py:runs/qwen2_5_7b/store,lora`. Without a
store the run extracts its own activations: `--config.data.corpus=file:GLOB
--config.data.explanations=FILE.jsonl`. To go on from a released pair: `nla import`, then
`--config.init=BUNDLE` and 0 steps of the warm starts.

The official run's FVE is .752. This file has not been run: it needs accelerators that its authors
had not.
"""

from nla_jax import recipes


def get_config(arg: str = ""):
    store, _, kind = arg.partition(",")
    c = recipes.official("Qwen/Qwen2.5-7B-Instruct", layer=20, alpha=150, marker="\u320e", store=store)
    c.mu_dtype = "bfloat16"  # with float32 first moments 16 v5e chips are too small (docs/scaling.md)
    return recipes.adapters(c) if kind == "lora" else c
