"""What RL rewards: the words that a reader gets, who reads them, and the parts of the reward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nla_jax import objectives, reconstructor, steps, target, verbalizer
from nla_jax.evaluate.probes.patch import run_patched
from nla_jax.lm import optimize
from nla_jax.rl import reading, scoring
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=3), layer=1)
B, G, T = 4, 4, 12
OPTS = tiny.rl_options(G, T, length_penalty=0.25)
SGD = optax.sgd(1.0)
BREAK = tiny.NEWLINE_ID


@pytest.fixture(scope="module")
def base():
    return tiny.talker_params(SPEC.lm)


def start(base):
    """The state of RL, and another AR as the warm start's."""
    ar = lambda seed: reconstructor.init(base, SPEC.lm, SPEC.layer, rank=2, key=jax.random.key(seed))
    av = optimize.learner(verbalizer.init(base, SPEC.lm, key=jax.random.key(1)), SGD)
    shake = lambda a: a + 0.05 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape)
    return steps.RLState(av, optimize.learner(ar(2), SGD)), jax.tree.map(shake, ar(3))


@pytest.fixture(scope="module")
def rolled(base):
    """(batch, answers) of a rollout, some of which fail."""
    rng = np.random.default_rng(0)
    length = np.array([7, 9, 4, 10])
    batch = {
        "h_BD": jnp.asarray(tiny.activations(B)), "row_B": jnp.arange(B),
        "text_ids_BT": jnp.asarray(tiny.random_ids(rng, (B, 10))),
        "text_at_B": jnp.asarray(length - 1, jnp.int32),
        "text_valid_BT": jnp.asarray(np.arange(10)[None] < length[:, None]),
    }
    run = jax.jit(functools.partial(steps.roll_out, spec=SPEC, opts=OPTS))
    batch, answers = run({"params": base}, base, batch, jax.random.key(5))
    assert 1 < int(answers["ok_N"].sum()) < B * G
    return batch, answers


def updated(base, batch, answers, **options):
    state, warm = start(base)
    run = functools.partial(steps.update, spec=SPEC, opts=dataclasses.replace(OPTS, **options), tx_av=SGD,
                            tx_ar=SGD)
    return jax.jit(run)(state, base, {"params": base}, batch, answers,
                        warm if options.get("reader") == "warm_ar" else None)


# --- the words ------------------------------------------------------------------------------------


def answers_of(rows, starts, ends):
    return {"ids_NT": jnp.array(rows, jnp.int32), "start_N": jnp.array(starts), "end_N": jnp.array(ends)}


def test_without_settings_the_words_are_those_of_the_answer():
    answers = answers_of([[3, 40, 41, 5]], [1], [3])
    words = reading.read_words(SPEC, answers, {}, 1)
    assert all(a is b for a, b in zip(words, answers.values(), strict=True))


def test_a_prefix_is_the_same_in_a_group_and_does_not_end_in_a_line_break():
    answers = answers_of([[3, 40, BREAK, 41, 42, 5], [3, 43, 44, 45, 5, 9]] * 2, [1, 1] * 2, [5, 4] * 2)
    _, start_N, end_N = reading.read_words(SPEC, answers, {"prefix_B": jnp.array([2, 9], jnp.int32)}, 2)
    assert start_N.tolist() == [1, 1, 1, 1]
    assert end_N.tolist() == [2, 3, 5, 4], "the first row ends in a break; a long prefix is the whole"
    only = answers_of([[3, BREAK, 41, 5]], [1], [3])
    assert reading.read_words(SPEC, only, {"prefix_B": jnp.array([1], jnp.int32)}, 1)[2].tolist() == [2]


def test_edited_words_replace_an_answer_and_are_cut_too():
    answers = answers_of([[3, 40, 41, 42, 5], [3, 43, 44, 45, 5]], [1, 1], [4, 4]) | {
        "edited_ids_NT": jnp.array([[50, 51, 52, 53, 9], [0] * 5], jnp.int32),
        "edited_end_N": jnp.array([4, 0]), "edited_N": jnp.array([True, False])}
    ids_NT, start_N, end_N = reading.read_words(SPEC, answers, {}, 1)
    assert [row[a:b].tolist() for row, a, b in zip(ids_NT, start_N, end_N, strict=True)] == [
        [50, 51, 52, 53], [43, 44, 45]]
    _, _, end_N = reading.read_words(SPEC, answers, {"prefix_B": jnp.array([2, 2], jnp.int32)}, 1)
    assert end_N.tolist() == [2, 3]


