"""Retrieval by outside readers: the exact formulas, and figures that move when they must."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import retrieval
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.lm.tokenizer import plain_ids, raw_ids

N = 20
WORDS = (
    "river harbour engine violin winter market doctor forest planet kitchen soldier garden bridge lawyer "
    "camera desert island prison teacher rocket church dragon farmer hotel jungle"
).split()


def text(i: int) -> str:
    """Context i: words of its own among others."""
    rng = np.random.default_rng(i)
    return " ".join(["once", *rng.choice(WORDS, 6), f"the {WORDS[i]} and its {WORDS[i]} stood"])


@pytest.fixture(scope="module")
def evidence(nla, finished):
    """Rows of N documents, whose explanations quote the end of the text. The last two failed."""
    columns = store.load_columns(finished / "run" / "data", "rl")
    columns = {k: v[:N] for k, v in columns.items()}
    columns["doc_id"] = [f"d{i}" for i in range(N)]
    columns["text"] = [text(i) for i in range(N)]
    columns["next_text"] = [f" near the old {WORDS[i]} again" for i in range(N)]
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=16, label="")
    ok = np.arange(N) < N - 2
    said = [f'the {WORDS[i]} and "its {WORDS[i]} stood"' if ok[i] else "" for i in range(N)]
    trip = dataclasses.replace(trip, explanations=said, ok=ok)
    return Evidence(nla.runner, columns, trip, np.asarray(nla.mean_direction), bootstrap=200)


@pytest.fixture(scope="module")
def figures(evidence):
    return {f.name: f for f in retrieval.retrieval(evidence)}


def test_found_is_the_share_of_drawn_sets_that_are_won():
    """Against every set of rivals; a set with t ties is won one time in t + 1."""
    rng = np.random.default_rng(0)
    score = rng.integers(0, 4, (6, 7)).astype(float)
    own = rng.integers(0, 7, 6)
    rival = rng.random((6, 7)) < 0.9
    rival[np.arange(6), own] = False
    for n in (2, 3, 4):
        want = []
        for s, o, r in zip(score, own, rival, strict=True):
            sets = list(itertools.combinations(np.flatnonzero(r), n - 1))
            won = [(s[list(c)] <= s[o]).all() / (1 + (s[list(c)] == s[o]).sum()) for c in sets]
            want.append(np.mean(won))
        assert retrieval.top_probability(score, own, rival, n) == pytest.approx(want)
    # Scores that are all alike are chance; one tie counts half.
    assert retrieval.top_probability(np.zeros((1, 7)), [2], np.arange(7)[None] != 2, 4) == pytest.approx(
        1 / 4
    )
    tie = np.array([[1.0, 1.0, 0.0]])
    assert retrieval.top_probability(tie, [0], np.arange(3)[None] > 0, 3) == pytest.approx(1 / 2)


def test_likelihood_is_that_of_the_whole_text(nla):
    """Caches continued are the plain forward pass over prompt and candidate; every pair, any order."""
    tok, lm = nla.tokenizer, nla.spec.lm
    prompts = [retrieval.CONTEXT_PROMPT.replace("{explanation}", z) for z in ("on the text", "of", "")]
    candidates = [plain_ids(tok, t) for t in ("and the end of it all, as it were", " a", "no way")] + [[]]
    pairs = np.random.default_rng(0).permutation([*itertools.product(range(3), range(4)), (1, 1)])
    got = retrieval.pair_logp(nla.runner, prompts, candidates, pairs)

    @jax.jit
    def plain(ids, valid):
        return unembed(nla.base, lm, forward(nla.base, lm, embed(nla.base, lm, ids), valid)[0])

    for (p, c), value in zip(pairs, got, strict=True):
        before, ids = raw_ids(tok, prompts[p]), candidates[c]
        row = np.resize([*before, *ids, *[0] * 200], (1, 160))
        logp = jax.nn.log_softmax(plain(row, np.arange(160)[None] < len(before) + len(ids)))[0]
        want = sum(logp[len(before) - 1 + i, id] for i, id in enumerate(ids))
        assert value == pytest.approx(float(want), abs=1e-4)
    assert len(candidates[0]) > 16 and got[pairs[:, 1] == 3] == pytest.approx(0)


def test_pmi_leaves_out_what_is_likely_anyway(evidence, nla):
    """The difference of the two log-probabilities; nothing where the answer failed."""
    rows, candidates = np.array([3, N - 1]), [plain_ids(nla.tokenizer, w) for w in WORDS[:3]]
    said, which = np.indices((2, 3))
    got = retrieval.pointwise_information(evidence, retrieval.CONTEXT_PROMPT, rows, candidates, said, which)
    prompts = [
        retrieval.CONTEXT_PROMPT.replace("{explanation}", z) for z in (evidence.trip.explanations[3], "")
    ]
    logp = retrieval.pair_logp(nla.runner, prompts, candidates, list(itertools.product(range(2), range(3))))
    assert got[0] == pytest.approx(logp[:3] - logp[3:], abs=1e-5) and (got[0] != 0).all()
    assert (got[1] == 0).all()


def test_rows_are_of_different_documents(evidence):
    docs = [f"d{i // 3}" for i in range(N)]
    ev = dataclasses.replace(evidence, columns={**evidence.columns, "doc_id": docs})
    kept = np.arange(N) != 0
    rows = retrieval.rows_of_distinct_documents(ev, kept, 64)
    assert len(rows) == len({docs[i] for i in rows}) == len(set(docs)) and 0 not in rows
    assert list(rows) == list(retrieval.rows_of_distinct_documents(ev, kept, 64)) == sorted(rows)
    assert len(retrieval.rows_of_distinct_documents(ev, kept, 3)) == 3
    assert list(rows) != list(retrieval.rows_of_distinct_documents(dataclasses.replace(ev, seed=1), kept, 64))
    # Rivals among the contexts are of other documents too: 20 rows, 18 of them rivals of the first.
    got = {f.name: f for f in retrieval.by_embedder(ev)}
    assert list(got) == ["retrieval_embed_4", "retrieval_embed_16", "retrieval_embed_prose_16"]
    three = {**evidence.columns, "doc_id": [f"d{i % 3}" for i in range(N)]}
    assert retrieval.retrieval(dataclasses.replace(ev, columns=three)) == []


def test_figures(figures):
    assert list(figures) == [
        "retrieval_logp_4", "retrieval_logp_16", "retrieval_embed_4", "retrieval_embed_16",
        "retrieval_embed_prose_16", "suffix_10", "suffix_10_shuffled",
    ]
    for f in figures.values():
        assert 0 <= f.low <= f.value <= f.high <= 1 and f.n == N and f.asks, f
    assert figures["retrieval_logp_4"].reference == "chance .25"
    assert figures["suffix_10"].reference == "chance .1"
    assert figures["retrieval_logp_16"].reference == "chance .0625"


def test_the_embedder_finds_what_is_quoted(evidence, figures):
    """Whole explanations beat those without their quotes, and another document's find nothing."""
    heard = (N - 2) / N
    assert figures["retrieval_embed_16"].value > 0.8 * heard + 2 / N / 16
    # "the violin and" still names it, a bare "the" and "and" would not.
    named = [f'it is about "{z}"' if z else "" for z in evidence.trip.explanations]
    named = [z.replace('"its', "its").replace('stood"', "stood") for z in named]

    def by_embedder(said):
        trip = dataclasses.replace(evidence.trip, explanations=said)
        return {f.name: f.value for f in retrieval.by_embedder(dataclasses.replace(evidence, trip=trip))}

    got = by_embedder(named)
    assert got["retrieval_embed_16"] > 2 * got["retrieval_embed_prose_16"]
    shuffled = by_embedder([*np.roll(evidence.trip.explanations[: N - 2], 5), "", ""])
    assert shuffled["retrieval_embed_16"] < 0.2 < figures["retrieval_embed_16"].value


