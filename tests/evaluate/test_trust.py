"""Trust in claims: its features, the model, how it is measured, and how it is applied."""

import dataclasses
import json

import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probes import language
from nla_jax.evaluate.trust import apply, features, measure, model, stretch
from nla_jax.evaluate.words import claims as C
from nla_jax.pipeline import bundle_trust
from nla_jax.view import trust_report

NAMES = list(features.FEATURES)


def claims_of(kinds, x_CF):
    made = [C.Claim(kind, 0, 1, "x") for kind in kinds]
    return features.Claims(made, np.arange(len(made)), np.asarray(x_CF, float))


@pytest.fixture(scope="module")
def labelled():
    """Two thousand claims: `agree` decides names, `lens` decides words; the other features are noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, len(NAMES)))
    kinds = np.where(np.arange(2000) % 2, "name", "word")
    signal = np.where(kinds == "name", x[:, NAMES.index("agree")], x[:, NAMES.index("lens")])
    true = rng.uniform(size=2000) < 1 / (1 + np.exp(-3 * signal))
    return claims_of(kinds, x), true, np.array([f"d{i % 40}" for i in range(2000)])


@pytest.fixture(scope="module")
def trust(labelled):
    return model.fit_trust(*labelled)


def test_each_kind_has_its_own_weights_and_trust_is_calibrated(labelled, trust):
    claims, true, docs = labelled
    p = model.trust_of(trust, claims)
    assert measure.auroc(p, true) > 0.85
    assert measure.calibration_error(p, true) < 0.08
    up = claims_of(["name", "word"], np.zeros((2, len(NAMES))))
    up.x_CF[:, NAMES.index("agree")] = 1.0
    name, word = model.trust_of(trust, up)
    assert name > 0.8 and abs(word - 0.5) < 0.1
    assert trust.fitted == {"documents": 40, "claims": 2000, "true": pytest.approx(true.mean(), abs=1e-4)}


def test_a_single_activation_uses_the_model_without_neighbours(labelled, trust):
    claims, _, _ = labelled
    near = [NAMES.index(n) for n in features.NEAR]
    alone = claims_of([c.kind for c in claims.claims], claims.x_CF)
    alone.x_CF[:, near] = np.nan
    p = model.trust_of(trust, alone)
    assert np.isfinite(p).all()
    other = claims_of([c.kind for c in claims.claims], alone.x_CF)
    other.x_CF[:, near[0]] = 7.0  # only one side is known
    np.testing.assert_array_equal(model.trust_of(trust, other), p)
    assert model.trust_of(trust, claims_of([], np.zeros((0, len(NAMES))))).shape == (0,)


def test_trust_is_the_same_after_a_file(labelled, trust, tmp_path):
    path = tmp_path / "trust.json"
    assert model.read_trust(path) is None
    path.write_text(json.dumps(trust.as_json()))
    again = model.read_trust(path)
    np.testing.assert_array_equal(model.trust_of(again, labelled[0]), model.trust_of(trust, labelled[0]))
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        model.read_trust(path)
    value = trust.as_json()
    value["near"]["weights"] = value["near"]["weights"][:-1]
    with pytest.raises(UserError, match="another version"):
        model.of_json(value)
    del value["alone"]
    with pytest.raises(UserError, match="damaged"):
        model.of_json(value)


def test_too_few_claims_of_a_label_are_refused(labelled):
    claims, true, docs = labelled
    with pytest.raises(UserError, match="there are 0 and 2000"):
        model.fit_trust(claims, np.zeros(2000, bool), docs)


def test_measures_have_the_right_values():
    p, true = np.array([0.9, 0.8, 0.4, 0.2]), np.array([True, False, True, False])
    assert measure.auroc(p, true) == 0.75
    assert measure.auroc(np.ones(4), true) == 0.5 and np.isnan(measure.auroc(p, np.ones(4, bool)))
    assert measure.precision_at(p, true, 0.25) == 1.0 and measure.precision_at(p, true, 1.0) == 0.5
    assert measure.calibration_error(p, true) == pytest.approx(np.mean([0.1, 0.8, 0.6, 0.2]))
    alone = {"low": None, "high": None}  # each bin has one document
    assert measure.curve(p, true, list("abcd"))[0] == {"trust": 0.2, "true": 0.0, "claims": 1, **alone}
    by_share = {row["coverage"]: row for row in measure.coverage(p, true, list("abcd"))}
    assert by_share[0.5]["precision"] == 0.5 and by_share[0.1]["precision"] == by_share[0.3]["precision"] == 1
    assert by_share[1.0]["low"] <= 0.5 <= by_share[1.0]["high"]
    figures = {f.name: f for f in measure.trust_figures(p, true, ["name"] * 4, list("abcd"))}
    assert figures["trust_gain_half"].value == 1.0 and figures["trust_auroc_name"].value == 0.75
    assert figures["trust_auroc"].low <= 0.75 <= figures["trust_auroc"].high


def test_a_feature_with_the_wrong_sign_is_turned(labelled):
    claims, true, docs = labelled
    turned = claims_of([c.kind for c in claims.claims], -claims.x_CF)
    pairs = zip(*(measure.feature_figures(c, true, docs) for c in (claims, turned)), strict=True)
    assert all(a.value == pytest.approx(b.value) and a.value >= 0.5 for a, b in pairs)


SAID = ["a river and Old Bob\n… the old mill", "", "ships"]


@pytest.fixture(scope="module")
def said(nla, finished):
    h = store.load_columns(finished / "run" / "data", "heldout")["h"][:3]
    samples = [["river\n… an old mill", "Old Bob"], ["x", "y"], ["ships", "ships"]]
    near = [["rivers", "", "mill", "a"], ["a"], ["ship"]]
    return features.Said(h, SAID, samples, near, [["b"], ["b"], []])


def test_features_of_claims(nla, said):
    found = features.claim_features(nla.runner, nla.mean_direction, said)
    x = {(c.text, name): v for c, row in zip(found.claims, found.x_CF, strict=True)
         for name, v in zip(NAMES, row, strict=True)}
    assert [c.text for c in found.claims] == ["river", "Old Bob", "the", "old", "mill", "ships"]
    assert found.row_C.tolist() == [0, 0, 0, 0, 0, 2] and found.of(2) == [5] and found.of(1) == []
    assert x["river", "before"] == 0.25 and x["mill", "before"] == 0.25 and x["ships", "before"] == 1.0
    assert x["river", "after"] == 0.0 and np.isnan(x["ships", "after"])
    assert x["river", "agree"] == 0.5 and x["the", "agree"] == 0 and x["mill", "agree"] == 0.5
    assert x["Old Bob", "agree"] == 0.5 and x["ships", "agree"] == 1.0
    assert [x[w, "place"] for w in ("the", "old", "mill")] == [3, 2, 1] and x["ships", "place"] == 0
    assert (found.x_CF[:, NAMES.index("logp")] < 0).all() and (found.x_CF[:, NAMES.index("lens")] < 0).all()
    whole, rest = (nla.runner.reconstruct([t])[0] for t in (SAID[0], "a river and\n… the old mill"))
    lost = (F.errors(rest[None], said.h_ND[:1]) - F.errors(whole[None], said.h_ND[:1])) / said.h_ND.shape[1]
    assert x["Old Bob", "lost_ar"] == pytest.approx(lost[0], abs=1e-5)
    assert x["ships", "lost_frozen"] != 0


def test_log_probabilities_of_claims_are_those_of_the_answer(nla, said):
    """One claim that is the whole explanation has nearly all of the answer's log-probability."""
    one = dataclasses.replace(said, explanations=["", "", "ships"])
    found = features.claim_features(nla.runner, nla.mean_direction, one)
    (whole,), (n,) = language.answer_logp(nla.runner, said.h_ND[2:], ["ships"], "")
    value = found.x_CF[0, NAMES.index("logp")]
    assert whole <= value <= 0 and n > 1
    # What h adds to itself is nothing.
    itself = dataclasses.replace(one, h_ND=said.h_ND[[2, 2, 2]])
    same = features.claim_features(nla.runner, said.h_ND[2], itself)
    assert same.x_CF[0, NAMES.index("informed")] == pytest.approx(0, abs=1e-5)
    assert found.x_CF[0, NAMES.index("informed")] != 0


