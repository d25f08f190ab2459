"""The meaning probes on the tiny run and on readers made by hand, which understand or do not."""

import dataclasses
import hashlib
import types

import jax
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import meaning
from nla_jax.evaluate.words import wordnet
from nla_jax.evaluate.words.paraphrase import REWRITE
from nla_jax.lm.chat_prompts import chat_ids
from nla_jax.lm.model import embed, forward, unembed

SOURCES = [
    "The hungry rabbit crossed the green garden and hid from a farmer in London",
    "A small river flooded the village after heavy rain and people left Paris",
    "He said the minister met a teacher in Berlin to talk about the school",
    "Then a doctor saw the patient in Madrid and wrote a long letter to the hospital",
    "She bought a ticket for the concert in Vienna and took the train to the market",
    "The old captain sailed his ship from Lisbon to the island with the sailor",
    "They said the kitchen of the hotel in Dublin was closed by the owner",
    "A young lawyer from Geneva told the court that the judge was a friend",
]
EXPLANATIONS = [
    'A good story of a rabbit and a garden.\nIt is the end: "a farmer in London".',
    "News of a small river, and of Paris in 1999; the people left.",
    'The minister said it is a big school; "in Berlin" is next.',
    "A doctor, a hospital, a long letter.",
    'The ticket is for "the concert in Vienna".',
    "A ship and an old sailor; hot days at the island",
    "A bad hotel; its owner closed the kitchen",
    "",
]
OK = np.arange(8) < 7


@pytest.fixture(scope="module")
def evidence(nla, finished):
    """Eight rows of the RL split with texts and explanations put in by hand; the last one failed."""
    columns = store.load_columns(finished / "run" / "data", "rl")
    columns = {k: v[::4] for k, v in columns.items()} | {"text": SOURCES}
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=16, label="")
    trip = dataclasses.replace(trip, explanations=EXPLANATIONS, ok=OK)
    return Evidence(nla.runner, columns, trip, np.asarray(nla.mean_direction), bootstrap=300)


@pytest.fixture(scope="module")
def figures(evidence):
    heard = dataclasses.replace(evidence, paraphraser=lambda texts: texts)
    return {f.name: f for f in meaning.meaning(heard)}


def read_by(ev: Evidence, reconstruct, explanations=EXPLANATIONS, **columns) -> Evidence:
    """The same evidence with another AR, for which every explanation of `ev` is right."""
    r = ev.runner
    runner = types.SimpleNamespace(tok=r.tok, spec=r.spec, base=r.base, batch=r.batch)
    runner.reconstruct = runner.read_frozen = lambda texts, label="": reconstruct(texts)
    columns = {**ev.columns, "h": np.asarray(reconstruct(explanations), np.float32), **columns}
    trip = dataclasses.replace(ev.trip, explanations=explanations)
    return dataclasses.replace(ev, runner=runner, columns=columns, trip=trip)


def test_figures_are_fve_of_the_edited_texts(evidence, figures, nla):
    h = evidence.columns["h"]
    var = F.variances(h)

    def error(edit):
        return F.errors(nla.runner.reconstruct([edit(t) for t in EXPLANATIONS]), h, OK)

    whole = error(lambda t: t)
    for name, edit in [
        ("fve_paraphrase", wordnet.paraphrase),
        ("fve_paraphrase_kept_quotes", lambda t: wordnet.paraphrase(t, keep_quotes=True)),
        ("fve_paraphrase_half", lambda t: wordnet.paraphrase(t, 0.5)),
        ("fve_llm_paraphrase", lambda t: t),
    ]:
        assert figures[name].value == pytest.approx(F.fve(error(edit), var), abs=1e-5)
    # A failed answer costs what it always costs, whatever is made of it.
    assert whole[7] == error(wordnet.paraphrase)[7] == 2 * h.shape[1]
    rows = [i for i, t in enumerate(EXPLANATIONS) if wordnet.reverse_claims(t)[1]]
    assert rows and 7 not in rows
    opposite = error(lambda t: wordnet.reverse_claims(t)[0])
    control = error(lambda t: wordnet.apply_neutral(t, wordnet.reverse_claims(t)[1]))
    lost = (opposite - whole)[rows].sum() / var[rows].sum()
    assert figures["lost_opposite"].value == pytest.approx(lost, abs=1e-5)
    assert figures["lost_opposite"].n == figures["moved_control"].n == len(rows)
    margin = figures["lost_opposite"].value - figures["lost_opposite_control"].value
    assert figures["opposite_margin"].value == pytest.approx(margin, abs=1e-6)
    assert figures["opposite_margin"].value == pytest.approx(
        (opposite - control)[rows].sum() / var[rows].sum(), abs=1e-5)
    found = [wordnet.reverse_claims(t) for t in EXPLANATIONS]
    neutral = [wordnet.apply_neutral(t, changes) for t, (_, changes) in zip(EXPLANATIONS, found, strict=True)]
    frozen = [F.errors(nla.runner.read_frozen(texts), h, OK) for texts in ([t for t, _ in found], neutral)]
    assert figures["opposite_margin_frozen"].value == pytest.approx(
        (frozen[0] - frozen[1])[rows].sum() / var[rows].sum(), abs=1e-5)
    assert figures["moved_opposite"].value > 0 < figures["moved_control"].value
    assert figures["lost_entities"].n == sum(
        wordnet.swap_entities(t, EXPLANATIONS[:7]) != t for t in EXPLANATIONS) == 4
    before, after = ([w for t in texts for w in t.split()]
                     for texts in (EXPLANATIONS, map(wordnet.paraphrase, EXPLANATIONS)))
    share = np.mean([a != b for a, b in zip(before, after, strict=True)])
    assert figures["paraphrased"].value == pytest.approx(share) and share > 0.1
    for f in figures.values():
        assert f.asks and (f.low is None or f.low - 1e-9 <= f.value <= f.high + 1e-9), f


