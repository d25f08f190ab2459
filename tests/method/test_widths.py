"""`rl.update_widths`: short answers in narrow microbatches, and the same update as at one width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nla_jax import reconstructor, steps, verbalizer
from nla_jax.lm import optimize
from nla_jax.rl import reading, widths
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=2), layer=0)
B, G, T = 4, 4, 20
OPTS = tiny.rl_options(G, T, kl=0.5)
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def base():
    return tiny.talker_params(SPEC.lm)


@pytest.mark.parametrize("most, n, want", [
    (48, 1, (48,)),
    (48, 2, (24, 48)),
    (48, 4, (16, 24, 40, 48)),
    (50, 2, (32, 50)),
    (20, 4, (8, 16, 20)),
    (8, 4, (8,)),
    (5, 4, (5,)),
])
def test_widths_are_equal_steps_of_a_multiple(most, n, want):
    assert widths.widths(most, n) == want


@pytest.mark.parametrize("micro, want", [(1, [20]), (2, [8, 20]), (4, [8, 8, 16, 20])])
def test_each_microbatch_has_the_least_width_of_its_rows(micro, want):
    """The widths of parts, the sum over real tokens, and each row's result at the row's place."""
    length = jnp.array([17, 3, 8, 1, 9, 2, 16, 5])
    ids = jnp.arange(8 * T).reshape(8, T)

    def grad_fn(scale, part, summed):
        assert summed is None
        width = part["ids_BT"].shape[1]
        ids_BT = jnp.where(jnp.arange(width)[None] < part["length_B"][:, None], part["ids_BT"], 0)
        one_hot = jnp.zeros(T + 1, jnp.int32).at[width].add(1)
        rows = {"sum_B": ids_BT.sum(1), "length_B": part["length_B"]}
        return scale * ids_BT.sum(), {"widths": one_hot}, rows

    batch = {"ids_BT": ids, "length_B": length}
    run = jax.jit(lambda *a: widths.accumulate(grad_fn, *a, length, 4, micro))
    grads, scalars, rows = run(jnp.int32(3), batch)
    assert np.repeat(np.arange(T + 1), scalars["widths"]).tolist() == want
    sums = np.where(np.arange(T) < np.asarray(length)[:, None], ids, 0).sum(1)
    assert int(grads) == 3 * sums.sum()
    assert np.array_equal(rows["sum_B"], sums) and np.array_equal(rows["length_B"], length)


def answers() -> dict:
    """Answers of all lengths, as of `steps.roll_out`; some are truncated, and some cannot be read."""
    rng, n = np.random.default_rng(2), B * G
    length = np.int32([20, 3, 8, 1, 9, 2, 16, 5, 20, 7, 7, 4, 12, 17, 6, 8])
    closed = length < T
    end = np.where(closed, length - 1, length).astype(np.int32)
    return {"ids_NT": tiny.random_ids(rng, (n, T)), "logp_NT": np.full((n, T), -5, np.float32),
            "length_N": length, "closed_N": closed, "start_N": np.ones(n, np.int32), "end_N": end,
            "ok_N": closed & (end > 1)}


def written(n: int) -> dict:
    """Written explanations; the longest is as long as AR's longest prompt."""
    width, rng = len(SPEC.ar.before) + T + len(SPEC.ar.after), np.random.default_rng(0)
    length = np.linspace(4, width, n).astype(np.int32)
    return {
        "written_ids_BT": tiny.random_ids(rng, (n, width)),
        "written_valid_BT": np.arange(width)[None] < length[:, None],
        "written_last_B": length - 1,
        "written_weight_B": np.ones(n, np.float32),
        "written_h_BD": tiny.activations(n, seed=5),
    }


def updated(base, batch, **options):
    """(state, metrics) of one update from the same start and the same answers."""
    opts = dataclasses.replace(OPTS, **options)

    @jax.jit
    def step(av, ar, base, batch, given):
        state = steps.RLState(optimize.learner(av, SGD), optimize.learner(ar, SGD))
        return steps.update(state, base, {"params": base}, batch, given, spec=SPEC, opts=opts, tx_av=SGD,
                            tx_ar=SGD)

    av = jax.tree.map(lambda a: a * 1.02, verbalizer.init(base, SPEC.lm))  # away from the reference
    batch = {"h_BD": tiny.activations(B), "row_B": np.arange(B), **batch}
    state, metrics = step(av, reconstructor.init(base, SPEC.lm, SPEC.layer), base, batch, answers())
    return (state.av.params, state.ar.params), metrics


@pytest.mark.parametrize("batch, options", [
    (written(4), {"micro_av": 4, "micro_ar": 4, "update_group": 2, "ar_group": 2, "drop_equal": True,
                  "loss_mean": "prompts"}),
    (written(4), {"micro_ar": 4, "loss_mean": "sequences", "policy": "cispo", "reader": "frozen_target"}),
])
def test_the_update_is_that_of_one_width(base, batch, options):
    """Parameters, metrics, and the rewards, which are in the order of the answers."""
    trees, metrics = updated(base, batch, **options)
    new_trees, found = updated(base, batch, update_widths=4, **options)
    assert found.keys() == metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=2e-5, atol=2e-6, err_msg=name)
    tiny.assert_trees_close(new_trees, trees, atol=5e-6)
    assert 0 < metrics["ok"] < 1 and metrics["kl"] > 1e-4
    assert len(np.unique(metrics["reward_BG"])) > B * G / 2
    assert tiny.relative(trees[0]["params"]["embed"], 1.02 * base["embed"]) > 1e-4


def test_scores_are_in_the_order_of_the_answers(base):
    h_ND, ar = jnp.asarray(tiny.activations(B * G)), reconstructor.init(base, SPEC.lm, SPEC.layer)
    words = [jnp.asarray(answers()[name]) for name in ("ids_NT", "start_N", "end_N")]
    score = jax.jit(lambda n_widths, micro: reading.score(ar, base, SPEC, *words, h_ND, n_widths, micro),
                    static_argnums=(0, 1))
    want = score(1, 1)
    for micro in (1, 6):  # 6 does not divide 16 rows: two microbatches
        tiny.assert_trees_close(score(4, micro), want, atol=5e-6)
