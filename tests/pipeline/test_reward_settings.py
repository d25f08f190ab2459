"""The settings of RL's reward: refusals, draws that depend on the step alone, edits on the host, AR's resets,
and a run with all of them."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import configs, prompts, steps
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate.words import claim_score
from nla_jax.lm import optimize
from nla_jax.pipeline import config_checks, rl_step, stages
from nla_jax.training import jitted_steps, reward_inputs
from nla_jax.util import metrics_log
from tests.helpers import tiny, world

HERE = "tests.pipeline.test_reward_settings"


def shout(texts):
    """A paraphraser whose words are as long as the others."""
    return [t[::-1].strip() for t in texts]


def one_for_all(texts):
    return ["the same"]


@pytest.mark.parametrize("rl, named", [
    ({"reader": "ears"}, "rl.reader='ears': must be one of 'ar', 'frozen_target', 'warm_ar'"),
    ({"reader": "warm_ar", "ar_reset": 5}, "rl.ar_reset=5: has no effect .* with rl.reader='warm_ar'"),
    ({"train_ar": False, "ar_reset": 5}, "rl.ar_reset=5: has no effect .* with rl.train_ar=False"),
    ({"prefix_max": 9}, "rl.prefix_max=9: set rl.prefix_min"),
    ({"prefix_min": 9, "prefix_max": 8}, "rl.prefix_min=9: must be at most rl.prefix_max=8"),
    ({"prefix_min": 129}, "rl.prefix_min=129: must be at most rl.max_new=128"),
    ({"paraphrase": 1.5}, "rl.paraphrase=1.5"),
    ({"paraphraser": "openai:a-model"}, "each step would wait for 64 answers of an LLM"),
    ({"paraphraser": "thesaurus"}, "rl.paraphraser='thesaurus': must be one of 'wordnet'"),
    ({"patch_kl": 0.5, "shuffle_h": True}, "rl.patch_kl=0.5: compares with the row's text"),
    ({"false_claims": 1.0, "shuffle_h": True}, "rl.false_claims=1.0: compares with the row's text"),
])
def test_senseless_settings_are_refused(rl, named):
    c = configs.default()
    c.rl.update(rl)
    with pytest.raises(UserError, match=named):
        config_checks.validate(c)


def test_settings_of_another_section_that_exclude_one(monkeypatch):
    c = configs.default()
    c.activations, c.rl.false_claims = "online", 1.0
    with pytest.raises(UserError, match="rl.false_claims=1.0: needs the texts of a store"):
        config_checks.validate(c)
    c = configs.default()
    c.ar.kind, c.rl.reader = "frozen", "warm_ar"
    with pytest.raises(UserError, match="rl.reader='warm_ar': with ar.kind='frozen' the only reader"):
        config_checks.validate(c)
    for probes, said in [("claims", "needs round_trip"), ("round_trip,clams", "probe='clams'")]:
        c = configs.default()
        c.eval.probes = probes
        with pytest.raises(UserError, match=said):
            config_checks.validate(c)


def test_the_drill_has_none_of_these_settings():
    c = configs.default()
    c.rl.update(reader="frozen_target", prefix_min=4, paraphrase=0.5, patch_kl=0.5, false_claims=1.0)
    drill, plain = configs.section(c, "rl_drill"), configs.section(configs.default(), "rl_drill")
    assert drill == plain


def test_prefixes_are_drawn_from_the_range_by_step_and_row():
    at = reward_inputs.add_prefixes(lambda i: {"row_B": np.arange(64)}, 4, 7, seed=0)
    drawn = [at(i)["prefix_B"] for i in range(3)]
    assert set(np.concatenate(drawn)) == {4, 5, 6, 7} and drawn[0].dtype == np.int32
    assert np.array_equal(at(1)["prefix_B"], drawn[1]) and not np.array_equal(drawn[0], drawn[1])


def test_texts_of_a_step_have_one_width():
    tok = tiny.tokenizer()
    texts = ["the text", "a much longer text than the other one"]
    width = reward_inputs.longest(tok, texts)
    at = reward_inputs.add_texts(lambda i: {"i": i}, lambda i: texts[i : i + 1], tok, 0, width)
    for i in (0, 1):
        batch, n = at(i), len(tok(texts[i])["input_ids"])
        assert batch["i"] == i and batch["text_ids_BT"].shape == (1, width)
        assert batch["text_at_B"].tolist() == [n - 1] and batch["text_valid_BT"].sum() == n
    online = reward_inputs.add_online_texts(lambda i: {
        "read_ids_BT": np.ones((2, 4), np.int32), "read_valid_BT": np.arange(4)[None] < np.array([[4], [3]]),
        "read_at_B": np.array([1, 2])})(0)
    assert online["text_valid_BT"].sum(1).tolist() == [2, 3] and "read_at_B" in online


def test_paraphrases_are_drawn_for_whole_groups():
    picked = rl_step.is_picked(0.5, 0, 3, 200, 4).reshape(200, 4)
    assert (picked == picked[:, :1]).all() and 70 < picked[:, 0].sum() < 130
    assert np.array_equal(picked.reshape(-1), rl_step.is_picked(0.5, 0, 3, 200, 4))
    assert not rl_step.is_picked(0.0, 0, 3, 9, 2).any() and rl_step.is_picked(1.0, 0, 3, 9, 2).all()


def test_edited_words_are_the_tokens_of_the_text_path():
    tok, spec = tiny.tokenizer(), tiny.spec()
    ids_NT = np.zeros((3, 12), np.int32)
    found = rl_step.edited_words(tok, spec, tiny.AR_TEMPLATE, {2: "the concept", 0: "a" * 40}, ids_NT)
    assert found["edited_N"].tolist() == [False, False, True], "a longer text than the answer is not used"
    words = found["edited_ids_NT"][2, : found["edited_end_N"][2]]
    assert tok.decode(words) == "the concept"
    assert not rl_step.edited_words(tok, spec, tiny.AR_TEMPLATE, {}, ids_NT)["edited_N"].any()


def test_an_own_paraphraser_must_return_a_text_for_each():
    assert rl_step.paraphrases(["ab", "c"], f"{HERE}:shout", 0) == ["ba", "c"]
    with pytest.raises(UserError, match="must return one text for each of 2"):
        rl_step.paraphrases(["ab", "c"], f"{HERE}:one_for_all", 0)
    assert rl_step.paraphrases(["A big city"], "wordnet", 0)[0].startswith("A large ")


# --- claims ---------------------------------------------------------------------------------------

RAIN = "Heavy rain flooded the harbour of Bristol in 2016, said Maria Jones"
COURT = "The court in Madrid fined a bank over false loans in 2012"


def score(*explanations, fewest=4, texts=(RAIN, COURT)):
    said = [*explanations, *[""] * (len(explanations) % len(texts))]
    found, metrics = claim_score.score_claims(said, np.array([bool(t) for t in said]), texts, ["a", "b"],
                                              len(said) // len(texts), fewest)
    return found.tolist(), metrics


def test_the_score_of_claims_counts_true_ones_of_this_text():
    (right, wrong), metrics = score("Rain and floods in the harbour of Bristol", "Rain and floods in Bristol")
    assert right == 1.0, "rain, floods, harbour, Bristol"
    assert wrong == pytest.approx(-0.75), "true of the other text: three of at least four"
    assert metrics["claim_precision"] == pytest.approx(4 / 7) and metrics["claims_false"] == 1.5
    assert metrics["claim_precision_shuffled"] == pytest.approx(3 / 7)


def test_the_score_cannot_be_gained_by_saying_less_by_repeating_or_by_failing():
    (full, _), _ = score("Rain and floods in the harbour of Bristol", "")
    (less, failed), _ = score("Rain", "")
    (again, _), _ = score("Rain, rain, rain and rain", "")
    assert less == again == 0.25 < full and failed == -1.0
    (padded, _), _ = score("Rain and floods in the harbour of Bristol with elephants", "")
    assert padded == pytest.approx(4 / 5)
    (nothing, _), metrics = score("", "")
    assert nothing == -1.0 and metrics["claim_precision"] == 0.0


# --- steps and runs -------------------------------------------------------------------------------


def test_ar_returns_to_the_warm_start_at_the_same_steps_after_a_resume(monkeypatch):
    import optax

    def trained(state, base, ref, batch, key, reader):
        ar = state.ar.replace(params=state.ar.params + 1.0, skipped=state.ar.skipped + 1)
        return state.replace(ar=ar), {}

    monkeypatch.setattr(jitted_steps, "rl_step", lambda *a: trained)
    monkeypatch.setattr(jitted_steps, "optimizer", lambda *a: optax.sgd(1.0))
    monkeypatch.setattr(jitted_steps, "learner", lambda params, tx, mesh: optimize.learner(params, tx))
    c = configs.default()
    c.rl.ar_reset = 3
    r = types.SimpleNamespace(config=c, base={}, mesh=None)
    ar = optimize.learner(jnp.float32(0.0), optax.sgd(1.0))
    state, seen = steps.RLState(ar, ar), []
    step = rl_step.make_step(r, None, state, "rl", {}, lambda: jnp.float32(10.0), None)
    for i in range(8):
        if i == 6:  # a resumed process makes the step anew, from the saved state
            step = rl_step.make_step(r, None, state, "rl", {}, lambda: jnp.float32(10.0), None)
        state, _ = step(state, {}, i)
        seen.append(float(state.ar.params))
    assert seen == [1, 2, 3, 11, 12, 13, 11, 12]
    assert int(state.ar.skipped) == 8, "the count of skipped updates is that of the whole stage"


def test_rows_without_texts_are_refused_before_work(finished, monkeypatch):
    c = world.config(finished)
    c.rl.false_claims = 1.0
    r = types.SimpleNamespace(config=c, workdir=finished / "run")
    rl_step.check_rows(r)
    monkeypatch.setattr(store, "load_columns", lambda *a: {"text": ["a", "", "b"]})
    with pytest.raises(UserError, match="rl.false_claims: 1 of 3 rows of RL have no text"):
        rl_step.check_rows(r)


@pytest.mark.usefixtures("quick")
def test_a_run_with_all_settings_stops_and_goes_on(finished, tmp_path):
    """The same numbers in one go and after a stop, with a paraphraser and claims on the host."""
    c = world.config(finished)
    c.ar_template = c.ar_template or prompts.AR_TEMPLATE
    c.rl.update(steps=3, reader="frozen_target", prefix_min=2, prefix_max=12, paraphrase=0.6, patch_kl=0.5,
                paraphraser=f"{HERE}:shout", false_claims=0.5, fewest_claims=2, watch_every=0)
    c.checkpoint_every = 2
    stages.run(c, tmp_path / "whole", "rl", finished / "run")
    batches = []

    def stopping(step):
        def run(state, b, i):
            batches.append(i)
            if i == 2 and len(batches) == 3:
                raise KeyboardInterrupt
            return step(state, b, i)

        return run

    make = rl_step.make_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_step, "make_step", lambda *a: stopping(make(*a)))
        with pytest.raises(KeyboardInterrupt):
            stages.run(c, tmp_path / "parts", "rl", finished / "run")
        stages.run(c, tmp_path / "parts", "rl", finished / "run")
    assert batches == [0, 1, 2, 2]
    whole, parts = (metrics_log.read(tmp_path / n / "metrics" / "rl.jsonl") for n in ("whole", "parts"))
    assert [r["step"] for r in parts] == [0, 1, 2]
    names = {"reader_fve", "ar_mse", "prefix", "paraphrased", "patch_kl", "claim_score", "claim_precision",
             "claim_precision_shuffled", "claims_true", "claims_false"}
    for a, b in zip(whole, parts, strict=True):
        assert names <= a.keys() and all(np.isfinite(a[n]) for n in names)
        numbers = [k for k, v in a.items() if isinstance(v, float)]
        assert {k: a[k] for k in numbers} == pytest.approx({k: b[k] for k in numbers}, rel=1e-5, abs=1e-6)
    assert any(r["paraphrased"] > 0 for r in whole) and all(r["prefix"] <= 12 for r in whole)
