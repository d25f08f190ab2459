"""Change one setting at a time, to see what helps a small warm start and what RL needs, on two CPU cores.

    for lever in base no_lessons more_lessons drill positions last_line first_last all_lines no_ending cuts \
                 alpha_tenth full rl rl_mse rl_frozen_ar rl_target_ar rl_no_kl rl_affine rl_matched; do
      nla train --config experiments/levers.py:$lever --workdir runs/levers/$lever --from runs/levers/base
    done
    nla results --workdir runs/levers/* --out docs/results/levers.md

Run `base` first (without --from); the other runs reuse the stages that they do not change.
docs/results/levers.md has five of them, with their minutes, from before explanations had an ending line.
`rl`, `rl_affine` and `rl_matched` are three ways to inject h into AV; `rl_target_ar` has the frozen target as
AR. Runs of this size show the beginning of RL. To compare warm starts, raise the steps.
"""

from nla_jax import configs

# Changes by name, relative to "base"; those of RL_LEVERS are relative to "rl".
LEVERS = {
    "base": {},
    # As many updates, but all on written explanations.
    "no_lessons": {
        "lessons_ar": {"steps": 0},
        "lessons_av": {"steps": 0},
        "warm_ar": {"steps": 60},
        "warm_av": {"steps": 60},
    },
    "more_lessons": {"lessons_ar": {"steps": 80}, "lessons_av": {"steps": 80}},
    # AV's lessons in drill form, which is cheaper, and drill steps between those on written explanations.
    "drill": {"lessons_av": {"form": "drill", "max_tokens": 16, "steps": 80}, "warm_av": {"lessons": 0.5}},
    "positions": {"data": {"explained_positions": 8}},
    # Other lines of the description before the ending line.
    "last_line": {"data": {"explanation_lines": "last"}},
    "first_last": {
        "data": {"explanation_lines": "first+last"},
        "warm_ar": {"max_tokens": 112},
        "warm_av": {"max_tokens": 120},
        "rl": {"max_new": 120},
    },
    "all_lines": {
        "data": {"explanation_lines": "all"},
        "warm_ar": {"max_tokens": 136},
        "warm_av": {"max_tokens": 144},
        "rl": {"max_new": 144},
    },
    # The description alone, without lessons, because a lesson is an ending line.
    "no_ending": {
        "data": {"ending_tokens": 0},
        "lessons_ar": {"steps": 0},
        "lessons_av": {"steps": 0},
        "warm_ar": {"steps": 60},
        "warm_av": {"steps": 60},
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
    "rl_target_ar": {"ar": {"kind": "frozen"}},
    "rl_no_kl": {"rl": {"kl": 0.0}},
    "rl_affine": {"av": {"affine": "identity"}},
    "rl_matched": {"av": {"injection": "norm_matched"}},
}


def get_config(lever: str = "base"):
    known = LEVERS | RL_LEVERS
    if lever not in known:
        raise ValueError(f"no lever {lever!r}; known are {', '.join(known)}")
    c = configs.default()
    c.checkpoint_every = 20
    c.data.update(explanation_lines="first", explained_rows=800, warm_windows=200, positions=16)
    c.data.update(rl_windows=40, heldout_rows=120, ood="")
    c.av.rank = c.ar.rank = 32
    c.lessons_ar.update(steps=40, batch=16, lr=1e-3, max_tokens=16)
    c.lessons_av.update(steps=40, batch=16, lr=4e-3, max_tokens=24)
    c.warm_ar.update(steps=20, batch=16, lr=1e-3, max_tokens=64)
    c.warm_av.update(steps=20, batch=16, lr=1.5e-3, max_tokens=72)
    c.rl.update(steps=0, batch=4, group=8, max_new=72, lr_av=5e-4, lr_ar=1e-3)
    c.eval.batch = 64
    if lever in RL_LEVERS:
        c.rl.steps = 15
    for section, values in known[lever].items():
        if isinstance(values, dict):
            c[section].update(values)
        else:
            c[section] = values
    return c
