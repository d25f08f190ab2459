"""Run every stage on a toy world in a few minutes on two cores, without downloads.

    python -m nla_jax.toy runs/toy/world
    nla train --config experiments/toy.py:runs/toy/world --workdir runs/toy/run
    nla explain --bundle runs/toy/run/bundle --text "The merry king walked to the tower."

On held-out stories, RL should raise FVE by at least .15, and FVE should exceed the mean direction's -.56
(`tests/pipeline/test_toy_learning.py`). The result tests this code and says nothing about language models.
"""

from nla_jax import configs


def get_config(world="runs/toy/world"):
    c = configs.default()
    c.target = f"{world}/target"
    c.dtype = "float32"
    c.remat = False
    c.checkpoint_every = 20
    c.data.update(corpus=f"file:{world}/corpus.jsonl", ood="", explanations=f"{world}/explanations.jsonl",
                  warm_windows=200, rl_windows=200, window_tokens=32, positions=4, min_position=12,
                  warm_fraction=0.6, cuts_per_text=2, ending_tokens=3, heldout_rows=400, batch=32)
    c.lessons_ar.update(steps=0)
    c.lessons_av.update(steps=80, batch=64, lr=4e-3, max_tokens=8, form="drill")
    c.warm_ar.update(steps=150, batch=32, lr=2e-3, max_tokens=48)
    c.warm_av.update(steps=250, batch=32, lr=4e-3, max_tokens=48)
    c.rl.update(steps=60, batch=16, group=8, max_new=48, lr_av=5e-4, lr_ar=5e-4)
    c.eval.update(batch=32, bootstrap=500)
    return c
