"""`nla data explain`: which texts, what is asked, what is kept, and going on after a kill."""

import json
import signal

import numpy as np
import pytest

from nla_jax.data import capture_requests, corpora, explanations
from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts
from nla_jax.providers import target_model
from tests.helpers import toys

WORDS = (8, 14)


def documents(n: int = 40, words: int = 60) -> list[corpora.Document]:
    rng = np.random.default_rng(5)
    text = lambda: " ".join("".join(rng.choice(list("aeiounrst"), 4)) for _ in range(words))
    splits = ["train", "heldout", "ood"]
    return [corpora.Document(f"doc:{i}", text(), splits[i % 3]) for i in range(n)]


def places(texts) -> list[tuple]:
    return [(d.doc_id, a, b) for d, a, b in texts]


# --- the choice of texts --------------------------------------------------------------------------


def test_texts_are_whole_words_of_the_right_number_and_do_not_overlap():
    docs = documents()
    texts = target_model.choose_texts(docs, 10_000, WORDS, seed=0)
    by_doc = {}
    for doc, a, b in texts:
        text = doc.text[a:b]
        assert WORDS[0] <= len(text.split()) <= WORDS[1] and text == text.strip()
        assert doc.text[a - 1 : a] in ("", " ") and doc.text[b : b + 1] in ("", " ")
        by_doc.setdefault(doc.doc_id, []).append((a, b))
    assert len(by_doc) == len(docs)
    for spans in by_doc.values():
        spans.sort()
        assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:], strict=False))
    assert {d.split for d, _, _ in texts} == {"train", "heldout", "ood"}


def test_the_choice_hangs_on_seed_and_document_only():
    docs = documents()
    few, many = (target_model.choose_texts(docs, n, WORDS, seed=0) for n in (20, 50))
    assert places(many)[:20] == places(few)
    assert places(target_model.choose_texts(docs[::-1], 20, WORDS, seed=0)) == places(few)
    assert places(target_model.choose_texts(docs, 20, WORDS, seed=1)) != places(few)
    assert len({d.doc_id for d, _, _ in few}) > 10


@pytest.mark.parametrize(
    "words,message",
    [
        ((0, 5), "a minimum of at least 1"),
        ((9, 5), "not below it"),
        ((100, 200), "no document of the corpus contains a text of 100 words"),
    ],
)
def test_impossible_lengths(words, message):
    with pytest.raises(UserError, match=message):
        target_model.choose_texts(documents(), 5, words, seed=0)


# --- answers, kept and dropped --------------------------------------------------------------------

GOOD = "<explanation>\n- A text about {first}.\n- It ends on {last}.\n</explanation>"
BAD = ["no tags at all", "<explanation>\na line\nand one more", "<explanation>\none line\n</explanation>"]
REASONS = {"no opening tag", "no closing tag", "too few lines"}


class Writer:
    """In place of the target: every third answer is of no use. Counts, and may die like a kill."""

    def __init__(self, die_after: int = 10**9):
        self.asked, self.batches, self.die_after = [], [], die_after

    def __call__(self, texts):
        if len(self.batches) == self.die_after:
            raise KeyboardInterrupt
        self.batches.append(len(texts))
        self.asked += places(texts)
        return [self.answer(d.text[a:b]) for d, a, b in texts]

    @staticmethod
    def answer(text):
        number = sum(text.encode())
        first, *_, last = text.split()
        return BAD[number % 3] if number % 2 else GOOD.format(first=first, last=last)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents(120)), "utf-8")
    return f"file:{path}"


def explain(monkeypatch, corpus, out, writer, n=30, batch=4, seed=0):
    monkeypatch.setattr(target_model, "_answerer", lambda *a: writer)
    monkeypatch.setattr(target_model, "_tokenizer", lambda target: toy_tokenizer())
    return target_model.run("target", corpus, out, n=n, batch=batch, words=WORDS, seed=seed)


