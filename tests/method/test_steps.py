"""The jitted steps: what one update does, and what it must never do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nla_jax import objectives, reconstructor, steps, target, verbalizer
from nla_jax.lm import loss_weights, model, optimize
from nla_jax.rl import roles
from nla_jax.util.batching import pad_rows
from tests.helpers import tiny

SPEC = tiny.talker(lm=tiny.lm(tied=False, n_blocks=2), layer=0)
B, G, T = 4, 4, 12
OPTS = tiny.rl_options(G, T, advantage="zscore", kl=1.0)
# Plain gradient descent: the difference of parameters is the gradient, small ones included.
SGD = optax.sgd(1.0)
ADAM = optimize.optimizer(2e-3, 100)


@pytest.fixture(scope="module")
def base():
    return tiny.talker_params(SPEC.lm)


def new_roles(base, tx=SGD, rank=0):
    """(AV, AR) at their start; made anew for each use, because steps donate them."""
    av = verbalizer.init(base, SPEC.lm, rank=rank, key=jax.random.key(1))
    ar = reconstructor.init(base, SPEC.lm, SPEC.layer, rank=rank, key=jax.random.key(2))
    return optimize.learner(av, tx), optimize.learner(ar, tx)


@functools.cache  # compiling is what takes the time here
def jitted(step, spec=SPEC, tx=SGD, micro=1, donate=(), **more):
    return jax.jit(functools.partial(step, spec=spec, tx=tx, micro=micro, **more), donate_argnums=donate)


def rl_jitted(opts, tx=SGD):
    return jax.jit(functools.partial(steps.rl, spec=SPEC, opts=opts, tx_av=tx, tx_ar=tx),
                   donate_argnums=0)


def rl_batch(seed=0):
    return {"h_BD": jnp.asarray(tiny.activations(B, seed=seed)), "row_B": jnp.arange(B)}


@pytest.fixture(scope="module")
def rollout(base):
    """16 answers of all kinds and where they are cut, as `av_update` and `splice` take them."""
    h_BD = rl_batch()["h_BD"]
    out, start, end, ok = jax.jit(lambda av: steps.rollout(
        av, base, SPEC, h_BD, jnp.arange(B), jax.random.key(0), group=G, max_new=T))(
            {"params": base})
    assert 0 < ok.sum() < B * G and 0 < out.closed_B.sum() < B * G
    return {"h_ND": jnp.repeat(h_BD, G, 0), "ids_NT": out.ids_BT, "logp_NT": out.logp_BT,
            "length_N": out.length_B}, (start, end, ok)


def av_batch(n=8, t=10):
    """Responses of different lengths."""
    rng = np.random.default_rng(0)
    length = rng.integers(2, t + 1, n)
    return {"h_BD": jnp.asarray(tiny.activations(n)), "ids_BT": tiny.random_ids(rng, (n, t)),
            "mask_BT": np.arange(t)[None] < length[:, None]}


def ar_batch(n=8):
    rng = np.random.default_rng(1)
    rows = [tiny.random_ids(rng, (k,)).tolist() for k in rng.integers(5, 16, n)]
    ids, valid, last = pad_rows(rows, 0)
    return {"ids_BT": ids, "valid_BT": valid, "last_B": last,
            "h_BD": jnp.asarray(tiny.activations(n)),
            "weight_B": np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)}


# Step -> scalar metrics of `three_steps`, float32 on a CPU, to six digits.
GOLDEN = [
    {
        "ar_grad_norm": 1.63409, "ar_norm": 8.02221, "ar_skipped": 0, "ar_skipped_run": 0,
        "av_grad_norm": 0.495771, "av_skipped": 0, "av_skipped_run": 0, "entropy": 1.00743,
        "length": 6, "mse": 1.88578, "ok": 0.75, "reward": -0.62661,
        "reward_group_std": 0.0850913, "truncated": 0.0625, "kl": 0,
    },
    {
        "ar_grad_norm": 1.65241, "ar_norm": 8.29661, "ar_skipped": 0, "ar_skipped_run": 0,
        "av_grad_norm": 2.3291, "av_skipped": 0, "av_skipped_run": 0, "entropy": 0.957383,
        "length": 3.8125, "mse": 1.54878, "ok": 0.5625, "reward": -0.526611,
        "reward_group_std": 0.0251719, "truncated": 0, "kl": 0.07552,
    },
]
# First loss and gradient norm of `test_warm_start`.
GOLDEN_WARM = {"av": (9.50320, 30.4867), "ar": (1.95189, 1.25527)}

# The whole RL step


@pytest.fixture(scope="module")
def three_steps(base):
    """Metrics of three steps on one batch, (AV, AR) after each, and how often it compiled."""
    step = rl_jitted(OPTS, ADAM)
    state, ref = steps.RLState(*new_roles(base, ADAM)), {"params": base}
    batch, keys, out = rl_batch(), [jax.random.key(i) for i in range(3)], []
    for i in range(3):
        guard = "disallow" if i else "allow"  # the first call puts constants on the device
        with jax.transfer_guard(guard):
            state, metrics = step(state, base, ref, batch, keys[i])
        out.append((jax.tree.map(np.asarray, metrics), jax.tree.map(np.array, state)))
    return out, step._cache_size()


def test_no_recompilation_and_no_transfer(three_steps):
    """One compilation for three steps with donated state; the fixture forbids transfers."""
    assert three_steps[1] == 1


def test_first_update_ratio_is_one(three_steps):
    """What sampling stored is what scoring finds, as long as nothing was updated in between."""
    for metrics, _ in three_steps[0]:  # one update a rollout: every step is on-policy
        assert metrics["ratio_off_max"] < 1e-4
        assert metrics["ratio_off_mean"] <= metrics["ratio_off_max"]


def test_kl_grows_from_zero(three_steps):
    kl = [float(m["kl"]) for m, _ in three_steps[0]]
    assert abs(kl[0]) < 1e-6 and min(kl[1:]) > 1e-3


def test_metrics_of_the_first_steps(three_steps):
    """Golden values, float32: a change of any of these is a change of the method."""
    for (metrics, _), want in zip(three_steps[0][:2], GOLDEN, strict=True):
        got = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
        assert set(got) == {*want, "ratio_off_max", "ratio_off_mean", "equal_groups"}
        assert got["equal_groups"] == 0.0
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    metrics = three_steps[0][0][0]
    assert metrics["ids_BGT"].shape == (B, G, T) and metrics["reward_BG"].shape == (B, G)


def test_both_roles_move_and_the_base_does_not(three_steps, base):
    before = tiny.flat(base)
    av, ar = three_steps[0][0][1].av.params, three_steps[0][0][1].ar.params
    for name, a in tiny.flat(av["params"]).items():
        assert np.isfinite(a).all() and np.abs(a - before[name]).max() > 1e-4, name
    for name, a in tiny.flat(ar["params"]).items():
        changed = np.abs(a - before[name][: a.shape[0]]).max()
        assert changed > 1e-4, name
    assert np.abs(ar["head"] - np.eye(32)).max() > 1e-4
    tiny.assert_trees_close(base, tiny.talker_params(SPEC.lm))


@pytest.fixture(scope="module")
def plain_steps(base):
    """Two steps of an AV with adapters, a frozen AR and a length penalty: (metrics, state)."""
    opts = dataclasses.replace(OPTS, advantage="mean", length_penalty=0.5, train_ar=False)
    step, out = rl_jitted(opts), []
    state, ref = steps.RLState(new_roles(base, rank=4)[0], new_roles(base)[1]), new_roles(base, rank=4)[0]
    for i in range(2):
        state, metrics = step(state, base, ref.params, rl_batch(), jax.random.key(i))
        out.append((metrics, jax.tree.map(np.array, state)))
    return out


def test_reward_against_plain_python(plain_steps, base):
    """Every answer cut, spliced and scored by hand: reconstruction, failure value, length."""
    metrics, _ = plain_steps[0]
    ids_NT = np.asarray(metrics["ids_BGT"]).reshape(-1, T)
    ar = reconstructor.weights(base, new_roles(base)[1].params, SPEC.layer)
    prompts, kept, want = [], [], np.full(B * G, 2.0)
    length = np.array([next((t + 1 for t in range(T) if row[t] in (tiny.CLOSE_ID, tiny.EOS_ID)), T)
                       for row in ids_NT])
    for i, row in enumerate(ids_NT):
        closed = row[length[i] - 1] == tiny.CLOSE_ID
        words = tiny.reference_cut(SPEC.av, row, length[i], closed)
        if words is not None:
            prompts.append([*SPEC.ar.before, *words, *SPEC.ar.after])
            kept.append(i)
    assert 1 < len(kept) < B * G
    h_hat = reconstructor.reconstruct(ar, SPEC.lm, *pad_rows(prompts, 0))
    h_ND = np.repeat(tiny.activations(B), G, 0)[kept]
    cos = np.sum(h_hat * h_ND, 1) / np.linalg.norm(h_hat, axis=1) / np.linalg.norm(h_ND, axis=1)
    want[kept] = 2 * (1 - cos)
    reward = -np.log(want) - 0.5 * length / T
    np.testing.assert_allclose(metrics["reward_BG"].reshape(-1), reward, atol=1e-4)
    assert float(metrics["ok"]) == pytest.approx(len(kept) / B / G)
    assert float(metrics["length"]) == pytest.approx(length.mean())
    assert float(metrics["mse"]) == pytest.approx(want[kept].mean(), rel=1e-4)


def test_frozen_ar(plain_steps, base):
    """train_ar=False: AR and its optimizer are as they were, AV learns."""
    for metrics, state in plain_steps:
        tiny.assert_trees_close(state.ar, new_roles(base)[1])
        assert not any(k.startswith("ar_") for k in metrics)
        assert metrics["av_grad_norm"] > 1e-3


def test_the_frozen_target_as_ar(base):
    """The tree of AR is empty: AV alone is trained, for the reward of the target's own reading."""
    spec = dataclasses.replace(SPEC, ar=dataclasses.replace(SPEC.ar, before=(), after=(), suffix=()))
    opts = dataclasses.replace(OPTS, train_ar=False)
    step = jax.jit(functools.partial(steps.rl, spec=spec, opts=opts, tx_av=SGD, tx_ar=SGD))
    av = optimize.learner(verbalizer.init(base, SPEC.lm), SGD)
    state, ref, batch = steps.RLState(av, optimize.learner({}, SGD)), {"params": base}, rl_batch()
    new, metrics = step(state, base, ref, batch, jax.random.key(0))
    tiny.assert_trees_close(new.ar, state.ar)
    assert new.ar.params == {}
    scalars = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    assert all(np.isfinite(v) for v in scalars.values()), scalars
    assert not any(name.startswith("ar_") for name in scalars)
    assert scalars["av_grad_norm"] > 0 and scalars["ok"] > 0 and scalars["ratio_off_max"] < 1e-4
    moved = tiny.flat(jax.tree.map(lambda a, b: np.abs(a - b).max(), new.av.params, state.av.params))
    assert max(moved.values()) > 0
    # The reward is that of the target's state at the last word, computed here row by row.
    out, start, end, ok = steps.rollout(
        av.params, base, spec, batch["h_BD"], batch["row_B"], jax.random.key(0), group=G, max_new=T)
    want = np.full(B * G, -np.log(2.0))
    for i in np.flatnonzero(ok):
        words = np.asarray(out.ids_BT)[i, int(start[i]) : int(end[i])][None]
        h_BP = target.capture(base, SPEC.lm, SPEC.layer, words, np.ones(words.shape, bool),
                              np.array([[words.shape[1] - 1]]))
        a, b = np.asarray(h_BP)[0, 0], np.asarray(batch["h_BD"])[i // G]
        want[i] = -np.log(2 * (1 - np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)))
    np.testing.assert_allclose(np.asarray(metrics["reward_BG"]).reshape(-1), want, rtol=1e-4, atol=1e-5)


