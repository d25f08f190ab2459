"""One lever at a time: what helps a small warm start, and what RL needs. Two CPU cores are enough.

    for lever in base no_lessons more_lessons first_last all_lines cuts alpha_tenth full \
                 rl rl_mse rl_frozen_ar rl_no_kl rl_affine rl_matched; do
      nla train --config experiments/levers.py:$lever --workdir runs/levers/$lever --from runs/levers/base
    done
    nla results --workdir runs/levers/* --out docs/results/levers.md

Run `base` first (without --from): the others take over what they do not change. docs/results/levers.md
has five of them, with their minutes. `rl`, `rl_affine` and `rl_matched` are three ways for h to come into AV.
At this size they show what RL does first, and not what makes a good warm start: for that, raise the steps.
"""

from nla_jax import configs

# Settings by lever, over those of "base"; those of RL over "rl".
LEVERS = {
    "base": {},
    # The same number of updates, all of them on written explanations.
    "no_lessons": {
        "lessons_ar": {"steps": 0},
        "lessons_av": {"steps": 0},
        "warm_ar": {"steps": 60},
        "warm_av": {"steps": 60},
    },
    "more_lessons": {"lessons_ar": {"steps": 80}, "lessons_av": {"steps": 80}},
    "first_last": {
        "data": {"explanation_lines": "first+last"},
        "warm_ar": {"max_tokens": 96},
        "warm_av": {"max_tokens": 88},
        "rl": {"max_new": 88},
    },
    "all_lines": {
        "data": {"explanation_lines": "all"},
        "warm_ar": {"max_tokens": 120},
        "warm_av": {"max_tokens": 112},
        "rl": {"max_new": 112},
    },
    "cuts": {"data": {"cuts_per_text": 3}},
    "alpha_tenth": {"alpha": 25.0},
    "full": {
        "av": {"rank": 0},
        "ar": {"rank": 0},
        "lessons_ar": {"lr": 1e-4},
        "lessons_av": {"lr": 3e-4},
        "warm_ar": {"lr": 1e-4},
        "warm_av": {"lr": 1e-4},
    },
}
RL_LEVERS = {
    "rl": {},
    "rl_mse": {"rl": {"reward": "mse"}},
    "rl_frozen_ar": {"rl": {"train_ar": False}},
    "rl_no_kl": {"rl": {"kl": 0.0}},
    "rl_affine": {"av": {"affine": "identity"}},
    "rl_matched": {"av": {"injection": "norm_matched"}},
}


def get_config(lever: str = "base"):
    known = LEVERS | RL_LEVERS
    if lever not in known:
        raise ValueError(f"no lever {lever!r}: there are {', '.join(known)}")
    c = configs.default()
    c.checkpoint_every = 20
    c.data.update(explanation_lines="last", explained_rows=800, warm_windows=200, positions=16)
    c.data.update(rl_windows=40, heldout_rows=120, ood="")
    c.av.rank = c.ar.rank = 32
    c.lessons_ar.update(steps=40, batch=16, lr=3e-3, max_tokens=40)
    c.lessons_av.update(steps=40, batch=16, lr=4e-3, max_tokens=40)
    c.warm_ar.update(steps=20, batch=16, lr=1e-3, max_tokens=56)
    c.warm_av.update(steps=20, batch=16, lr=1.5e-3, max_tokens=48)
    c.rl.update(steps=0, batch=4, group=8, max_new=48, lr_av=5e-4, lr_ar=1e-3)
    c.eval.batch = 64
    if lever in RL_LEVERS:
        c.rl.steps = 15
    for section, values in known[lever].items():
        if isinstance(values, dict):
            c[section].update(values)
        else:
            c[section] = values
    return c