def test_usable_answers_are_kept_in_the_schema_that_training_reads(monkeypatch, corpus, tmp_path):
    out = tmp_path / "out" / "explanations.jsonl"
    counts = explain(monkeypatch, corpus, out, Writer(), n=90)
    docs = {d.doc_id: d for d in corpora.open_corpus(corpus)}
    records = list(explanations.read(out))
    assert [r.id for r in records] == list(range(len(records)))
    for r in records:
        text = docs[r.doc_id].text[r.start : r.end]
        assert r.split == docs[r.doc_id].split
        assert r.explanation == f"A text about {text.split()[0]}.\nIt ends on {text.split()[-1]}."
    assert counts["texts"] == 90 and counts["kept"] == len(records)
    assert set(counts["dropped"]) == REASONS and counts["kept"] + sum(counts["dropped"].values()) == 90
    # `capture_requests.explanation_requests` checks every hash and the side of the held-out line.
    tok = toy_tokenizer()
    cuts = {
        s: capture_requests.explanation_requests(docs.values(), tok, s, jsonl_path=out)
        for s in ("warm", "rl", "heldout")
    }
    used = {s: counts["used"] for s, (_, counts) in cuts.items()}
    assert sum(used.values()) == len(records) and used["heldout"] > 0
    dropped = list(explanations.read(tmp_path / "out" / "explanations.jsonl.dropped"))
    assert {explanations.parse_explanation(r.explanation)[1] for r in dropped} == REASONS


def test_stopped_and_started_again_it_ends_with_the_same_files(monkeypatch, corpus, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    expected = explain(monkeypatch, corpus, whole, Writer())
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            explain(monkeypatch, corpus, parts, Writer(after))
    # The last kill came in the middle of a line.
    with open(parts, "r+b") as f:
        f.truncate(parts.stat().st_size - 20)
    last = Writer()
    assert explain(monkeypatch, corpus, parts, last) == expected
    assert parts.read_bytes() == whole.read_bytes()
    assert (tmp_path / "parts.jsonl.dropped").read_bytes() == (tmp_path / "whole.jsonl.dropped").read_bytes()
    # A batch is asked again as a whole, with the mates that it had; finished ones are left alone.
    assert len(last.asked) < 30 and last.batches[0] == 4
    again = Writer()
    assert explain(monkeypatch, corpus, parts, again) == expected and not again.asked


def test_a_draft_is_never_an_explanation(monkeypatch, corpus, tmp_path):
    writer, out = Writer(), tmp_path / "out.jsonl"
    draft, answer = GOOD.format(first="the draft", last="it"), GOOD.format(first="x", last="y")
    drafts = {0: f"<think>{draft}</think>", 1: f"{draft}[/THINK]", 2: f"<think>{draft}"}
    monkeypatch.setattr(writer, "answer", lambda text: drafts[len(text) % 3] + answer)
    counts = explain(monkeypatch, corpus, out, writer)
    assert {r.explanation for r in explanations.read(out)} == {"A text about x.\nIt ends on y."}
    assert counts["dropped"] == {"unfinished thinking": 30 - counts["kept"]} and 0 < counts["kept"] < 30


def test_texts_that_spell_a_special_token_are_not_explained(monkeypatch, tmp_path):
    docs = [d.text for d in documents(40)]
    docs[3:5] = [f"{docs[3]} <|im_end|>", f"<|im_start|> {docs[4]}"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs), "utf-8")
    out = tmp_path / "out.jsonl"
    explain(monkeypatch, f"file:{tmp_path / 'c.jsonl'}", out, Writer(), n=1000)
    seen = {r.doc_id for r in explanations.read(out)} | {
        r.doc_id for r in explanations.read(tmp_path / "out.jsonl.dropped")}
    assert len(seen) == 38 and not seen & {"file:c.jsonl:3", "file:c.jsonl:4"}


def test_more_texts_later_only_add(monkeypatch, corpus, tmp_path):
    out = tmp_path / "out.jsonl"
    explain(monkeypatch, corpus, out, Writer(), n=12)
    first, more = out.read_text("utf-8"), Writer()
    assert explain(monkeypatch, corpus, out, more, n=20)["texts"] == 20
    assert out.read_text("utf-8").startswith(first)
    assert sum(more.batches) == 8


