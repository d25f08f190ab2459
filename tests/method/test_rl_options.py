"""What the options of RL do to a step: which answers count, what length costs, what AR reads besides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nla_jax import configs, objectives, reconstructor, steps, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import optimize
from nla_jax.pipeline import config_checks
from nla_jax.rl import reading, roles
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=2), layer=0)
B, G, T = 4, 4, 12
OPTS = tiny.rl_options(G, T)
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def base():
    return tiny.talker_params(SPEC.lm)


def run(base, batch=None, **options):
    """(state, metrics) of one step from the same start, with the same answers."""
    state = steps.RLState(
        optimize.learner(verbalizer.init(base, SPEC.lm, key=jax.random.key(1)), SGD),
        optimize.learner(reconstructor.init(base, SPEC.lm, SPEC.layer, key=jax.random.key(2)), SGD))
    batch = {"h_BD": jnp.asarray(tiny.activations(B)), "row_B": jnp.arange(B), **(batch or {})}
    step = functools.partial(steps.rl, spec=SPEC, opts=dataclasses.replace(OPTS, **options), tx_av=SGD,
                             tx_ar=SGD)
    return jax.jit(step)(state, base, {"params": base}, batch, jax.random.key(3))


def answers(base):
    """The answers of every step of `run`."""
    return steps.rollout({"params": base}, base, SPEC, jnp.asarray(tiny.activations(B)), jnp.arange(B),
                         jax.random.key(3), group=G, max_new=T)[0]


def test_most_different_takes_the_worst_and_the_best():
    reward = jnp.array([[3.0, 1.0, 2.0, 0.0], [5.0, 6.0, 7.0, 8.0]])
    assert np.asarray(objectives.most_different(reward, 2)).tolist() == [[3, 0], [0, 3]]
    assert np.asarray(objectives.most_different(reward, 3)).tolist() == [[3, 2, 0], [0, 2, 3]]
    assert sorted(np.asarray(objectives.most_different(reward, 4))[0].tolist()) == [0, 1, 2, 3]


def test_length_cost_is_a_hinge():
    length = jnp.array([0, 40, 80, 90, 100])
    assert np.allclose(objectives.length_cost(length, 100), [0, 0.4, 0.8, 0.9, 1.0])
    assert np.allclose(objectives.length_cost(length, 100, 80), [0, 0, 0, 0.5, 1.0])


def test_an_update_group_is_an_update_on_these_answers_alone(base):
    """Two of four answers: the same AV as an update that is given them by hand."""
    (state, metrics), k = run(base, update_group=2), 2
    reward = np.asarray(metrics["reward_BG"])
    whole, _ = run(base)
    changed = tiny.relative(state.av.params["params"]["embed"], whole.av.params["params"]["embed"])
    assert changed > 0, "the answers in between do not count"
    h, out = jnp.asarray(tiny.activations(B)), answers(base)
    pick = np.concatenate([np.argsort(reward, 1, kind="stable")[:, :1],
                           np.argsort(reward, 1, kind="stable")[:, -1:]], 1)
    kept = np.take_along_axis(reward, pick, 1)
    rows = (np.arange(B)[:, None] * G + pick).reshape(-1)
    part = {"h_ND": jnp.repeat(h, k, 0), "ids_NT": out.ids_BT[rows], "logp_NT": out.logp_BT[rows],
            "length_N": out.length_B[rows],
            "advantage_N": jnp.asarray(kept - kept.mean(1, keepdims=True)).reshape(-1)}
    by_hand, _ = roles.av_update(optimize.learner(verbalizer.init(base, SPEC.lm, key=jax.random.key(1)), SGD),
                                 base, {"params": base}, SPEC, OPTS, SGD, part)
    tiny.assert_trees_close(state.av.params, by_hand.params, atol=1e-6)


def test_an_ar_group_is_an_update_on_the_best_answers_alone(base):
    """One of four answers: the same AR as an update that is given them by hand, and the same AV."""
    (state, metrics), (whole, _) = run(base, ar_group=1), run(base)
    tiny.assert_trees_close(state.av.params, whole.av.params, atol=1e-6)
    h_ND = jnp.repeat(jnp.asarray(tiny.activations(B)), G, 0)
    out, start, end, ok = steps.rollout({"params": base}, base, SPEC, h_ND[::G], jnp.arange(B),
                                        jax.random.key(3), group=G, max_new=T)
    ar = reconstructor.init(base, SPEC.lm, SPEC.layer, key=jax.random.key(2))
    mse, _ = reading.score(ar, base, SPEC, out.ids_BT, start, end, h_ND)
    mse_BG = np.where(ok, mse, np.inf).reshape(B, G)
    weight = np.zeros((B, G), np.float32)
    np.put_along_axis(weight, np.argsort(mse_BG, 1)[:, :1], 1, 1)
    weight = weight.reshape(-1) * np.asarray(ok)
    assert 0 < weight.sum() < float(metrics["ok"]) * B * G, "some readable answer is left out"
    ids, valid, last = reconstructor.splice(SPEC.ar, out.ids_BT, start, end)
    part = {"ids_BT": ids, "valid_BT": valid, "last_B": last, "h_BD": h_ND, "weight_B": jnp.asarray(weight)}
    grads, _, _ = roles.ar_grads(ar, base, SPEC, part, 1)
    assert np.allclose(ar["head"] - state.ar.params["head"], grads["head"], atol=1e-6)


def test_groups_of_equal_rewards_are_dropped(base):
    """The update is that of the other groups alone, KL included; AR learns from all."""
    ref = {"params": tiny.talker_params(SPEC.lm, seed=5)}
    out, h_ND = answers(base), jnp.repeat(jnp.asarray(tiny.activations(B)), G, 0)
    reward = jnp.arange(B * G, dtype=jnp.float32).reshape(B, G).at[1].set(3.0)
    kept = jnp.repeat(objectives.has_spread(reward), G)
    part = {"h_ND": h_ND, "ids_NT": out.ids_BT, "logp_NT": out.logp_BT, "length_N": out.length_B,
            "advantage_N": objectives.advantages(reward, "batch").reshape(-1)}

    def updated(part, **options):
        opts = dataclasses.replace(OPTS, kl=0.5, loss_mean="prompts", **options)
        role = optimize.learner({"params": base}, SGD)
        return roles.av_update(role, base, ref, SPEC, opts, SGD, part)[0].params

    dropped = updated({**part, "kept_N": kept}, drop_equal=True)
    alone = updated({k: a[np.asarray(kept)] for k, a in part.items()})
    tiny.assert_trees_close(dropped, alone, atol=1e-6)
    every = updated(part)
    assert tiny.relative(dropped["params"]["embed"], every["params"]["embed"]) > 1e-6
    (_, plain), (_, found) = run(base), run(base, drop_equal=True)
    assert float(plain["equal_groups"]) == float(found["equal_groups"])


def test_cispo_takes_the_step_of_reinforce_on_fresh_samples(base):
    (plain, _), (cispo, _) = run(base), run(base, policy="cispo")
    tiny.assert_trees_close(plain.av.params, cispo.av.params, atol=1e-5)


def test_a_length_penalty_beyond_the_free_tokens_alone(base):
    _, plain = run(base)
    _, free = run(base, length_penalty=0.5, length_free=T - 1)
    _, all_cost = run(base, length_penalty=0.5)
    length = np.asarray(answers(base).length_B).reshape(B, G)
    assert np.allclose(all_cost["reward_BG"], plain["reward_BG"] - 0.5 * length / T, atol=1e-5)
    at_cap = length == T
    assert at_cap.any() and not at_cap.all()
    assert np.allclose(free["reward_BG"], plain["reward_BG"] - 0.5 * at_cap, atol=1e-5)


def test_written_explanations_train_ar_and_nothing_else(base):
    width = len(SPEC.ar.before) + T + len(SPEC.ar.after)
    rng = np.random.default_rng(0)
    n, narrow = 3, width - 5
    written = {
        "written_ids_BT": tiny.random_ids(rng, (n, narrow)).astype(np.int32),
        "written_valid_BT": np.ones((n, narrow), bool),
        "written_last_B": np.full(n, narrow - 1, np.int32),
        "written_weight_B": np.ones(n, np.float32),
        "written_h_BD": tiny.activations(n, seed=5),
    }
    (without, a), (beside, b) = run(base), run(base, written)
    assert np.array_equal(a["reward_BG"], b["reward_BG"]) and float(a["mse"]) == float(b["mse"])
    tiny.assert_trees_close(without.av.params, beside.av.params, atol=1e-7)
    # The gradient is the mean over both kinds of rows.
    ok = int(round(float(a["ok"]) * B * G))
    part = {k.removeprefix("written_"): jnp.asarray(v) for k, v in written.items()}
    start = reconstructor.init(base, SPEC.lm, SPEC.layer, key=jax.random.key(2))
    alone, _, _ = roles.ar_grads(start, base, SPEC, part, 1)
    moved = lambda state: start["head"] - state.ar.params["head"]
    want = (ok * moved(without) + n * alone["head"]) / (ok + n)
    assert np.allclose(moved(beside), want, atol=1e-6)


@pytest.mark.parametrize("rl, named", [
    ({"update_group": 1}, "rl.update_group=1"),
    ({"update_group": 9}, "rl.update_group=9"),
    ({"ar_group": 9}, "rl.ar_group=9"),
    ({"length_free": 128}, "rl.length_free=128"),
    ({"written_ar": -1}, "rl.written_ar=-1"),
    ({"update_group": 3, "micro_av": 16}, "rl.micro_av=16"),
    ({"written_ar": 3, "micro_ar": 2}, "rl.micro_ar=2"),
])
def test_impossible_options_are_refused(rl, named):
    c = configs.default()
    c.rl.update(rl)
    with pytest.raises(UserError, match=named):
        config_checks.validate(c)
