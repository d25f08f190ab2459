"""Published recipes as configs: the official release's, and EasyNLA's.

docs/interchange.md has both line by line beside these configs.
"""

from ml_collections import ConfigDict

from nla_jax import configs


def official(target: str, *, layer: int, alpha: float, marker: str, store: str = "", lr: float = 1.41e-5,
             batch: int = 128) -> ConfigDict:
    """Return the config of a full fine-tuning run with the official recipe, sharded over all devices.

    Both warm starts have 250k pairs, batch 256 and 1000 steps. Their learning rate is 2e-5, with 50 warm-up
    steps and a cosine decay to a tenth. RL has 8 explanations of at most 150 tokens per activation, one
    update of each role per step, KL 0.01 and clip 1.0. Its reward is −MSE, and −2 for an answer without
    explanation. AV's losses are means over sequences of each sequence's mean.

    Args:
      target: Hub id or directory. layer: K. alpha: norm of the injected vector. marker: the character.
      store: a store that `nla data import` made from the official data files; "": the run extracts its own
        activations from `data.corpus`, with explanations from `data.explanations`.
      lr: learning rate of both roles in RL, constant. batch: activations per step of RL.
    """
    c = _common(target, layer, marker, store)
    c.alpha = alpha
    c.rl.update(steps=4200, batch=batch, group=8, max_new=150, reward="mse", advantage="zscore", kl=0.01,
                lr_av=lr, lr_ar=lr, warmup=0, clip=1.0, final_lr=1.0, loss_mean="sequences")
    return c


def easy_nla(target: str, *, layer: int, marker: str, store: str = "") -> ConfigDict:
    """Return the config of EasyNLA's reference run: adapters, norm-matched injection, and ScaleRL's losses.

    RL has 128 activations per step and 8 explanations of at most 200 tokens per activation. Tokens beyond 180
    cost 0.01 each. The policy loss is CISPO, with batch-level advantages and means over prompts. Groups of
    equal rewards are dropped. AR learns the best explanation of each group.

    The arguments are those of `official`. The recipe gives no learning rate of the warm start; that of
    `adapters` is taken.
    """
    c = adapters(_common(target, layer, marker, store))
    c.av.injection = "norm_matched"
    c.rl.update(steps=400, batch=128, group=8, max_new=200, reward="mse", advantage="batch", policy="cispo",
                drop_equal=True, loss_mean="prompts", kl=0.01, length_free=180, length_penalty=0.2,
                ar_group=1, lr_av=2e-5, lr_ar=8e-5, warmup=10, clip=1.0, final_lr=1.0)
    return c


def _common(target: str, layer: int, marker: str, store: str) -> ConfigDict:
    """Return the data, the warm start and the mesh of both recipes."""
    c = configs.default()
    c.target, c.layer, c.marker = target, layer, marker
    # Decoding shards weights over `tensor` only, training over both. 0: as many chips as decode fastest.
    c.mesh.update(data=1, fsdp=-1, tensor=0)
    c.vocab_chunk = 2048
    c.checkpoint_every = 50
    c.data.update(store=store, ood="", window_tokens=512, positions=10, batch=64)
    for role in ("av", "ar"):
        c[f"lessons_{role}"].steps = 0
        c[f"warm_{role}"].update(steps=1000, batch=256, lr=2e-5, final_lr=0.1, warmup=50, micro=1)
    c.warm_av.max_tokens, c.warm_ar.max_tokens = 192, 224
    c.warm_av.loss_mean = "sequences"
    c.rl.update(micro_av=8, micro_ar=8)
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
