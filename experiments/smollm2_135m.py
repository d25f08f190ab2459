"""SmolLM2-135M, trained for real: the last line of the explanations, 75 minutes of two CPU cores.

    nla train --config experiments/smollm2_135m.py --workdir runs/smollm2_135m

Stop it at any time; the same command goes on. Needs 8 GiB. `get_config("long")` is the same with four
times the steps, for a faster machine or a night; `get_config("full")` trains all weights instead of
adapters (16 GiB; on a GPU no slower). `get_config("gpu")` has large batches for one GPU: on an H100 its AR
lessons went at 18 steps of 128 rows a second; the whole of it has not been run. Results:
docs/results/smollm2_135m.md.
"""

from nla_jax import configs


def get_config(arg: str = ""):
    c = configs.default()
    c.checkpoint_every = 20
    c.data.explanation_lines = "last"
    c.data.warm_fraction = 0.85
    c.vocab_chunk = 256  # stays nearer to a CPU's caches
    c.data.warm_windows = 1500
    c.data.rl_windows = 400
    c.data.positions = 16
    c.av.rank = c.ar.rank = 32
    c.lessons_ar.update(steps=90, batch=32, lr=3e-3, max_tokens=48)
    c.lessons_av.update(steps=130, batch=32, lr=4e-3, max_tokens=48)
    c.warm_ar.update(steps=40, batch=32, lr=1e-3, max_tokens=56)
    c.warm_av.update(steps=30, batch=32, lr=1.5e-3, max_tokens=48)
    c.rl.update(
        steps=80,
        batch=6,
        group=8,
        max_new=48,
        lr_av=4e-4,
        lr_ar=1e-3,
        final_lr=0.3,
        kl=0.03,
    )
    c.eval.batch = 64
    if arg == "long":
        for stage in (*configs.STAGES, "rl"):
            c[stage].steps *= 4
    if arg == "gpu":
        c.remat = False  # memory is plenty, time is not
        c.vocab_chunk = 8192
        c.checkpoint_every = 200
        c.av.rank = c.ar.rank = 24
        c.data.update(batch=128, warm_windows=4000, rl_windows=1000)
        c.lessons_ar.update(steps=600, batch=128, lr=3e-3, max_tokens=56)
        c.lessons_av.update(steps=900, batch=128, lr=3e-3, max_tokens=48)
        c.warm_ar.update(steps=80, batch=128)
        c.warm_av.update(steps=80, batch=128)
        c.rl.update(steps=300, batch=32, max_new=64, lr_av=3e-4, final_lr=0.2)
        c.rl.update(watch_every=100, watch_rows=100)
        c.eval.batch = 256
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