# --- the parts of the reward ----------------------------------------------------------------------


def test_a_reward_is_the_sum_of_its_parts():
    mse, ok = jnp.array([0.5, 1.0, 0.1]), jnp.array([True, True, False])
    kl, claims = jnp.array([2.0, 1e-9, 3.0]), jnp.array([0.5, -0.25, -1.0])
    plain = -np.log([0.5, 1.0, 2.0])
    assert np.allclose(scoring.combine(mse, ok, "log_mse"), plain)
    assert np.allclose(scoring.combine(mse, ok, "mse", claims_N=claims, false_claims=2.0),
                       [-0.5 + 1.0, -1.0 - 0.5, -2.0 - 2.0])
    from_kl = -np.log([2.0, scoring.LEAST_KL, 3.0])
    assert np.allclose(scoring.combine(mse, ok, "log_mse", kl_N=kl, patch_kl=1.0), from_kl)
    mixed = scoring.combine(mse, ok, "log_mse", kl_N=kl, patch_kl=0.25)
    assert np.allclose(mixed, 0.75 * plain + 0.25 * from_kl)


def test_a_failed_answer_has_a_larger_kl_than_every_readable_one():
    kl = scoring.failed_kl(jnp.array([[1.0, 0.2, 0.1], [0.3, 0.2, 0.5]]),
                           jnp.array([[True, True, False], [False, False, False]]))
    assert np.allclose(kl, [[1.0, 0.2, 2.0], [1.0, 1.0, 1.0]])


def test_batch_fve_of_perfect_mean_and_failed_answers():
    h = jnp.asarray(tiny.activations(64))
    mse = objectives.scaled_mse(jnp.broadcast_to(objectives.to_sqrt_d(h).mean(0), h.shape), h)
    ok = jnp.ones(64, bool)
    assert float(reading.batch_fve(jnp.zeros(64), ok, h)) == 1.0
    variance = float(jnp.mean(jnp.var(objectives.to_sqrt_d(h), 0, ddof=1)))
    assert float(reading.batch_fve(mse, ok, h)) == pytest.approx(1 - float(mse.mean()) / variance, abs=1e-5)
    assert float(reading.batch_fve(mse, ~ok, h)) == pytest.approx(1 - 2 / variance, abs=1e-5)


@pytest.mark.parametrize("lead", [(), (11, 12)])
def test_patched_kl_is_that_of_the_patch_probe(base, lead):
    """The cache of the positions before h gives what a whole second pass gives."""
    rng, spec = np.random.default_rng(1), dataclasses.replace(SPEC, lead=lead)
    length, n = np.array([4, 9, 6]), 3
    ids, valid = tiny.random_ids(rng, (3, 9)), np.arange(9)[None] < length[:, None]
    vectors = tiny.activations(3 * n).reshape(3, n, -1)
    vectors[0, 0] = 0
    got = target.patched_kl(base, spec.lm, spec.layer, ids, valid, jnp.asarray(length - 1), vectors, lead)
    first = np.broadcast_to(np.array(lead, np.int32), (3, len(lead)))
    whole, there = np.concatenate([first, ids], 1), np.concatenate([first == first, valid], 1)
    want, *_ = run_patched(base, spec, whole, there, length - 1 + len(lead), np.ones(3, int),
                           jnp.asarray(vectors.swapaxes(0, 1)))
    np.testing.assert_allclose(got, np.asarray(want)[:, :, 0].T, rtol=1e-4, atol=1e-6)
    assert np.asarray(got).min() > 1e-4


# --- whole steps ----------------------------------------------------------------------------------


def test_a_step_is_its_rollout_and_its_update(base, rolled):
    batch, answers = rolled
    state, metrics = updated(base, batch, answers)
    run = functools.partial(steps.rl, spec=SPEC, opts=OPTS, tx_av=SGD, tx_ar=SGD)
    whole, same = jax.jit(run)(start(base)[0], base, {"params": base}, batch, jax.random.key(5))
    assert metrics.keys() == same.keys() and not {"reader_fve", "prefix", "patch_kl"} & metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-5, atol=1e-6, err_msg=name)
    tiny.assert_trees_close(state, whole, rtol=1e-4, atol=1e-5)


