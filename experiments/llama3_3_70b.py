"""Train an NLA of Llama-3.3-70B-Instruct with the recipe of the official release: layer 53, scale 30.

    nla data import av_sft.parquet ar_sft.parquet rl.parquet --out runs/llama3_3_70b/store
    nla train --config experiments/llama3_3_70b.py:runs/llama3_3_70b/store --workdir runs/llama3_3_70b/run

`llama3_3_70b.py:runs/llama3_3_70b/store,lora` trains adapters instead of all weights. Without a store, the
run extracts its own activations: `--config.data.corpus=file:GLOB
--config.data.explanations=FILE.jsonl`. To start from a released pair, use `nla import`, then
`--config.init=BUNDLE` and 0 steps of the warm starts.

The official run's FVE is .791, as others measured it. This file has not been run, because
its authors did not have the accelerators. Llama's licence must be accepted on the Hub.
"""

from nla_jax import recipes


def get_config(arg: str = ""):
    store, _, kind = arg.partition(",")
    target = "meta-llama/Llama-3.3-70B-Instruct"
    c = recipes.official(target, layer=53, alpha=30, marker="\u33a1", store=store, lr=5e-6)
    c.rl.update(micro_av=4, micro_ar=4)  # 256 rows each: with fewer rows than chips, work is repeated
    return recipes.adapters(c) if kind == "lora" else c
