"""Llama-3.3-70B-Instruct on the recipe of the official release: layer 53, injection scale 30.

    nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/llama3_3_70b/store
    nla train --config experiments/llama3_3_70b.py:runs/llama3_3_70b/store --workdir runs/llama3_3_70b/run

With adapters instead of full fine-tuning: `llama3_3_70b.py:runs/llama3_3_70b/store,lora`. Without a
store the run extracts its own activations: `--config.data.corpus=file:GLOB
--config.data.explanations=FILE.jsonl`. To go on from a released pair: `nla import`, then
`--config.init=BUNDLE` and 0 steps of the warm starts.

The official run's FVE is .791, as others measured it. This file has not been run: it needs
accelerators that its authors had not. Llama's licence must be accepted on the Hub.
"""

from nla_jax import recipes


def get_config(arg: str = ""):
    store, _, kind = arg.partition(",")
    target = "meta-llama/Llama-3.3-70B-Instruct"
    c = recipes.official(target, layer=53, alpha=30, marker="\u33a1", store=store)
    c.mesh.tensor = 32  # decoding keeps 1/32 of the weights on a chip
    c.rl.update(micro_av=4, micro_ar=4)  # a part has 256 rows: with fewer than chips, work is repeated
    return recipes.adapters(c) if kind == "lora" else c
