"""Claims of an explanation: how it is split, which the rules call true, and the figures from them."""

import dataclasses

import jax
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import claims as probe
from nla_jax.evaluate.probes import drift
from nla_jax.evaluate.words import claims as C
from nla_jax.evaluate.words import wordnet

TEXT = "In 2016 Donald Trump's lawyers bought two big cars, 3,000 in all; “we shall see”, he said, for an old"


def split(text):
    return [(c.kind, c.text) for c in C.split_claims(text)]


def test_kinds_of_claims_and_their_places():
    text = 'HuffPost report on Donald Trump selling autos in 2016: "we shall see"\n… for an old'
    assert split(text) == [
        ("name", "HuffPost"), ("name", "Donald Trump"), ("word", "selling"), ("word", "autos"),
        ("number", "2016"), ("quote", "we shall see"), ("ending", "for"), ("ending", "an"), ("ending", "old"),
    ]
    for c in C.split_claims(text):
        assert text[c.start : c.end].strip('"') == c.text


def test_words_of_genre_and_common_words_are_no_claims():
    assert split("A report about the stories of this article") == []
    assert split("Reporting from Paris") == [("name", "Paris")]
    assert split("of latfed things") == [("word", "latfed"), ("word", "things")]
    assert split("") == [] and split("… ") == []


@pytest.mark.parametrize(
    "said,true",
    [
        ("on Donald Trump", [True]),
        ("on Ivanka Trump", [False]),  # each word of a name counts
        ("the lawyer buys a car", [True, True, True]),  # other forms
        ("about autos", [True]),  # a synonym
        ("about ships", [False]),
        ("in 2016, of 3000, of 2017", [True, True, False]),
        ('says "we shall see"', [True, True]),
        ('says "we see"', [True, False]),
        ("… for an old", [True, True, True]),
        ("… an old", [True, True]),
        ("… an for old", [False, False, True]),
        ("… For, an OLD.", [True, True, True]),
        ("… old for", [False, False]),
    ],
)
def test_claims_are_judged_by_rules(said, true):
    assert C.judge_claims(C.split_claims(said), TEXT).tolist() == true


def test_claims_against_an_empty_text_are_false_and_no_claims_give_nothing():
    assert not C.judge_claims(C.split_claims("on Donald Trump\n… an old"), "").any()
    assert C.judge_claims([], TEXT).shape == (0,)


def test_another_explanation_repeats_a_claim():
    claims = C.split_claims("on old cars\n… an old mill")
    assert C.repeat_claims(claims, "auto\n… mill went an").tolist() == [False, True, True, False, True]


def test_figures_of_claims(nla, finished):
    columns = {k: v[:6] for k, v in store.load_columns(finished / "run" / "data", "heldout").items()}
    columns["doc_id"], columns["text"] = [f"d{i}" for i in range(6)], [TEXT, "A sea of ships"] * 3
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=8, label="")
    said = ["on cars and ships\n… an old", "on ships"] * 3
    ev = Evidence(nla.runner, columns, dataclasses.replace(trip, explanations=said), nla.mean_direction)
    found = {f.name: f for f in probe.claims(ev)}
    assert found["claim_precision"].value == pytest.approx(4 / 5)
    assert found["claim_precision_ending"].value == 1 and found["claim_precision_word"].n == 6
    assert found["description_precision"].value == pytest.approx(2 / 3)
    assert found["claims_accurate"].value == 2 and found["claims_fabricated"].value == 0.5
    assert found["claim_precision_shuffled"].value < found["claim_precision"].value
    bare = dataclasses.replace(ev, columns={**columns, "text": [""] * 6})
    assert probe.claims(bare) == [] and "no texts" in bare.left_out[-1]
    mute = dataclasses.replace(ev, trip=dataclasses.replace(trip, explanations=[""] * 6))
    assert probe.claims(mute) == [] and "no explanation has a claim" in mute.left_out[-1]


def test_written_explanations_give_the_scale(nla, finished):
    columns = {k: v[:4] for k, v in store.load_columns(finished / "run" / "data", "heldout").items()}
    columns["text"], columns["explanation"] = [TEXT] * 4, ["on cars"] * 4
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=8, label="")
    ev = Evidence(nla.runner, columns, dataclasses.replace(trip, explanations=["on ships"] * 4), np.zeros(1))
    found = {f.name: f.value for f in probe.claims(ev)}
    assert found["description_precision"] == 0 and found["description_precision_written"] == 1


def test_drift_is_what_a_paraphrase_keeps_and_which_activation_is_nearest(nla, finished):
    columns = {k: v[:6] for k, v in store.load_columns(finished / "run" / "data", "heldout").items()}
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=8, label="")
    said = ["on a big city", "of cars"] * 3
    right = dataclasses.replace(trip, explanations=said, h_text=np.array(columns["h"]), ok=np.ones(6, bool))
    ev = Evidence(nla.runner, columns, right, nla.mean_direction)
    found = {f.name: f.value for f in drift.drift(ev)}
    assert found["same_document"] == 1.0, "a perfect reconstruction is nearest to its own"
    texts = [wordnet.paraphrase(t, 1.0, ev.seed) for t in said]
    assert found["paraphrase_kept"] == pytest.approx(ev.fve("", ev.errors(ev.reconstruct(texts)), "").value)
    failed = dataclasses.replace(ev, trip=dataclasses.replace(right, ok=np.zeros(6, bool)))
    assert {f.name: f.value for f in drift.drift(failed)}["same_document"] == 0.0
    bare = dataclasses.replace(ev, columns={**columns, "text": [""] * 6})
    assert [f.name for f in drift.drift(bare)] == ["paraphrase_kept"] and "no texts" in bare.left_out[-1]