def test_adapters_leave_the_base_alone(plain_steps, base):
    """Only the adapter is trained; ratio and KL are those of the adapted model."""
    start = tiny.flat(new_roles(base, rank=4)[0].params)
    for metrics, state in plain_steps:
        assert metrics["ratio_off_max"] < 1e-4
        assert set(state.av.params) == {"lora"}
    assert abs(plain_steps[0][0]["kl"]) < 1e-6 and plain_steps[1][0]["kl"] > 1e-6
    for name, a in tiny.flat(state.av.params).items():
        assert np.abs(a - start[name]).max() > 0, name
    tiny.assert_trees_close(base, tiny.talker_params(SPEC.lm))


# Rollout


def test_a_sample_is_named_by_its_row(base, rollout):
    """Rows 2 and 3 of the batch, alone and in another order: the same answers."""
    pick = jnp.array([3, 2])
    out, *_ = jax.jit(lambda h: steps.rollout(
        {"params": base}, base, SPEC, h, pick, jax.random.key(0), group=G, max_new=T))(
            rl_batch()["h_BD"][pick])
    want = rollout[0]["ids_NT"].reshape(B, G, T)[pick]
    np.testing.assert_array_equal(out.ids_BT.reshape(2, G, T), want)


# AV's update


@pytest.fixture(scope="module")
def updates(base):
    """AV's update: (its gradient, the metrics)."""

    @functools.cache
    def compiled(micro, kl, mean):
        opts = dataclasses.replace(OPTS, micro_av=micro, kl=kl, loss_mean=mean)
        return jax.jit(lambda role, ref, batch: roles.av_update(
            role, base, ref, SPEC, opts, SGD, batch))

    def update(batch, micro=1, kl=OPTS.kl, av=None, mean="tokens"):
        role = optimize.learner(av or {"params": base}, SGD)
        new, metrics = compiled(micro, kl, mean)(role, {"params": base}, batch)
        return jax.tree.map(jnp.subtract, role.params, new.params), metrics

    return update