def test_no_claims_have_no_features(nla, said):
    none = dataclasses.replace(said, explanations=["", "", ""])
    assert features.claim_features(nla.runner, nla.mean_direction, none).x_CF.shape == (0, len(NAMES))


def test_stretches_are_neighbours_of_one_text(nla, finished):
    columns = {k: v[:3] for k, v in store.load_columns(finished / "run" / "data", "heldout").items()}
    long = " ".join(columns["text"][0].split() * 6)
    columns["text"] = [long, "short", long]
    found = stretch.explain_stretches(nla.runner, columns, rows=5, seed=0, temperature=1.0, max_new=8)
    n = len(stretch.CENTRES)
    assert len(found.texts) == 2 * n == len(found.said.explanations) == len(found.said.h_ND)
    assert long.startswith(found.texts[0]) and len(found.texts[1]) < len(found.texts[0]) < len(long)
    assert {len(near) for near in (*found.said.before, *found.said.after)} == {stretch.AROUND}
    # Centres are two tokens apart, so the token two after one centre is the centre before it in the list.
    assert found.said.after[1][stretch.AROUND - 2] == found.said.explanations[0]
    assert found.said.before[0][1] == found.said.explanations[1]
    assert len(found.said.samples[0]) == stretch.SAMPLES


def test_claims_of_a_text_through_the_library(nla, trust):
    text = "a river and the old mill of the town and a sea"
    with pytest.raises(UserError, match="no trust model"):
        nla.claims(text, [-1], ["a river"])
    before, nla.trust = nla.trust, trust
    try:
        (row, none) = nla.claims(text, [-3, 0], ["a river\n… the town", ""])
        assert [c.text for c in row] == ["river", "the", "town"] and none == []
        assert all(0 < c.trust < 1 for c in row)
        assert nla.claims(text, [-3, 0], ["a river\n… the town", ""])[0] == row
        with pytest.raises(UserError, match="outside the text"):
            nla.claims(text, [99], ["a river"])
    finally:
        nla.trust = before


