"""The step of RL that becomes the bundle: rules on held-out figures, and which trees are kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import bundle, configs
from nla_jax.errors import UserError
from nla_jax.lm.config import LMConfig
from nla_jax.pipeline import config_checks, stages
from nla_jax.pipeline.chosen_step import Chooser
from nla_jax.util import checkpoint
from tests.helpers import world

# step -> (held-out FVE, FVE by the frozen target, claim precision)
FIGURES = {10: (0.1, 0.3, 0.5), 20: (0.4, 0.2, 0.4), 30: (0.5, 0.25, 0.3), 40: (0.52, 0.1, 0.2),
           50: (0.6, 0.3, 0.45)}


def row(step):
    fve, frozen, claims = FIGURES[step]
    return {"heldout_fve": fve, "heldout_fve_frozen_target": frozen, "heldout_claim_precision": claims}


def chooser(tmp_path, rule, most_lost=0.1, steps=(10, 20, 30, 40)):
    made = Chooser(tmp_path / "rl_at", rule, most_lost, tmp_path / "metrics.jsonl")
    for step in steps:
        made.saw(step, row(step), lambda step=step: {"av": {"w": jnp.full(2, float(step))}})
    return made


@pytest.mark.parametrize(
    "rule,most_lost,step",
    [("frozen_target", 0.1, 30), ("frozen_target", 1.0, 10), ("claims", 0.1, 30), ("claims", 0.25, 20),
     ("product", 0.25, 20), ("product", 0.0, 40)],
)
def test_the_best_score_within_the_bound_is_chosen(tmp_path, rule, most_lost, step):
    made = chooser(tmp_path, rule, most_lost)
    found = made.pick()
    assert found["step"] == step and found["rule"] == rule and "held-out FVE" in found["why"]
    like = {"av": {"w": jnp.zeros(2)}}
    np.testing.assert_array_equal(checkpoint.load_tree(made.directory / str(step), like)["av"]["w"], step)


def test_steps_that_another_one_beats_are_deleted(tmp_path):
    made = chooser(tmp_path, "claims", steps=[10, 20, 30, 40, 50])
    # Step 10 has more true claims than step 50.
    assert sorted(p.name for p in made.directory.iterdir()) == ["10", "50"]


def test_a_resumed_run_chooses_as_one_that_was_not_interrupted(tmp_path):
    chooser(tmp_path, "frozen_target", steps=[10, 20, 30])
    lines = [json.dumps({"step": s - 1, **row(s)}) for s in (10, 20)] + [json.dumps({"step": 24, "mse": 1.0})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert chooser(tmp_path, "frozen_target", steps=[30, 40]).pick()["step"] == 30


def test_your_own_rule_and_a_missing_figure(tmp_path):
    made = chooser(tmp_path, "tests.pipeline.test_chosen_step:own_rule")
    assert made.pick()["step"] == 40
    with pytest.raises(UserError, match="heldout_claim_precision, which this run does not have"):
        Chooser(tmp_path, "claims", 0.1, tmp_path / "no").saw(5, {"heldout_fve": 0.1}, dict)


def own_rule(figures):
    return figures["heldout_fve"]


@pytest.mark.parametrize(
    "key,value,said",
    [("choose", "best", "must be one of 'last', 'frozen_target', 'claims', 'product'"),
     ("choose_loss", 1.5, "must be from 0 to 1"), ("choose_loss", float("nan"), "must be from 0 to 1")],
)
def test_rules_are_checked_before_work(key, value, said):
    c = configs.default()
    c.rl[key] = value
    with pytest.raises(UserError, match=said):
        config_checks.validate(c)
    c = configs.default()
    c.rl.choose, c.rl.watch_every = "claims", 0
    with pytest.raises(UserError, match="set rl.watch_every, such as 10"):
        config_checks.validate(c)


@pytest.mark.parametrize("kind", ["trained", "frozen"])
def test_the_chosen_step_becomes_the_bundle(finished, tmp_path, kind):
    c = world.config(finished)
    c.rl.update(steps=2, watch_every=1, watch_rows=4, choose_loss=1.0)
    c.rl.choose = "tests.pipeline.test_chosen_step:first_step"
    c.ar.kind = kind
    with world.one_device():
        summary = stages.run(c, tmp_path / "run", source=finished / "run")
    assert summary["chosen"]["step"] == 1 and summary["steps"]["rl"] == 2
    meta = bundle.read_sidecar(tmp_path / "run" / "bundle")
    assert meta["training"]["chosen"] == summary["chosen"]
    assert not (tmp_path / "run" / "params" / "rl_at").exists()
    # A run of one step ends with the same AV.
    c.rl.update(steps=1, choose="last")
    with world.one_device():
        stages.run(c, tmp_path / "one", source=finished / "run")
    for a, b in zip(av_of(tmp_path / "run" / "bundle"), av_of(tmp_path / "one" / "bundle"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def av_of(directory) -> list:
    meta = bundle.read_sidecar(directory)
    return jax.tree.leaves(bundle.read_trees(directory, meta, LMConfig.of_plain(meta["lm"]))["av"])


def first_step(figures):
    """Score each step lower than the one before."""
    SEEN.append(figures["heldout_fve"])
    return -len(SEEN)


SEEN: list[float] = []