ADVANTAGE = jnp.asarray(np.random.default_rng(5).normal(size=B * G), jnp.float32)


@pytest.mark.parametrize("mean", loss_weights.LOSS_MEANS)
def test_policy_gradient_against_the_formula(base, rollout, updates, mean):
    """-mean over response tokens of advantage x log-probability, from whole logits, plus KL."""
    batch, _ = rollout
    assert len(set(np.asarray(batch["length_N"]).tolist())) > 1  # with one length, the means are equal
    shaken = jax.tree.map(lambda a: a * 1.02, {"params": base})
    got, _ = updates({**batch, "advantage_N": ADVANTAGE}, av=shaken, mean=mean)

    @jax.jit
    @jax.grad
    def want(av):
        def logits(params):
            e = verbalizer.inject({}, batch["h_ND"], SPEC.alpha)
            prompt = jnp.array([*SPEC.av.before, SPEC.av.marker, *SPEC.av.after])
            ids = jnp.concatenate([jnp.tile(prompt, (B * G, 1)), batch["ids_NT"]], 1)
            x = model.embed(params, SPEC.lm, ids).at[:, len(SPEC.av.before)].set(e)
            x, _ = model.forward(params, SPEC.lm, x, jnp.ones(ids.shape, bool))
            return jax.nn.log_softmax(model.unembed(params, SPEC.lm, x[:, len(prompt) - 1 : -1]))

        logp, ref = logits(av["params"]), logits(base)
        picked = jnp.take_along_axis(logp, batch["ids_NT"][..., None], -1)[..., 0]
        kl = (jnp.exp(logp) * (logp - ref)).sum(-1)
        mask = jnp.arange(T)[None] < batch["length_N"][:, None]
        value = -ADVANTAGE[:, None] * picked + OPTS.kl * kl
        value, mask = jnp.where(mask, value, 0), mask.astype(jnp.float32)
        if mean == "tokens":
            return value.sum() / mask.sum()
        of = 1 if mean == "sequences" else G  # rows whose tokens share a mean
        value, mask = (a.reshape(-1, of * T).sum(1) for a in (value, mask))
        return (value / mask).mean()

    want = tiny.flat(want(shaken))
    for name, g in tiny.flat(got).items():
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(g, want[name], atol=2e-3 * scale + 1e-7, err_msg=name)


