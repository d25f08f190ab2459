"""The formulas of the method against direct computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import objectives
from nla_jax.lm import loss_weights, model
from tests.helpers import tiny


def test_scaled_mse_is_twice_one_minus_the_cosine():
    rng = np.random.default_rng(0)
    h, h_hat = rng.normal(size=(2, 64, 32)).astype(np.float32)
    h *= rng.uniform(0.01, 1000, (64, 1)).astype(np.float32)
    cos = np.sum(h * h_hat, 1) / np.linalg.norm(h, axis=1) / np.linalg.norm(h_hat, axis=1)
    mse = objectives.scaled_mse(h_hat, h)
    np.testing.assert_allclose(mse, 2 * (1 - cos), rtol=1e-4)
    np.testing.assert_allclose(objectives.scaled_mse(7 * h_hat, h), mse, rtol=1e-4)
    np.testing.assert_allclose(objectives.scaled_mse(3 * h, h), 0, atol=1e-6)
    np.testing.assert_allclose(objectives.scaled_mse(-h, h), 4, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(objectives.to_sqrt_d(h), axis=1), 32**0.5, rtol=1e-5)


def test_scaled_mse_of_a_zero_vector_has_a_finite_gradient():
    zero, h = jnp.zeros(32), jnp.ones(32)
    value, grad = jax.value_and_grad(objectives.scaled_mse)(zero, h)
    assert value == pytest.approx(1.0) and np.isfinite(grad).all()


def test_scaled_mse_of_low_precision_is_computed_in_float32():
    h = tiny.activations(4)
    low = jnp.asarray(h, jnp.bfloat16)
    assert objectives.scaled_mse(low, h).dtype == jnp.float32
    np.testing.assert_allclose(objectives.scaled_mse(low, low), 0, atol=1e-6)


def test_reward():
    mse, ok = jnp.array([0.5, 0.5, 0.0, 3.0]), jnp.array([True, False, True, True])
    np.testing.assert_allclose(objectives.reward(mse, ok, "mse"), [-0.5, -2.0, 0.0, -3.0])
    log = objectives.reward(mse, ok, "log_mse")
    np.testing.assert_allclose(log, [np.log(2), -np.log(2), -np.log(1e-8), -np.log(3)], rtol=1e-5)
    # What cannot be read scores as a reconstruction at a right angle, whatever AR made of it.
    orthogonal = objectives.scaled_mse(jnp.eye(32)[0], jnp.eye(32)[1])
    assert float(orthogonal) == pytest.approx(objectives.FAILED_MSE, rel=1e-5)
    unread = objectives.reward(jnp.array([jnp.nan]), jnp.array([False]), "log_mse")
    np.testing.assert_allclose(unread, -np.log(2), rtol=1e-6)


def test_advantages():
    reward = jnp.array([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
    mean = objectives.advantages(reward, "mean")
    np.testing.assert_allclose(mean, [[-2, -1, 0, 3], [0, 0, 0, 0]])
    score = np.asarray(objectives.advantages(reward, "zscore"))
    np.testing.assert_allclose(score[0], np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-3)
    np.testing.assert_array_equal(score[1], 0)  # a group without spread teaches nothing


def test_batch_level_advantages_share_one_scale():
    """A wide group keeps more weight than a narrow one; a group without spread does not change the scale."""
    reward = jnp.array([[1.0, 2.0, 3.0, 6.0], [4.0, 4.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0]])
    free = np.array([[-2, -1, 0, 3], [-0.5, -0.5, 0.5, 0.5], [0, 0, 0, 0]])
    found = objectives.advantages(reward, "batch")
    np.testing.assert_allclose(found, free / np.sqrt((14 + 1) / 8), rtol=1e-3)
    np.testing.assert_allclose(objectives.advantages(reward[:2], "batch"), found[:2], rtol=1e-5)
    assert np.asarray(objectives.has_spread(reward)).tolist() == [True, True, False]
    assert not np.asarray(objectives.advantages(reward[2:], "batch")).any()


def test_the_means_of_a_loss_over_tokens_and_over_sequences():
    """Sequences of 1, 3 and no tokens, with losses 6 and (0, 3, 3): 12 / 4 and (6 + 2) / 2."""
    mask = jnp.array([[True, False, False], [True, True, True], [False, False, False]])
    loss = jnp.array([[6.0, 99.0, 99.0], [0.0, 3.0, 3.0], [99.0, 99.0, 99.0]])
    for mean, value in (("tokens", 3.0), ("sequences", 4.0)):
        weight, total = loss_weights.token_weights(mask, mean)
        assert float((weight * loss).sum() / total) == pytest.approx(value)
        parts = [float((weight[i] * loss[i]).sum() / total) for i in range(3)]
        assert sum(parts) == pytest.approx(value)  # as microbatches add up
        weight, total = loss_weights.token_weights(jnp.zeros((2, 3), bool), mean)
        assert (float(weight.sum()), float(total)) == (0.0, 1.0)


def test_the_mean_of_a_loss_over_prompts():
    """Groups of two: the mean over a group's tokens, then over the groups that have tokens."""
    mask = jnp.array([[True, False], [True, True], [True, True], [False, False], [False, False],
                      [False, False]])
    loss = jnp.array([[6.0, 99.0], [0.0, 3.0], [1.0, 2.0], [99.0, 99.0], [99.0, 99.0], [99.0, 99.0]])
    weight, total = loss_weights.token_weights(mask, "prompts", 2)
    assert float((weight * loss).sum() / total) == pytest.approx((9 / 3 + 3 / 2) / 2)
    alone, of_sequences = (loss_weights.token_weights(mask, m)[0] for m in ("prompts", "sequences"))
    np.testing.assert_array_equal(alone, of_sequences)  # with groups of one


