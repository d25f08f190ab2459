"""Train the NLA of SmolLM2-135M that ships with the package.

    nla train --config experiments/smollm2_135m.py --workdir runs/smollm2_135m

The run can be stopped at any time; the same command resumes it. It needs 8 GiB of memory and about an hour
of two CPU cores. `get_config("long")` has four times the steps. `get_config("frozen")` has the frozen target
as AR. `get_config("gpu")` takes nine minutes of one large GPU. Results: docs/results/smollm2_135m.md.
"""

from nla_jax import configs


def get_config(arg: str = ""):
    c = configs.default()
    c.checkpoint_every = 50
    c.vocab_chunk = 256  # small enough for a CPU's caches
    c.data.update(explanation_lines="first", explained_positions=16, warm_fraction=0.85)
    c.data.update(warm_windows=900, rl_windows=400, positions=48)
    c.av.rank, c.ar.rank = 32, 8  # because both adapters in bfloat16 must fit in the package
    c.lessons_av.update(steps=640, batch=64, lr=4e-3, max_tokens=16, form="drill", final_lr=0.2)
    c.warm_ar.update(steps=40, batch=32, lr=2e-3, max_tokens=64)
    c.warm_av.update(steps=110, batch=32, lr=2e-3, max_tokens=72, lessons=0.2)
    c.rl.update(steps=10, batch=8, group=8, max_new=80, lr_av=1.5e-4, lr_ar=1e-3, final_lr=0.3, kl=0.05)
    c.rl.update(update_group=4, written_ar=8, watch_every=0)
    c.eval.batch = 64
    if arg == "gpu":
        c.remat, c.vocab_chunk, c.checkpoint_every = False, 8192, 0
        c.data.update(warm_windows=4000, rl_windows=400, positions=72, explained_positions=24, batch=64)
        c.lessons_av.update(steps=0, batch=512)
        c.warm_ar.update(steps=100, batch=256)
        c.warm_av.update(steps=3000, minutes=2, batch=256, lr=2e-3, final_lr=0.05, lessons=0.8)
        c.warm_av.watch_every = 250
        c.rl.update(steps=200, minutes=2.5, batch=64, final_lr=0.1)
        c.rl.update(max_new=96, length_free=72, length_penalty=1.0)
        c.rl.update(lr_av=2e-4, lr_ar=5e-4, written_ar=64, micro_av=2, micro_ar=2)
        c.rl.update(watch_every=20, watch_rows=200)
        c.eval.batch = 200
    if arg == "long":
        for stage in (*configs.STAGES, *configs.RL_STAGES):
            c[stage].steps *= 4
    if arg == "frozen":
        c.ar.kind = "frozen"
    return c
