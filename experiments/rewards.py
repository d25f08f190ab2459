"""Compare what RL rewards, with equal time, from the quickstart's warm start, on two CPU cores.

    nla train --config experiments/quickstart.py --workdir runs/quickstart
    for arm in base frozen_target warm_ar ar_reset prefix paraphrase false_claims patch_kl truth \
               truth_reset truth_prefix; do
      nla train --config experiments/rewards.py:$arm --workdir runs/rewards/$arm --from runs/quickstart
    done
    nla results runs/rewards/* --out docs/results/rewards.md --figures \
      fve,fve_greedy,fve_frozen_target,paraphrase_kept,claim_precision,description_precision,\
claim_precision_ending,same_document,logp_target,ok,tokens

docs/howto/rewards.md describes the settings. Every arm has as many steps of 64 answers as take the time of
fifteen steps of `base`, which is four to nine minutes on two cores of an EPYC without AMX. The evaluation of
an arm takes three minutes. The second arm can take the evaluation of the warm start from the first with
`--from runs/rewards/base`.
"""

import runpy
from pathlib import Path

# Processor seconds (`time.process_time`) of an arm's second step, with --config.rl.steps=2: base 58,
# paraphrase 64, frozen_target 66, patch_kl 66. So every arm takes about 870.
STEPS = 15
HOST = 14  # steps of an arm with work on the host between its two programs
READER = 13  # steps of an arm with one more reader
TRUTH = {"paraphrase": 0.5, "false_claims": 1.0, "fewest_claims": 5, "steps": HOST}
ARMS = {
    "base": {},
    "frozen_target": {"reader": "frozen_target", "steps": READER},
    "warm_ar": {"reader": "warm_ar", "steps": READER},
    "ar_reset": {"ar_reset": 5},
    "prefix": {"prefix_min": 4, "prefix_max": 16},  # explanations have about twelve tokens
    "paraphrase": {"paraphrase": 1.0, "steps": HOST},
    "false_claims": {"false_claims": 1.0, "fewest_claims": 5, "steps": HOST},
    "patch_kl": {"patch_kl": 0.5, "steps": READER},
    "truth": TRUTH,
    "truth_reset": {**TRUTH, "ar_reset": 5},
    "truth_prefix": {**TRUTH, "prefix_min": 4, "prefix_max": 16},
}


def get_config(arm: str = "base"):
    if arm not in ARMS:
        raise ValueError(f"no arm {arm!r}; known are {', '.join(ARMS)}")
    c = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    c.rl.update({"steps": STEPS, **ARMS[arm]})
    c.eval.probes = "round_trip,claims,drift,language"
    return c