def test_masked_mean():
    x = jnp.array([1.0, 2.0, 4.0])
    assert objectives.masked_mean(x, jnp.array([True, False, True])) == 2.5
    assert objectives.masked_mean(x, jnp.zeros(3, bool)) == 0.0


# token_scores

N = 37


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def scored(request):
    """(cfg, params, hidden, targets, reference) with logits far from even."""
    cfg = tiny.lm(tied=request.param, n_blocks=1)
    rng = np.random.default_rng(0)
    hidden, other = (jnp.asarray(rng.normal(size=(N, 32)), jnp.float32) for _ in range(2))
    params = jax.tree.map(lambda a: 2 * a, tiny.params(cfg))
    ref = (tiny.params(cfg, seed=7), other)
    return cfg, params, hidden, jnp.asarray(tiny.random_ids(rng, (N,), cfg.vocab_size)), ref


def direct(params, cfg, hidden, target, ref):
    """The same from whole [N, V] arrays."""
    logp = jax.nn.log_softmax(model.unembed(params, cfg, hidden))
    other = jax.nn.log_softmax(model.unembed(ref[0], cfg, ref[1]))
    p = jnp.exp(logp)
    picked = logp[jnp.arange(N), target]
    return picked, -(p * logp).sum(-1), (p * (logp - other)).sum(-1)


# One at a time, a divisor-free size, the exact length, more than there is.
@pytest.mark.parametrize("chunk", [1, 10, 36, 37, 1024])
def test_token_scores_equal_the_whole_vocabulary(scored, chunk):
    cfg, params, hidden, target, ref = scored
    got = jax.jit(lambda *a: objectives.token_scores(a[0], cfg, *a[1:], chunk=chunk))(
        params, hidden, target, ref)
    for name, a, b in zip(("logp", "entropy", "kl"), got, direct(params, cfg, hidden, target, ref),
                          strict=True):
        assert a.shape == (N,)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    assert (got[2] > 0).all()


def test_token_scores_without_a_reference(scored):
    cfg, params, hidden, target, ref = scored
    logp, entropy, kl = objectives.token_scores(params, cfg, hidden, target, chunk=16)
    want = direct(params, cfg, hidden, target, ref)
    np.testing.assert_allclose(logp, want[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy, want[1], rtol=1e-4)
    np.testing.assert_array_equal(kl, 0)


def test_token_scores_without_statistics(scored):
    """`stats=False`: the same log-probabilities and nothing else."""
    cfg, params, hidden, target, ref = scored
    logp, *rest = objectives.token_scores(params, cfg, hidden, target, ref, 16, stats=False)
    np.testing.assert_allclose(logp, direct(params, cfg, hidden, target, ref)[0], rtol=1e-4,
                               atol=1e-5)
    for zeros in rest:
        np.testing.assert_array_equal(zeros, np.zeros(N))


def test_kl_to_itself_is_zero(scored):
    cfg, params, hidden, target, _ = scored
    kl = objectives.token_scores(params, cfg, hidden, target, (params, hidden), chunk=10)[2]
    np.testing.assert_allclose(kl, 0, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "capped"])