def test_claims_that_are_not_trusted_are_hidden():
    text = "a river and Old Bob\n… the old mill"
    spans = [(c.kind, c.text, c.start, c.end) for c in C.split_claims(text)]
    shown = [apply.TrustedClaim(*s, p) for s, p in zip(spans, (0.9, 0.2, 0.3, 0.4, 0.8), strict=True)]
    assert apply.keep_trusted(text, shown, 0.8) == "a river and […]\n… […] mill"
    assert apply.keep_trusted(text, shown, 0.0) == text
    assert apply.keep_trusted("", [], 0.8) == ""


def test_the_plot_draws_every_split_and_part(labelled, trust, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    claims, true, docs = labelled
    seen = stretch.Stretches(features.Said(None, ["a river"] * len(true), ()), ["a text"] * len(true), ())
    found = bundle_trust.measured(trust, seen, claims, true, docs, seed=0)
    assert found.examples[0] == {"text": "a text", "explanation": "a river", "claims": [
        {"kind": "word", "claim": "x", "trust": pytest.approx(model.trust_of(trust, claims)[0], abs=1e-3),
         "true": bool(true[0])}]}
    assert [e["claims"][0]["kind"] for e in found.examples] == ["word", "name", "word"]  # of three documents
    precision = [row["precision"] for row in found.coverage["all"]]
    assert precision[0] > precision[5] > precision[-1] == pytest.approx(true.mean())
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: drawn.append(self) or save(self, *a, **kw))
    few = {**found.as_json(), "curve": [{**b, "low": None, "high": None} for b in found.curve]}
    trust_report.plot({"heldout": found.as_json(), "ood": few}, tmp_path / "t.png")
    left, right = drawn[0].axes
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["heldout", "ood"]
    assert [t.get_text() for t in right.get_legend().get_texts()] == [
        "heldout, all", "heldout, description", "ood, all", "ood, description"]
    assert (tmp_path / "t.png").stat().st_size > 5000