def test_failed_rows_are_chance_and_figures_repeat(evidence, figures):
    failed = dataclasses.replace(evidence.trip, ok=np.zeros(N, bool))
    for f in retrieval.retrieval(dataclasses.replace(evidence, trip=failed)):
        assert f.value == pytest.approx(1 / int(f.name.split("_")[1 if "suffix" in f.name else -1]))
    again = {f.name: f for f in retrieval.retrieval(evidence)}
    assert again == figures


def test_some_explanations_against_all_contexts(evidence, figures, monkeypatch):
    monkeypatch.setattr(retrieval, "ASKED", 5)
    got = {f.name: f for f in retrieval.by_logp(evidence)}
    assert list(got) == ["retrieval_logp_4", "retrieval_logp_16"]
    # The parts of the whole, each against the same rivals.
    chosen = retrieval.rows_of_distinct_documents(evidence, np.ones(N), 5)
    monkeypatch.setattr(retrieval, "ASKED", N)
    monkeypatch.setattr(Evidence, "mean", lambda self, name, values, *_, **__: np.asarray(values))
    whole = retrieval.by_logp(evidence)[0]
    assert got["retrieval_logp_4"].n == 5
    assert got["retrieval_logp_4"].value == pytest.approx(whole[chosen].mean(), abs=1e-6)
    assert figures["retrieval_logp_4"].value == pytest.approx(whole.mean())


def test_few_documents_give_no_suffix(evidence):
    columns = {**evidence.columns, "next_text": [*evidence.columns["next_text"][:10], *[""] * (N - 10)]}
    assert retrieval.suffix(dataclasses.replace(evidence, columns=columns)) == []


def test_the_right_suffix_is_found_by_a_reader_that_reads(evidence, monkeypatch):
    """With a likelihood that counts shared tokens: the own words find it, another document's do not."""

    def counting(runner, prompts, candidates, pairs, label=""):
        seen = [set(p.split("\n")[1].split()) for p in prompts]
        words = [set(runner.tok.decode(c).split()) for c in candidates]
        return np.array([len(seen[p] & words[c] & set(WORDS)) for p, c in pairs], float)

    monkeypatch.setattr(retrieval, "pair_logp", counting)
    columns = {**evidence.columns, "next_text": [f" {w}" for w in WORDS[:N]]}
    got = {f.name: f.value for f in retrieval.suffix(dataclasses.replace(evidence, columns=columns))}
    assert got["suffix_10"] == pytest.approx((N - 2) / N + 2 / N / 10)
    # The lender's own suffix is never among the choices, so that its words favour none.
    assert got["suffix_10_shuffled"] == pytest.approx(0.1)