def test_the_target_rewrites_greedily(evidence, figures, nla, monkeypatch):
    asked = []
    monkeypatch.setattr(meaning, "chat_ids", lambda tok, said: asked.append(said) or chat_ids(tok, said))
    written = meaning._rewrite(evidence, "")
    assert asked == [REWRITE.replace("{text}", t) for t in EXPLANATIONS]
    assert sorted(written) == list(range(8)) and written[7] == "" and any(written.values())
    assert figures["fve_target_paraphrase"].n == figures["target_paraphrase_new"].n == 7
    assert meaning._count_new("A big, old dog.", "the Old dog ran") == (2, 4)
    row = max(written, key=lambda i: len(written[i]))
    prompt = chat_ids(nla.tokenizer, REWRITE.replace("{text}", EXPLANATIONS[row]))
    ids = np.zeros((1, len(prompt) + 8), np.int32)
    ids[0, : len(prompt)] = prompt

    @jax.jit
    def following(ids, n):
        x = embed(nla.base, nla.spec.lm, ids)
        x, _ = forward(nla.base, nla.spec.lm, x, np.arange(ids.shape[1])[None] < n)
        return unembed(nla.base, nla.spec.lm, x[:, n - 1])

    for n in range(len(prompt), ids.shape[1]):
        ids[0, n] = np.argmax(following(ids, n))
    answer = nla.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
    assert written[row].startswith(answer.strip()) and answer.strip()
    # Prompts that do not fit are left out; with none left there is no figure.
    monkeypatch.setattr(meaning, "MAX_NEW", evidence.runner.spec.lm.max_position)
    assert meaning._rewrite(evidence, "") == {}