def test_tokens_after_the_end_do_not_matter(rollout, updates):
    batch = {**rollout[0], "advantage_N": ADVANTAGE}
    written = jnp.arange(T)[None] < batch["length_N"][:, None]
    want, _ = updates(batch)
    got, _ = updates({**batch, "ids_NT": jnp.where(written, batch["ids_NT"], 77)})
    tiny.assert_trees_close(got, want, atol=1e-7)


def test_kl_has_no_gradient_at_the_reference(base, rollout, updates):
    """Exact KL at AV = reference: value and gradient are zero; away from it, both are not."""
    batch = {**rollout[0], "advantage_N": jnp.zeros(B * G)}
    _, metrics = updates(batch)
    assert abs(metrics["kl"]) < 1e-6 and metrics["av_grad_norm"] < 1e-5
    away = jax.tree.map(lambda a: a * 1.05, {"params": base})
    _, metrics = updates(batch, av=away)
    assert metrics["kl"] > 1e-3 and metrics["av_grad_norm"] > 1e-3


def test_microbatches_give_the_same_av_update(rollout, updates):
    batch = {**rollout[0], "advantage_N": ADVANTAGE}
    want, one = updates(batch)
    got, many = updates(batch, micro=4, kl=0.0)  # at the reference, KL has no gradient
    assert many.pop("kl") == 0 and abs(one.pop("kl")) < 1e-6
    tiny.assert_trees_close(got, want, rtol=1e-3, atol=1e-5)
    tiny.assert_trees_close(many, one, rtol=1e-3, atol=1e-5)


