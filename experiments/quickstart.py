"""Run the whole method in minutes on two CPU cores: SmolLM2-135M, news, LoRA adapters.

    bash launch/quickstart.sh
    nla train --config experiments/quickstart.py --workdir runs/quickstart

Needs 6 GiB of memory and the package registry (or NLA_TARGET for another model).

To compare another injection of h into AV, reuse the stages that it does not change
(docs/results/injection.md has all injections):

    nla train --config experiments/quickstart.py:affine --workdir runs/affine --from runs/quickstart
"""

from nla_jax import configs

INJECTIONS = {
    "replace": {},
    "affine": {"affine": "identity"},  # a learned affine map of h, then "replace"
    "norm_matched": {"injection": "norm_matched"},  # added to the residual stream after the second block
}


def get_config(injection: str = "replace"):
    if injection not in INJECTIONS:
        raise ValueError(f"no injection {injection!r}; known are {', '.join(INJECTIONS)}")
    c = configs.default()
    c.dtype = "auto"
    c.checkpoint_every = 20
    c.vocab_chunk = 256  # small enough for a CPU's caches
    c.data.update(explanation_lines="headline", explained_rows=400, explained_positions=8, ending_tokens=3)
    c.data.update(warm_windows=160, positions=48, rl_windows=40, heldout_rows=150, ood_rows=50)
    c.av.rank, c.ar.rank = 32, 8
    c.lessons_av.update(batch=64, max_tokens=12, form="drill")
    c.warm_ar.update(steps=24, batch=32, lr=2e-3, max_tokens=32)
    c.warm_av.update(steps=130, batch=32, lr=3e-3, max_tokens=40, lessons=0.5)
    c.rl.update(steps=15, batch=8, group=8, update_group=4, max_new=48, lr_av=1e-3, lr_ar=4e-4, kl=0.02)
    c.rl.update(written_ar=8)
    c.rl.watch_every = 0
    c.eval.batch = 64
    c.av.update(INJECTIONS[injection])
    return c