def word_reader(same: dict):
    """An AR that adds up a random vector for each word; words of `same` are read as what they stand for."""

    def vector(word):
        word = word.strip('.,;:"').lower()
        word = "a" if word == "an" else word
        digest = hashlib.blake2b(same.get(word, word).encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little")).normal(size=32)

    return lambda texts: np.array([sum(map(vector, t.split()), np.full(32, 0.1)) for t in texts])


def test_a_reader_that_hears_opposites_and_one_that_does_not(evidence, monkeypatch):
    monkeypatch.setattr(meaning, "_rewrite", lambda *a: {})
    texts = ["A good old story", "It was a big house", "the small dog", "a bad day", "the large ship",
             "a young man who buys it", "hot coffee", ""]
    changes = [(t[c.start : c.end], c) for t in texts for c in wordnet.reverse_claims(t)[1]]
    assert len(changes) >= 7
    neutral = {c.neutral: word for word, c in changes if c.end > c.start}
    deaf = neutral | {c.opposite: word for word, c in changes}

    def margin(same):
        # One way only: a word of one text may be the opposite of another's.
        canonical = {w: min(group) for group in groups(same) for w in group}
        ev = read_by(evidence, word_reader(canonical), texts)
        return {f.name: f for f in meaning.meaning(ev)}

    got = margin(deaf)
    assert got["opposite_margin"].value == pytest.approx(0, abs=1e-6) == got["moved_opposite"].value
    got = margin(neutral)
    assert got["opposite_margin"].value > 0.1 and got["opposite_margin"].low > 0
    assert got["moved_opposite"].value > 0.1 and got["moved_control"].value == pytest.approx(0, abs=1e-6)
    assert got["opposite_margin_frozen"].low > 0
    # AV says the opposite of what this reader would hear in the true words.
    reader = word_reader({w: min(group) for group in groups(neutral) for w in group})
    said = [wordnet.reverse_claims(t)[0] for t in texts]
    lies = read_by(evidence, reader, said, h=np.asarray(reader(texts), np.float32))
    assert {f.name: f for f in meaning.meaning(lies)}["opposite_margin_frozen"].high < 0


def groups(same: dict) -> list[set]:
    """Words that are joined by `same`, directly or not."""
    out = []
    for pair in same.items():
        touched = [g for g in out if g & set(pair)]
        out = [g for g in out if not g & set(pair)] + [set(pair).union(*touched)]
    return out


def test_counterfactual_of_an_oracle_is_one(evidence, monkeypatch):
    """Explanations that are the texts themselves, and an AR that is the target."""
    monkeypatch.setattr(meaning, "_rewrite", lambda *a: {})
    ev = read_by(evidence, lambda texts: capture_texts.capture_last(evidence.runner, texts)[:, 0], SOURCES)
    got = {f.name: f for f in meaning.meaning(ev)}
    assert got["counterfactual_cos"].value == pytest.approx(1, abs=1e-4)
    assert got["counterfactual_cos"].n == got["counterfactual_cos_random"].n > 4
    assert got["counterfactual_cos_random"].value < 0.9 > got["counterfactual_cos_mismatch"].value
    # An AR that says the same of everything does not move with the target.
    fixed = read_by(ev, lambda texts: np.ones((len(texts), 32)), SOURCES, h=ev.columns["h"])
    got = {f.name: f.value for f in meaning.meaning(fixed)}
    assert got["counterfactual_cos"] == 0 == got["moved_opposite"]


def test_capture_is_the_targets_own(evidence, nla):
    got = capture_texts.capture_last(evidence.runner, SOURCES)[:, 0]
    for i in (0, 3):
        np.testing.assert_allclose(got[i], nla.capture(SOURCES[i])[-1], rtol=1e-4, atol=1e-4)


def test_what_is_swapped():
    swaps = meaning.make_swaps(EXPLANATIONS, SOURCES, OK)
    assert swaps == meaning.make_swaps(EXPLANATIONS, SOURCES, OK) and len(swaps) >= 5 and 7 not in swaps
    assert swaps != meaning.make_swaps(EXPLANATIONS, SOURCES, OK, 1)
    for i, s in swaps.items():
        pairs = list(zip(SOURCES[i].split(), s.source.split(), s.another.split(), strict=True))
        (old, new, another), = {p for p in pairs if p[0] != p[1] and not p[0].startswith("a")}
        assert len({old, new, another}) == 3 and len(old) >= 4
        assert old[0].isupper() == new[0].isupper() == another[0].isupper()
        assert new not in SOURCES[i] and any(new in t for t in SOURCES)
        assert old in EXPLANATIONS[i] and new in s.explanation and old not in s.explanation.split()
    # The word must stand near the end of the source.
    far = [f"{t} {'very ' * meaning.TAIL}" for t in SOURCES]
    assert meaning.make_swaps(EXPLANATIONS, far, OK) == {}
    assert (
        meaning._replace_word("an old car, cars", wordnet.content_words("old")[0], "new") == "a new car, cars"
    )


def test_nothing_to_edit(evidence, figures):
    trip = dataclasses.replace(evidence.trip, explanations=[""] * 8, ok=np.zeros(8, bool))
    got = {f.name: f.value for f in meaning.meaning(dataclasses.replace(evidence, trip=trip))}
    paraphrases = {f"fve_paraphrase{how}" for how in ("", "_kept_quotes", "_half")}
    assert set(got) == paraphrases | {"lost_paraphrase", "paraphrased"}
    assert got["fve_paraphrase"] == got["fve_paraphrase_half"] < 0 == got["paraphrased"]
    assert set(got) < set(figures)


def test_rows_that_the_paraphraser_could_not_do_are_left_out(evidence):
    some = dataclasses.replace(evidence, paraphraser=lambda texts: [None, *texts[1:-1], None], left_out=[])
    got = {f.name: f for f in meaning.meaning(some)}
    assert got["fve_llm_paraphrase"].n == got["lost_llm_paraphrase"].n == 6
    assert got["lost_llm_paraphrase"].value == 0.0
    assert some.left_out == ["fve_llm_paraphrase of 2 rows: the paraphraser gave nothing of use"]
    none = dataclasses.replace(evidence, paraphraser=lambda texts: [None] * len(texts), left_out=[])
    assert not {"fve_llm_paraphrase", "lost_llm_paraphrase"} & {f.name for f in meaning.meaning(none)}
    assert none.left_out == ["fve_llm_paraphrase of 7 rows: the paraphraser gave nothing of use"]


def test_a_paraphraser_that_fails(evidence):
    def offline(texts):
        raise ConnectionError("no route\nto host")

    with pytest.raises(UserError, match=r"the paraphraser failed \(no route to host\): evaluate without it"):
        meaning.meaning(dataclasses.replace(evidence, paraphraser=offline))
    with pytest.raises(UserError, match="returned 1 texts for 7: it must return one for each"):
        meaning.meaning(dataclasses.replace(evidence, paraphraser=lambda texts: texts[:1]))