# Failed answers


def test_a_failed_answer_trains_av_and_never_ar(base, rollout, updates):
    """Change the words of an answer that cannot be read: AR's gradient stays, AV's does not."""
    batch, (start, end, ok) = rollout
    ar = new_roles(base)[1].params
    failed = int(np.flatnonzero(~np.asarray(ok) & (np.asarray(batch["length_N"]) > 6))[0])
    other = batch["ids_NT"].at[failed, 2:5].set(jnp.array([70, 71, 72]))

    @jax.jit
    def ar_grads(ids_NT):
        ids, valid, last = reconstructor.splice(SPEC.ar, ids_NT, start, end)
        part = {"ids_BT": ids, "valid_BT": valid, "last_B": last, "h_BD": batch["h_ND"],
                "weight_B": ok.astype(jnp.float32)}
        return roles.ar_grads(ar, base, SPEC, part, 1)[0]

    tiny.assert_trees_close(ar_grads(other), ar_grads(batch["ids_NT"]))
    good = int(np.flatnonzero(np.asarray(ok))[0])
    seen = batch["ids_NT"].at[good, 1].set(70)
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), ar_grads(seen),
                           ar_grads(batch["ids_NT"]))
    assert max(jax.tree.leaves(changed)) > 1e-6

    # A failed answer's reward is the lowest, so its advantage is not zero and AV learns from it.
    reward = objectives.reward(jnp.full(B * G, 0.5), ok, "log_mse").reshape(B, G)
    mixed = int(failed // G) if 0 < ok.reshape(B, G)[failed // G].sum() < G else None
    adv = objectives.advantages(reward, "zscore").reshape(-1)
    if mixed is not None:
        assert adv[failed] < 0
    only = jnp.zeros(B * G).at[failed].set(-1.0)
    _, metrics = updates({**batch, "advantage_N": only})
    assert metrics["av_grad_norm"] > 1e-3


def test_no_readable_answer_at_all(base):
    """Nothing for AR to learn from: its update is zero, finite, and AV goes on."""
    batch = {**ar_batch(), "weight_B": np.zeros(8, np.float32)}
    role, metrics = jitted(steps.warm_start_ar)(new_roles(base)[1], base, batch)
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and metrics["skipped"] == 0
    tiny.assert_trees_close(role.params, new_roles(base)[1].params)


# Warm start


@pytest.mark.parametrize("name", ["av", "ar"])
def test_warm_start(base, name):
    """Five steps on one batch: the loss falls, one compilation, nothing crosses to the host."""
    step = {"av": steps.warm_start_av, "ar": steps.warm_start_ar}[name]
    batch = jax.device_put({"av": av_batch, "ar": ar_batch}[name]())
    role = new_roles(base, ADAM)[name == "ar"]
    run, losses = jitted(step, tx=ADAM, donate=0), []
    for i in range(5):
        with jax.transfer_guard("disallow" if i else "allow"):
            role, metrics = run(role, base, batch)
        if i == 0:
            first = float(metrics["loss"]), float(metrics["grad_norm"])
            assert first == pytest.approx(GOLDEN_WARM[name], rel=1e-3)
        losses.append(float(metrics["loss"]))
    assert run._cache_size() == 1
    assert losses[-1] < 0.9 * losses[0] and metrics["skipped"] == 0


@pytest.mark.parametrize("name, more", [("av", {}), ("ar", {}), ("av", {"loss_mean": "sequences"})])
def test_microbatches_give_the_same_warm_start(base, name, more):
    step = {"av": steps.warm_start_av, "ar": steps.warm_start_ar}[name]
    batch = {"av": av_batch, "ar": ar_batch}[name]()
    role = new_roles(base)[name == "ar"]
    want, one = jitted(step, **more)(role, base, batch)
    got, many = jitted(step, micro=4, **more)(role, base, batch)
    tiny.assert_trees_close(many, one, rtol=1e-4, atol=1e-6)
    tiny.assert_trees_close(got.params, want.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"loss_mean": "sequences"}])
