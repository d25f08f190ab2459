import dataclasses
import json
import random

import numpy as np
import pytest

from nla_jax.data import capture_requests, explanations, request_batches
from nla_jax.data.capture_requests import Request
from nla_jax.data.corpora import Document, open_corpus
from nla_jax.data.splits import split_of
from nla_jax.errors import UserError

WORDS = "the quick brown fox said that 42 old dogs, who “slept”, woke at Café Noël 🙂 today".split()


@pytest.fixture(scope="module")
def tok():
    """A byte-level BPE small enough to split words and emoji into pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def docs():
    out = []
    for i in range(12):
        rng = random.Random(i)
        text = " ".join(rng.choice(WORDS) for _ in range(20 + 30 * i))
        out.append(Document(f"d{i}", text, "train"))
    return out


def as_rows(requests):
    return {
        (r.doc_id, t, p, n)
        for r in requests
        for p, t, n in zip(r.positions, r.texts, r.next_texts, strict=True)
    }


def test_window_rows_are_consistent_with_their_text(docs, tok):
    requests = capture_requests.window_requests(docs, tok, window_tokens=40, positions=4, min_position=15)
    by_id = {d.doc_id: d.text for d in docs}
    inside_word = 0
    for r in requests:
        assert len(r.ids) <= 40 and r.ids.dtype == np.int32 and 1 <= len(r.positions) <= 4
        assert min(r.positions) >= 15 and max(r.positions) < len(r.ids)
        assert list(r.positions) == sorted(set(r.positions))
        for position, text, following in zip(r.positions, r.texts, r.next_texts, strict=True):
            assert capture_requests.tokenize(tok, text)[0] == r.ids[: position + 1].tolist()
            assert text + following in by_id[r.doc_id]
            at = by_id[r.doc_id].index(text + following)
            assert at == 0 or by_id[r.doc_id][at - 1] == " "  # windows begin at a word
            inside_word += text[-1].isalnum() and following[:1].isalnum()
    assert inside_word


def test_positions_do_not_depend_on_order_or_company(docs, tok):
    settings = {"window_tokens": 40, "positions": 3, "min_position": 15, "seed": 7}
    together = as_rows(capture_requests.window_requests(docs, tok, **settings))
    assert as_rows(capture_requests.window_requests(docs[::-1], tok, **settings)) == together
    halves = [as_rows(capture_requests.window_requests(docs[i::2], tok, **settings)) for i in range(2)]
    assert halves[0] | halves[1] == together
    assert as_rows(capture_requests.window_requests(docs, tok, **settings | {"seed": 8})) != together
    few = capture_requests.window_requests(docs, tok, **settings, max_windows=5)
    assert len(few) == 5 and as_rows(few) < together
    assert as_rows(capture_requests.window_requests(docs[::-1], tok, **settings, max_windows=5)) == as_rows(
        few
    )


def test_positions_are_uniform(tok):
    docs = [Document(f"u{i}", " ".join(["fox"] * 60), "train") for i in range(300)]
    requests = capture_requests.window_requests(docs, tok, window_tokens=30, positions=5, min_position=10)
    full = [r for r in requests if len(r.ids) == 30]
    counts = np.bincount(np.concatenate([r.positions for r in full]), minlength=30)
    assert not counts[:10].any()
    expected = len(full) * 5 / 20
    assert (np.abs(counts[10:] - expected) < 5 * np.sqrt(expected)).all()


def test_next_words():
    text = "one two three four five"
    assert capture_requests.next_words(text, 3, 2) == " two three"
    assert capture_requests.next_words(text, 2, 2) == "e two three"
    assert capture_requests.next_words(text, 13, 9) == " four five"
    assert capture_requests.next_words(text, len(text)) == ""


def test_window_errors(docs, tok):
    with pytest.raises(UserError, match="must be longer than min_position"):
        capture_requests.window_requests(docs, tok, window_tokens=50, min_position=50)
    with pytest.raises(UserError, match="no window of 1 documents is longer than 100 tokens"):
        capture_requests.window_requests(docs[:1], tok, min_position=100)


@pytest.fixture(scope="module")
def news():
    return open_corpus("news")


def test_every_shipped_explanation_is_found_once(news, tok):
    counts, seen = {}, []
    for split in ("warm", "rl", "heldout"):
        requests, counts[split] = capture_requests.explanation_requests(news, tok, split)
        assert len(requests) == counts[split]["used"]
        seen += [(r.doc_id, r.texts[0]) for r in requests]
        for r in requests[:50]:
            assert r.positions == (len(r.ids) - 1,) and len(r.explanations[0].split()) > 30
            assert r.ids.tolist() == capture_requests.tokenize(tok, r.texts[0])[0]
    assert len(seen) == len(set(seen)) == 3900
    assert counts["heldout"]["used"] == 200
    assert counts["warm"]["used"] + counts["rl"]["used"] == 3700
    assert counts["warm"]["document in split rl"] == counts["rl"]["used"]


def test_cut_augmentation(news, tok):
    some = [d for d in news if split_of(d) == "heldout"]
    once, _ = capture_requests.explanation_requests(some, tok, "heldout")
    thrice, counts = capture_requests.explanation_requests(some, tok, "heldout", cuts_per_text=3, seed=1)
    assert counts["used"] == 200 and len(thrice) == 600
    assert [r.texts for r in thrice[::3]] == [r.texts for r in once]
    for original, *others in zip(thrice[::3], thrice[1::3], thrice[2::3], strict=True):
        texts = {original.texts[0], *(o.texts[0] for o in others)}
        assert len(texts) == 3
        for o in others:
            assert original.texts[0].endswith(" " + o.texts[0])
            assert o.next_texts == original.next_texts and o.explanations == original.explanations
    with pytest.raises(UserError, match="cuts_per_text=0"):
        capture_requests.explanation_requests(some, tok, "heldout", cuts_per_text=0)


def test_inner_positions_of_explained_texts(news, tok):
    """Other tokens of the second half, with the description but for its last line."""
    some = [d for d in news if split_of(d) == "heldout"]
    by_id = {d.doc_id: d.text for d in some}
    once, _ = capture_requests.explanation_requests(some, tok, "heldout", seed=1)
    four, counts = capture_requests.explanation_requests(some, tok, "heldout", positions=4, seed=1)
    again, _ = capture_requests.explanation_requests(some[::-1], tok, "heldout", positions=4, seed=1)
    other, _ = capture_requests.explanation_requests(some, tok, "heldout", positions=4, seed=2)
    assert counts["used"] == len(four) == len(once) == 200
    assert [r.positions for r in again] == [r.positions for r in four] != [r.positions for r in other]
    for r, last in zip(four, once, strict=True):
        n = len(r.ids)
        assert last.positions == (n - 1,) and r.ids.tolist() == last.ids.tolist()
        *inner, at = r.positions
        assert at == n - 1 and len(inner) == 3 and n // 2 <= inner[0] < inner[1] < inner[2] < at
        # The last row is what it is with one position.
        assert (r.texts[-1], r.next_texts[-1], r.explanations[-1]) == (
            last.texts[0], last.next_texts[0], last.explanations[0])
        assert set(r.explanations[:-1]) == {"\n".join(last.explanations[0].split("\n")[:-1])}
        start = by_id[r.doc_id].index(last.texts[0])
        for position, text, following in zip(inner, r.texts, r.next_texts, strict=False):
            assert last.texts[0].startswith(text)
            assert capture_requests.tokenize(tok, text)[0] == r.ids[: position + 1].tolist()
            assert following == capture_requests.next_words(by_id[r.doc_id], start + len(text))


def test_inner_positions_with_an_ending_line_a_short_text_or_a_short_description(tmp_path, tok):
    text = "some words of a document that is explained here and there"
    doc = Document("d", text, "train")
    path = tmp_path / "e.jsonl"

    def cut(explanation, end=None, **options):
        path.unlink(missing_ok=True)
        explanations.append(path, [explanations.record_of(0, doc, 0, end or len(text), explanation)])
        options = {"positions": 3, "warm": 1.0, **options}
        return capture_requests.explanation_requests([doc], tok, "warm", jsonl_path=path, **options)[0]

    # The ending line is no line of the description: the line before it is the one about the end.
    (r,) = cut("what\nsoon\n… and there")
    assert r.explanations == ("what", "what", "what\nsoon\n… and there")
    (r,) = cut("what\nhow\nsoon")
    assert r.explanations == ("what\nhow", "what\nhow", "what\nhow\nsoon")
    # Nothing is left to say of other tokens where the description has one line.
    for one in ("what", "what\n… and there"):
        (r,) = cut(one)
        assert r.positions == (len(r.ids) - 1,) and r.explanations == (one,)
    (r,) = cut("a\nb", end=1, positions=9)  # "s": no token is left
    assert r.positions == (0,) and r.texts == ("s",) and r.explanations == ("a\nb",)
    few = cut("a\nb", positions=3, cuts_per_text=2, max_shift_words=2)
    assert len(few) == 2 and all(r.texts[-1].endswith("there") and len(r.texts) == 3 for r in few)
    assert all(r.texts[-1].startswith(t) and text.startswith(n, text.index(r.texts[-1]) + len(t))
               for r in few for t, n in zip(r.texts, r.next_texts, strict=True))


def test_explanations_that_do_not_fit_are_refused(tmp_path, tok):
    doc = Document("d", "some words of a document that is explained here", "train")
    good = explanations.record_of(3, doc, 0, 10, "a\nb")
    path = tmp_path / "e.jsonl"

    def cut(record, docs):
        path.write_text(json.dumps(dataclasses.asdict(record)) + "\n", "utf-8")
        return capture_requests.explanation_requests(docs, tok, "warm", jsonl_path=path, warm=1.0)

    requests, counts = cut(good, [doc])
    assert counts == {"used": 1} and requests[0].texts == ("some words",)
    with pytest.raises(UserError, match="explanation 3 of .*sha256"):
        cut(dataclasses.replace(good, end=9), [doc])
    with pytest.raises(UserError, match="explanation 3 of .*sha256"):
        cut(dataclasses.replace(good, sha256=""), [doc])
    with pytest.raises(UserError, match="explanation 3 .*held-out documents must not be trained"):
        cut(good, [dataclasses.replace(doc, split="heldout")])
    with pytest.raises(UserError, match="none of the explanations in .* is about this corpus"):
        cut(good, [dataclasses.replace(doc, doc_id="other")])


def request(n_tokens, positions):
    n = len(positions)
    return Request(
        "d", np.arange(1, n_tokens + 1), positions, ("t",) * n, ("",) * n, ("",) * n
    )


def test_batches_have_few_shapes_and_keep_every_row():
    requests = [request(n, (n - 1, 0)[: 1 + n % 2]) for n in (5, 70, 64, 65, 9, 1500, 6)]
    batches = list(request_batches.batches(requests, 2, pad_id=9))
    assert [b.ids_BT.shape for b in batches] == [(2, 64), (2, 64), (2, 96), (2, 1536)]
    assert sum(len(b.requests) for b in batches) == len(requests)
    for b in batches:
        assert b.positions_BP.shape == (2, 2)
        for i, r in enumerate(b.requests):
            n = len(r.ids)
            assert b.valid_BT[i].sum() == n and b.valid_BT[i, :n].all()
            assert (b.ids_BT[i, :n] == r.ids).all() and (b.ids_BT[i, n:] == 9).all()
            assert tuple(p for p in b.positions_BP[i] if p >= 0) == r.positions
        for i in range(len(b.requests), 2):
            assert b.valid_BT[i].sum() == 1 and (b.positions_BP[i] == -1).all()


def test_captured_rows_and_shards():
    requests = [request(8, (3, 5)), request(9, (4,)), request(7, (6,))]
    batch = next(request_batches.batches(requests, 4))
    h_BPD = np.arange(4 * 2 * 3).reshape(4, 2, 3)
    got = list(request_batches.rows_of_batch(batch, h_BPD))
    assert [(r["position"], r["n_tokens"], r["h"][0]) for r in got] == [
        (3, 8, 0.0),
        (5, 8, 3.0),
        (4, 9, 6.0),
        (6, 7, 12.0),
    ]
    assert [len(g) for g in request_batches.shard(requests, 2)] == [1, 2]
    assert request_batches.shard([], 2) == []