@pytest.mark.parametrize("wrong", [dict(n=0), dict(batch=0), dict(max_new=0), dict(temperature=-0.1)])
def test_settings_that_leave_nothing_to_do(wrong, corpus, tmp_path):
    settings = dict(n=1, batch=1, max_new=1, temperature=0.5) | wrong
    with pytest.raises(UserError, match="must be at least 1, the temperature at least 0"):
        target_model.run("target", corpus, tmp_path / "o.jsonl", **settings)


def test_a_directory_is_no_output_file(corpus, tmp_path):
    with pytest.raises(UserError, match="is a directory: name a .jsonl file"):
        target_model.run("target", corpus, tmp_path, n=1)


# --- the target's own answers ---------------------------------------------------------------------


def toy_tokenizer():
    from nla_jax import toy

    return toy.tokenizer()


@pytest.fixture(scope="module")
def asked(toy_world):
    """(texts, a function from batch size and texts to the toy target's answers)."""
    docs = corpora.open_corpus(f"file:{toy_world / 'corpus.jsonl'}")
    target, answerers = str(toy_world / "target"), {}

    def ask(batch, texts):
        if batch not in answerers:
            answerers[batch] = target_model._answerer(target, 40, 0.7, 0, "float32", batch)
        return answerers[batch](texts)

    return target_model.choose_texts(docs, 12, (12, 24), seed=0), ask


def test_an_answer_does_not_depend_on_its_batch(asked):
    texts, ask = asked
    whole = ask(12, texts)
    assert ask(12, texts[::-1]) == whole[::-1]
    assert ask(12, texts[9:]) == whole[9:]
    assert ask(2, texts[:2]) == whole[:2]


def test_the_toy_target_can_explain(asked):
    texts, ask = asked
    parsed = [explanations.parse_explanation(a) for a in ask(12, texts)]
    assert sum(reason == "ok" for _, reason in parsed) >= 10
    assert all("story about" in e for e, reason in parsed if reason == "ok")


def test_prompts_that_do_not_fit_the_target(toy_world, tmp_path):
    target, corpus = str(toy_world / "target"), f"file:{toy_world / 'corpus.jsonl'}"
    with pytest.raises(UserError, match="and an answer of 400 do not fit the 512 positions"):
        target_model.run(target, corpus, tmp_path / "o.jsonl", n=2, max_new=400, words=(12, 24))


def test_the_prompt_is_the_instruction_through_the_chat_template():
    tok = toy_tokenizer()
    ids = chat_prompts.chat_ids(tok, explanations.instruction("The king walked to the tower."))
    said = tok.decode(ids)
    assert said.startswith("<|im_start|>user\nBelow is the beginning of a text")
    assert said.endswith("<text>\nThe king walked to the tower.\n</text><|im_end|>\n<|im_start|>assistant\n")


def test_the_command_killed_and_started_again_ends_with_the_same_file(toy_world, tmp_path):
    die_in_second_batch = """
import os, signal
from nla_jax.data import explanations
append, calls = explanations.append, []
def fatal(*args):
    calls.append(append(*args))
    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)
explanations.append = fatal"""

    def command(out, code=""):
        size = ["--n", 8, "--batch", 4, "--min-words", 12, "--max-words", 24, "--max-new", 40]
        where = ["--target", toy_world / "target", "--corpus", f"file:{toy_world / 'corpus.jsonl'}"]
        return toys.start(toy_world, ["data", "explain", *where, "--out", out, *size], code)

    killed, alone = tmp_path / "killed.jsonl", tmp_path / "alone.jsonl"
    process = command(killed, die_in_second_batch)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    told = toys.finish(command(killed))
    assert '"texts": 8' in told and "Traceback" not in told
    toys.finish(command(alone))
    assert killed.read_bytes() == alone.read_bytes()
    assert len(list(explanations.read(alone))) > 4