def test_warm_start_av_counts_response_tokens_only(base, more):
    """The loss is the mean over masked-in tokens, or over rows of their means; what is masked out does not
    matter. A row without tokens has no part in it."""
    batch = av_batch()
    batch["mask_BT"][3] = False
    step = jitted(steps.warm_start_av, **more)
    _, want = step(new_roles(base)[0], base, batch)
    other = {**batch, "ids_BT": np.where(batch["mask_BT"], batch["ids_BT"], 3)}
    _, got = step(new_roles(base)[0], base, other)
    assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-6)
    assert float(want["tokens"]) == batch["mask_BT"].sum()
    params = verbalizer.weights(base, {"params": base})
    e = verbalizer.inject({}, batch["h_BD"], SPEC.alpha)
    x = jax.jit(verbalizer.response_hidden, static_argnums=(1, 2))(
        params, SPEC.lm, SPEC.av, e, batch["ids_BT"])
    logp = jax.nn.log_softmax(model.unembed(params, SPEC.lm, x))
    picked = np.take_along_axis(np.asarray(logp), batch["ids_BT"][..., None], -1)[..., 0]
    loss = -picked[batch["mask_BT"]].mean()
    by_row = -np.mean([p[m].mean() for p, m in zip(picked, batch["mask_BT"], strict=True) if m.any()])
    assert abs(loss - by_row) > 1e-3 * loss
    assert float(want["loss"]) == pytest.approx(by_row if more else loss, rel=1e-4)