def test_weighted_scores(scored, cap):
    """Value, scores and gradients are those of whole [N, V] arrays; none flows into the reference."""
    cfg, params, hidden, target, ref = scored
    cfg = dataclasses.replace(cfg, final_softcap=cap)
    weight, kl_weight = jnp.linspace(-1, 1, N), jnp.linspace(0.5, 0, N)

    def chunked(params, hidden, ref):
        value, scores = objectives.weighted_scores(
            params, cfg, hidden, target, weight, kl_weight, ref, chunk=10)
        return 2 * value, scores

    def whole(params, hidden, ref):
        logp, entropy, kl = direct(params, cfg, hidden, target, jax.lax.stop_gradient(ref))
        return 2 * jnp.sum(weight * logp + kl_weight * kl), (logp, entropy, kl)

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(params, hidden, ref)
                 for f in (chunked, whole))
    tiny.assert_trees_close(got, want, rtol=1e-3, atol=1e-4)
    assert all((a == 0).all() for a in tiny.flat(got[1][2]).values())
    assert np.abs(got[1][1]).min(1).max() > 0
    # Not differentiated, it says the same; and hidden states alone may be trained, as under adapters.
    np.testing.assert_allclose(jax.jit(chunked)(params, hidden, ref)[0], got[0][0], rtol=1e-5)
    alone = jax.grad(lambda x: chunked(params, x, ref)[0])(hidden)
    np.testing.assert_allclose(alone, got[1][1], rtol=1e-5, atol=1e-6)


def test_weighted_scores_without_a_reference(scored):
    """The supervised loss: log-probabilities only, and the gradient of the cross-entropy."""
    cfg, params, hidden, target, ref = scored
    weight = jnp.linspace(-1, 1, N)

    def chunked(params, hidden):
        value, (_, *rest) = objectives.weighted_scores(
            params, cfg, hidden, target, weight, chunk=16, stats=False)
        return value, rest

    def whole(params, hidden):
        return jnp.sum(weight * direct(params, cfg, hidden, target, ref)[0])

    (value, rest), got = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(params, hidden)
    want_value, want = jax.value_and_grad(whole, argnums=(0, 1))(params, hidden)
    np.testing.assert_allclose(value, want_value, rtol=1e-4)
    tiny.assert_trees_close(got, want, rtol=1e-3, atol=1e-4)
    assert all((a == 0).all() for a in rest)


def test_cispo_weighs_each_token_by_its_ratio(scored):
    """The gradient is that of weight * min(ratio, 5) * logp, with the factor held fixed, plus the KL's."""
    cfg, params, hidden, target, ref = scored
    rng = np.random.default_rng(2)
    weight, kl_weight = (jnp.asarray(rng.normal(size=N), jnp.float32) for _ in range(2))
    old = direct(params, cfg, hidden, target, ref)[0] + jnp.asarray(rng.uniform(-3, 3, N), jnp.float32)

    def ours(policy, params, hidden):
        return objectives.weighted_scores(params, cfg, hidden, target, weight, kl_weight, ref, chunk=10,
                                          policy=policy, sampled_logp_N=old)[0]

    def by_hand(params, hidden):
        logp, _, kl = direct(params, cfg, hidden, target, ref)
        ratio = jnp.exp(jax.lax.stop_gradient(logp) - old)
        assert float(ratio.max()) > loss_weights.CISPO_MOST > float(ratio.min())
        return jnp.sum(weight * jnp.minimum(ratio, loss_weights.CISPO_MOST) * logp + kl_weight * kl)

    want = jax.grad(by_hand, (0, 1))(params, hidden)
    got = jax.grad(lambda *a: ours("cispo", *a), (0, 1))(params, hidden)
    tiny.assert_trees_close(got, want, atol=1e-4)
    # Fresh samples have the ratio 1: both losses are one there.
    plain = jax.grad(lambda x: ours("reinforce", params, x))(hidden)
    old = direct(params, cfg, hidden, target, ref)[0]
    fresh = jax.grad(lambda x: ours("cispo", params, x))(hidden)
    np.testing.assert_allclose(fresh, plain, rtol=1e-3, atol=1e-5)
