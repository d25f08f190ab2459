"""The recipe of the official release (docs/method.md names it) as one config a target.

What was published: layer, injection scale and marker of each target; warm starts of 250k pairs each,
batch 256, 1000 steps, learning rate 2e-5 with a cosine to a tenth after 50 steps; then 128 activations × 8
explanations of at most 150 tokens a step, −log MSE, learning rate 1e-5, KL 0.01, clip 1.0.
"""

from ml_collections import ConfigDict

from nla_jax import configs


def official(target: str, *, layer: int, alpha: float, marker: str, store: str = "") -> ConfigDict:
    """The config of a full fine-tuning run on the official recipe, sharded over all devices.

    Args:
      target: Hub id or directory. layer: K. alpha: injection scale. marker: its character.
      store: what `nla data import` made of the official data files; "": the run extracts its own
        activations from `data.corpus`, with explanations from `data.explanations`.
    """
    c = configs.default()
    c.target, c.layer, c.alpha, c.marker = target, layer, alpha, marker
    # Decoding splits weights over `tensor` (nla_jax.sharding.placement); training splits them over both.
    c.mesh.update(data=1, fsdp=-1, tensor=8)
    c.vocab_chunk = 2048
    c.checkpoint_every = 50
    c.data.update(store=store, ood="", window_tokens=512, positions=10, batch=64)
    for role in ("av", "ar"):
        c[f"lessons_{role}"].steps = 0
        c[f"warm_{role}"].update(steps=1000, batch=256, lr=2e-5, final_lr=0.1, warmup=50, micro=1)
    c.warm_av.max_tokens, c.warm_ar.max_tokens = 192, 224
    c.rl.update(steps=4200, batch=128, group=8, max_new=150, reward="log_mse", advantage="zscore", kl=0.01,
                lr_av=1e-5, lr_ar=1e-5, clip=1.0, final_lr=1.0, micro_av=8, micro_ar=8)
    c.eval.batch = 128
    return c


def adapters(c: ConfigDict, rank: int = 64) -> ConfigDict:
    """The same with LoRA: target, AV, its reference and AR share one copy of the weights.

    The learning rates are ten times the full ones, as is usual for adapters; not a published setting.
    """
    c.av.rank = c.ar.rank = rank
    for section, name in (("warm_av", "lr"), ("warm_ar", "lr"), ("rl", "lr_av"), ("rl", "lr_ar")):
        c[section][name] *= 10
    return c