def test_another_reader_gives_the_reward_and_ar_trains_as_before(base, rolled):
    """The frozen target reads the words alone; AR's update does not depend on who reads."""
    batch, answers = rolled
    plain, before = updated(base, batch, answers)
    state, metrics = updated(base, batch, answers, reader="frozen_target")
    tiny.assert_trees_close(state.ar.params, plain.ar.params, rtol=1e-5, atol=1e-6)
    assert float(metrics["ar_mse"]) == pytest.approx(float(before["mse"]), rel=1e-5)
    ok, h_ND = np.asarray(answers["ok_N"]), np.repeat(tiny.activations(B), G, 0)
    want = np.full(B * G, 2.0)
    for i in np.flatnonzero(ok):
        words = np.asarray(answers["ids_NT"])[i, int(answers["start_N"][i]) : int(answers["end_N"][i])][None]
        h_hat = target.capture(base, SPEC.lm, SPEC.layer, words, np.ones(words.shape, bool),
                               np.array([[words.shape[1] - 1]]))[0, 0]
        want[i] = objectives.scaled_mse(h_hat, jnp.asarray(h_ND[i]))
    cost = 0.25 * np.asarray(answers["length_N"]) / T
    np.testing.assert_allclose(metrics["reward_BG"].reshape(-1), -np.log(want) - cost, rtol=1e-4, atol=1e-5)
    assert float(metrics["mse"]) == pytest.approx(want[ok].mean(), rel=1e-4)
    fve = float(reading.batch_fve(jnp.asarray(want, jnp.float32), jnp.asarray(ok), batch["h_BD"]))
    assert float(metrics["reader_fve"]) == pytest.approx(fve, rel=1e-3, abs=1e-3)


def test_all_settings_at_once(base, rolled):
    """The warm start's AR reads the first tokens of edited words; KL, claims and length join the reward."""
    batch, answers = rolled
    rng, ok = np.random.default_rng(2), answers["ok_N"]
    batch = {**batch, "prefix_B": jnp.array([2, 5, 3, 9], jnp.int32)}
    answers = {**answers, "edited_ids_NT": jnp.asarray(tiny.random_ids(rng, (B * G, T))),
               "edited_end_N": jnp.full(B * G, 6, jnp.int32), "edited_N": jnp.arange(B * G) % 2 == 0,
               "claims_N": jnp.linspace(-1.0, 1.0, B * G)}
    _, metrics = updated(base, batch, answers, reader="warm_ar", patch_kl=0.5, false_claims=2.0)
    words, goal = reading.read_words(SPEC, answers, batch, G), jnp.repeat(batch["h_BD"], G, 0)
    mse, h_hat = reading.score(start(base)[1], base, SPEC, *words, goal)
    vectors = jnp.where(ok[:, None], h_hat, 0.0).reshape(B, G, -1)
    text = (batch["text_ids_BT"], batch["text_valid_BT"], batch["text_at_B"])
    kl = scoring.failed_kl(target.patched_kl(base, SPEC.lm, SPEC.layer, *text, vectors), ok.reshape(B, G))
    want = scoring.combine(mse, ok, "log_mse", kl_N=kl.reshape(-1), patch_kl=0.5,
                           claims_N=answers["claims_N"], false_claims=2.0)
    want -= 0.25 * answers["length_N"].astype(jnp.float32) / T
    np.testing.assert_allclose(metrics["reward_BG"].reshape(-1), want, rtol=1e-4, atol=1e-5)
    assert float(metrics["patch_kl"]) == pytest.approx(float(kl.reshape(-1)[ok].mean()), rel=1e-4)
    read = np.asarray(words[2] - words[1])[np.asarray(ok)]
    assert float(metrics["prefix"]) == pytest.approx(read.mean()) and read.max() <= 6
    assert float(metrics["paraphrased"]) == pytest.approx(float(answers["edited_N"][ok].mean()))
    assert np.isfinite([float(v) for v in metrics.values() if jnp.ndim(v) == 0]).all()
