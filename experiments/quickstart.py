"""The whole method in minutes on two CPU cores: SmolLM2-135M, news, LoRA adapters.

    bash launch/quickstart.sh
    nla train --config experiments/quickstart.py --workdir runs/quickstart

Needs 6 GiB of memory and the package registry (or NLA_TARGET for another model).

Another way for h to come into AV, in a run that takes over what it does not change
(docs/results/injection.md has them all):

    nla train --config experiments/quickstart.py:affine --workdir runs/affine --from runs/quickstart
"""

from nla_jax import configs

INJECTIONS = {
    "replace": {},
    "affine": {"affine": "identity"},  # a learned map before it
    "norm_matched": {"injection": "norm_matched"},  # added after the second block
}


def get_config(injection: str = "replace"):
    if injection not in INJECTIONS:
        raise ValueError(f"no injection {injection!r}: there are {', '.join(INJECTIONS)}")
    c = configs.default()
    c.checkpoint_every = 20
    c.vocab_chunk = 256  # stays nearer to a CPU's caches
    c.data.explained_rows = 800
    c.data.explanation_lines = "last"
    c.data.warm_windows = 250
    c.data.rl_windows = 40
    c.data.heldout_rows = 150
    c.data.ood_rows = 60
    c.av.rank = c.ar.rank = 32
    c.lessons_ar.update(steps=50, batch=32, lr=3e-3, max_tokens=40)
    c.lessons_av.update(steps=40, batch=24, lr=4e-3, max_tokens=40)
    c.warm_ar.update(steps=25, batch=32, lr=1e-3, max_tokens=56)
    c.warm_av.update(steps=20, batch=24, lr=1.5e-3, max_tokens=48)
    c.rl.update(steps=20, batch=6, group=8, max_new=48, lr_av=5e-4, lr_ar=1e-3)
    c.eval.batch = 64
    c.av.update(INJECTIONS[injection])
    return c
