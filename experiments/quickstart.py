"""The whole method in minutes on two CPU cores: SmolLM2-135M, news, LoRA adapters.

    bash launch/quickstart.sh
    nla train --config experiments/quickstart.py --workdir runs/quickstart

Needs 6 GiB of memory and the package registry (or NLA_TARGET for another model).
"""

from nla_jax import configs


def get_config():
    c = configs.default()
    c.checkpoint_every = 25
    c.data.explained_rows = 1000
    c.data.explanation_lines = "last"
    c.data.warm_windows = 500
    c.data.rl_windows = 150
    c.av.rank = c.ar.rank = 32
    c.lessons_ar.update(steps=100, batch=32, lr=2e-3)
    c.lessons_av.update(steps=60, batch=32, lr=4e-3)
    c.warm_ar.update(steps=40, batch=32, lr=1e-3, max_tokens=96)
    c.warm_av.update(steps=30, batch=32, lr=2e-3, max_tokens=64)
    c.rl.update(steps=20, batch=8, group=8, max_new=48, lr_av=5e-4, lr_ar=1e-3)
    c.eval.batch = 64
    return c
