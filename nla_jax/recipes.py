"""The recipe of the official release (docs/method.md names it) as a config for each target.

It publishes layer, injection scale and marker of each target. Both warm starts have 250k pairs, batch 256 and
1000 steps. Their learning rate is 2e-5, with 50 warm-up steps and a cosine decay to a tenth. RL has 128
activations per step and 8 explanations of at most 150 tokens per activation. It uses −log MSE, learning rate
1e-5, KL 0.01 and clip 1.0. AV's losses are means over sequences of each sequence's mean.
docs/interchange.md lists the differences.
"""

from ml_collections import ConfigDict

from nla_jax import configs


def official(target: str, *, layer: int, alpha: float, marker: str, store: str = "") -> ConfigDict:
    """Return the config of a full fine-tuning run with the official recipe, sharded over all devices.

    Args:
      target: Hub id or directory. layer: K. alpha: norm of the injected vector. marker: the character.
      store: a store that `nla data import` made from the official data files; "": the run extracts its own
        activations from `data.corpus`, with explanations from `data.explanations`.
    """
    c = configs.default()
    c.target, c.layer, c.alpha, c.marker = target, layer, alpha, marker
    # Decoding shards weights over `tensor` only (nla_jax.sharding.placement); training shards them over both.
    c.mesh.update(data=1, fsdp=-1, tensor=8)
    c.vocab_chunk = 2048
    c.checkpoint_every = 50
    c.data.update(store=store, ood="", window_tokens=512, positions=10, batch=64)
    for role in ("av", "ar"):
        c[f"lessons_{role}"].steps = 0
        c[f"warm_{role}"].update(steps=1000, batch=256, lr=2e-5, final_lr=0.1, warmup=50, micro=1)
    c.warm_av.max_tokens, c.warm_ar.max_tokens = 192, 224
    c.warm_av.loss_mean = c.rl.loss_mean = "sequences"
    c.rl.update(steps=4200, batch=128, group=8, max_new=150, reward="log_mse", advantage="zscore", kl=0.01,
                lr_av=1e-5, lr_ar=1e-5, clip=1.0, final_lr=1.0, micro_av=8, micro_ar=8)
    c.eval.batch = 128
    return c


def adapters(c: ConfigDict, rank: int = 64) -> ConfigDict:
    """Change `c` to LoRA and return it. Target, AV, its reference and AR then share one copy of the weights.

    The learning rates are ten times those of full fine-tuning, as is usual for adapters. This setting is not
    published.
    """
    c.av.rank = c.ar.rank = rank
    for section, name in (("warm_av", "lr"), ("warm_ar", "lr"), ("rl", "lr_av"), ("rl", "lr_ar")):
        c[section][name] *= 10
    return c
