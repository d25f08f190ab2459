"""Change one setting of RL at a time, with equal time, from the quickstart's warm start, on two CPU cores.

    nla train --config experiments/quickstart.py --workdir runs/quickstart
    for lever in base group_4 group_16 all_answers mse no_kl kl_strong hinge frozen_ar target_reader ar_best \
                 drill lr_low; do
      nla train --config experiments/levers.py:$lever --workdir runs/levers/$lever --from runs/quickstart
    done
    nla results runs/levers/* --out docs/results/levers.md

Every run has as many steps of 64 answers as take four minutes on two cores of an EPYC without AMX: fifteen,
or another number where a step costs more or less. The learning rate is constant.
"""

import runpy
from pathlib import Path

STEPS = 15
LEVERS = {
    "base": {},
    "group_4": {"batch": 16, "group": 4, "update_group": 2},
    "group_16": {"batch": 4, "group": 16, "update_group": 8},
    "all_answers": {"update_group": 0},
    "mse": {"reward": "mse"},
    "no_kl": {"kl": 0.0},
    "kl_strong": {"kl": 0.1},
    "hinge": {"length_free": 24, "length_penalty": 1.0},
    "frozen_ar": {"train_ar": False},
    "target_reader": {"steps": 21},  # the frozen target is AR
    "ar_best": {"ar_group": 2},
    "drill": {"steps": 10},  # half of the time for the drill's short answers, read by the frozen target
    "lr_low": {"lr_av": 2e-4},
}


def get_config(lever: str = "base"):
    if lever not in LEVERS:
        raise ValueError(f"no lever {lever!r}; known are {', '.join(LEVERS)}")
    quickstart = Path(__file__).with_name("quickstart.py")
    c = runpy.run_path(str(quickstart))["get_config"]()
    c.rl.steps = STEPS
    c.rl.update(LEVERS[lever])
    if lever == "target_reader":
        c.ar.kind = "frozen"
    if lever == "drill":
        c.rl_drill.update(steps=17, batch=16, group=8, max_new=12, lr_av=1e-3)
    return c
