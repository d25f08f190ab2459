"""Claims that recur over neighbouring positions: which they are, and what is measured about them."""

import dataclasses

import jax
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.words import edits

SAID = [
    "a river bank; the old mill\nends on lights",
    "one claim only about ships",
    "the of and\na market opens; it is",
    "",
]
# What AV says of the tokens before, the same of each row: shares "river bank", "ships", "market".
NEAR = ["the river and its bank", "", "ships at a market"]


@pytest.fixture(scope="module")
def evidence(nla, finished):
    """Eight rows of as many documents with explanations put in by hand; every fourth failed."""
    columns = store.load_columns(finished / "run" / "data", "rl")
    columns = {k: v[::4] for k, v in columns.items()}
    columns["doc_id"] = [f"d{i}" for i in range(8)]
    h, texts = columns["h"], SAID * 2
    trip = nla.runner.round_trip(h, jax.random.key(0), temperature=1.0, max_new=16, label="")
    ok = np.array([bool(t) for t in texts])
    trip = dataclasses.replace(trip, explanations=texts, ok=ok, h_text=nla.runner.reconstruct(texts))
    return Evidence(nla.runner, columns, trip, np.asarray(nla.mean_direction), bootstrap=200, max_new=16)


def test_content_words():
    assert recurrence.content_words("The Senate's vote, IT was 3.5; a Vote") == {"senate's", "vote", "3", "5"}
    assert recurrence.content_words("of and the") == frozenset()


def test_split_of_claims():
    """Half of the words in ONE neighbour's explanation; a claim without content words is neither."""
    text = "a river bank; two old red mills\nthe of; lights"
    assert edits.claims(text) == ["a river bank;", "two old red mills", "the of;", "lights"]
    near = ["River", "old boats", "two", "red"]
    assert recurrence.recurring_claims(text, near) == [True, False, None, False]
    assert recurrence.recurring_claims(text, [*near, "OLD mills", "lights"]) == [True, True, None, True]
    assert recurrence.recurring_claims(text, ["", ""]) == [False, False, None, False]
    assert recurrence.recurring_claims("", near) == []


def test_activations_before_the_position(evidence, nla):
    rows = np.array([5, 0, 2])
    sources = [evidence.columns["text"][i] for i in rows]
    got = capture_texts.capture_last(evidence.runner, sources, back=range(1, recurrence.BACK + 1))
    assert got.shape == (3, recurrence.BACK, nla.spec.lm.d_model)
    for r, i in enumerate(rows):
        want = nla.capture(evidence.columns["text"][i])
        assert got[r] == pytest.approx(want[-2 : -2 - recurrence.BACK : -1], abs=1e-5)
        # The row's own activation is the next one.
        assert want[-1] == pytest.approx(evidence.columns["h"][i], abs=1e-5)


def test_figures_by_hand(evidence, nla, monkeypatch):
    """Six rows, of three kinds: against sums over their claims."""
    monkeypatch.setattr(nla.runner.__class__, "explain", lambda self, h, *_, **__: NEAR * (len(h) // 3))
    text = ["x " * 30 + "river mill", "ships " + "x " * 60, "market"] + ["x y z w"] * 5
    ev = dataclasses.replace(evidence, columns={**evidence.columns, "text": text})
    got = {f.name: f for f in recurrence.recurrence(ev)}
    assert list(got) == [
        "recurring", "recurring_elsewhere", "lost_recurring", "recurring_in_text", "lost_lone",
        "lone_in_text",
    ]
    kinds = [recurrence.recurring_claims(t, NEAR) for t in SAID[:3]]
    assert kinds == [[True, False, False], [False], [None, True, None]]
    assert got["recurring"].value == got["recurring_elsewhere"].value == pytest.approx(2 / 5)
    assert got["recurring"].n == 6
    # Row 2 lacks "opens" and row 0 "bank"; "ships" stands too far back, as do all words of rows 4 to 6.
    assert got["recurring_in_text"].value == pytest.approx((1 + 1) / 8)
    assert got["lone_in_text"].value == pytest.approx(1 / 14)

    h, var = evidence.columns["h"], F.variances(evidence.columns["h"])

    def lost(claims):
        above = below = 0.0
        for i, j in claims:
            both = nla.runner.reconstruct([SAID[i % 4], edits.remove_claim(SAID[i % 4], j)])
            whole, rest = F.errors(both, h[[i, i]])
            above, below = above + rest - whole, below + var[i]
        return above / below

    assert got["lost_recurring"].value == pytest.approx(lost([(0, 0), (4, 0), (2, 1), (6, 1)]), abs=1e-5)
    # A claim that is all there is cannot be left out.
    assert got["lost_lone"].value == pytest.approx(lost([(0, 1), (0, 2), (4, 1), (4, 2)]), abs=1e-5)
    assert got["lost_lone"].value != 0
    for f in got.values():
        assert f.asks and (f.low is None or f.low - 1e-9 <= f.value <= f.high + 1e-9), f
    assert got["lost_lone"].low is None and got["recurring"].low is not None  # of 2 and of 6 documents


def test_with_what_av_says(evidence):
    """Its own neighbours' explanations: the figures repeat, and nothing is said about failures alone."""
    figures = recurrence.recurrence(evidence)
    assert {"recurring", "recurring_elsewhere"} <= {f.name for f in figures}
    assert recurrence.recurrence(evidence) == figures
    failed = dataclasses.replace(evidence.trip, ok=np.zeros(8, bool))
    assert recurrence.recurrence(dataclasses.replace(evidence, trip=failed)) == []


def test_rows_are_a_keyed_choice(evidence, monkeypatch):
    assert list(recurrence._rows(evidence)) == [0, 1, 2, 4, 5, 6]
    short = {**evidence.columns, "text": ["abc", *evidence.columns["text"][1:]]}
    assert 0 not in recurrence._rows(dataclasses.replace(evidence, columns=short))
    monkeypatch.setattr(recurrence, "ROWS", 3)
    chosen = {tuple(recurrence._rows(dataclasses.replace(evidence, seed=s)).tolist()) for s in range(5)}
    assert len(chosen) > 1 and all(len(c) == 3 and list(c) == sorted(c) for c in chosen)