def test_warm_start_ar_loss_is_the_weighted_mean(base):
    batch = ar_batch()
    _, metrics = jitted(steps.warm_start_ar)(new_roles(base)[1], base, batch)
    ar = reconstructor.weights(base, new_roles(base)[1].params, SPEC.layer)
    h_hat = reconstructor.reconstruct(
        ar, SPEC.lm, batch["ids_BT"], batch["valid_BT"], batch["last_B"])
    mse = objectives.scaled_mse(h_hat, batch["h_BD"])
    assert float(metrics["loss"]) == pytest.approx(
        float(np.average(mse, weights=batch["weight_B"])), rel=1e-4)


def test_remat_and_chunks_change_nothing(base):
    other = dataclasses.replace(SPEC, remat=True, vocab_chunk=7)
    want, _ = jitted(steps.warm_start_av)(new_roles(base)[0], base, av_batch())
    got, _ = jitted(steps.warm_start_av, spec=other)(new_roles(base)[0], base, av_batch())
    tiny.assert_trees_close(got.params, want.params, rtol=1e-4, atol=1e-5)


# Refused updates


def test_update_that_is_not_finite_is_refused(base):
    """A NaN activation: parameters and optimizer stay, counters rise; a good step resets one."""
    run, good = jitted(steps.warm_start_av, tx=ADAM, donate=0), av_batch()
    bad = {**good, "h_BD": good["h_BD"].at[3, 5].set(jnp.nan)}
    role, _ = run(new_roles(base, ADAM)[0], base, good)
    for n in (1, 2):
        before = jax.tree.map(np.array, (role.params, role.opt))
        role, metrics = run(role, base, bad)
        assert not np.isfinite(metrics["grad_norm"])
        assert (metrics["skipped"], metrics["skipped_run"]) == (n, n)
        tiny.assert_trees_close((role.params, role.opt), before)
    role, metrics = run(role, base, good)
    assert (metrics["skipped"], metrics["skipped_run"]) == (2, 0)
    assert np.isfinite(tiny.flat(role.params)["params/embed"]).all()
    # Infinite rather than NaN, in one leaf of many.
    grads = jax.tree.map(jnp.zeros_like, role.params)
    grads["params"]["final_norm"] = grads["params"]["final_norm"].at[0].set(jnp.inf)
    after, info = jax.jit(lambda role, grads: optimize.apply(role, grads, ADAM))(role, grads)
    assert info["skipped_run"] == 1
    tiny.assert_trees_close(after.params, role.params)


def test_optimizer():
    """Linear warm-up to the peak, cosine to the final share; the clip bounds what Adam sees."""
    tx = optimize.optimizer(1e-2, 20, warmup=4, final=0.1)
    params = {"w": jnp.zeros(3)}
    state, sizes = tx.init(params), []
    for _ in range(24):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its count with floats
            updates, state = tx.update({"w": jnp.array([3.0, -4.0, 0.0])}, state, params)
        sizes.append(float(updates["w"][1]))
    assert sizes[0] == pytest.approx(1e-2 / 5, rel=1e-3)
    assert max(sizes) == pytest.approx(1e-2, rel=1e-3) and int(np.argmax(sizes)) == 4
    assert sizes[-1] == pytest.approx(1e-3, rel=1e-2)
    with jax.numpy_dtype_promotion("standard"):
        clip = optimize.optimizer(1.0, 10, clip=1.0).update(
            {"w": jnp.array([300.0, -400.0, 0.0])}, optimize.optimizer(1.0, 10).init(params), params)[1]
    moments = [leaf for leaf in jax.tree.leaves(clip) if jnp.ndim(leaf)]
    np.testing.assert_allclose(moments[0], [0.06, -0.08, 0], rtol=1e-5)
