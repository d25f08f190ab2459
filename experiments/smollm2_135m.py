"""SmolLM2-135M, trained for real: two lines of explanation, hours of two CPU cores.

    nla train --config experiments/smollm2_135m.py --workdir runs/smollm2_135m

Stop it at any time; the same command goes on. `get_config("full")` trains all weights instead of
adapters (more memory: 16 GiB; on a GPU no slower). Results: docs/results/smollm2_135m.md.
"""

from nla_jax import configs


def get_config(arg: str = ""):
    c = configs.default()
    c.checkpoint_every = 25
    c.data.explanation_lines = "first+last"
    c.data.cuts_per_text = 2
    c.data.warm_fraction = 0.85
    c.data.warm_windows = 2000
    c.data.rl_windows = 1000
    c.av.rank = c.ar.rank = 32
    c.lessons_ar.update(steps=300, batch=32, lr=3e-3, max_tokens=48)
    c.lessons_av.update(steps=300, batch=32, lr=3e-3, max_tokens=48)
    c.warm_ar.update(steps=200, batch=32, lr=1e-3, max_tokens=96)
    c.warm_av.update(steps=200, batch=32, lr=1e-3, max_tokens=96)
    c.rl.update(
        steps=400,
        batch=8,
        group=8,
        max_new=96,
        lr_av=3e-4,
        lr_ar=5e-4,
        warmup=10,
        final_lr=0.3,
        kl=0.02,
    )
    if arg == "full":
        c.av.rank = c.ar.rank = 0
        for stage, lr in (
            ("lessons_ar", 1e-4),
            ("lessons_av", 3e-4),
            ("warm_ar", 1e-4),
            ("warm_av", 1e-4),
        ):
            c[stage].lr = lr
        c.rl.update(lr_av=1e-5, lr_ar=3e-5)
    return c
