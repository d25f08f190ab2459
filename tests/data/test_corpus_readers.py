"""Corpora of every kind of URI: what comes out, in which order, and what bad input is called."""

import collections
import gzip
import json
import random
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_jax.data import capture_requests, store_writer
from nla_jax.data import chats as chat
from nla_jax.data.corpora import Document, check, documents, open_corpus
from nla_jax.data.splits import Sample, keyed_hash
from nla_jax.errors import UserError
from tests.helpers import tiny

TEXTS = [f"document number {i} has  words\nof its own" for i in range(7)]


def lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({field: t}) + "\n" for t in texts).encode()


def zst(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def write(path, content: bytes):
    path.write_bytes(content)
    return f"file:{path}"


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending, pack", [("", bytes), (".gz", gzip.compress), (".zst", zst)])
def test_lines_packed_or_not(tmp_path, ending, pack):
    name = "x.jsonl" + ending
    docs = open_corpus(write(tmp_path / name, pack(lines())))
    assert [(d.doc_id, d.text) for d in docs] == [
        (f"file:{name}:{i}", " ".join(t.split())) for i, t in enumerate(TEXTS)
    ]


def test_parquet_and_packed_text(tmp_path):
    table = pa.table({"body": TEXTS, "key": [f"k{i}" for i in range(7)], "more": [[0.0] * 9] * 7})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    docs = open_corpus(f"file:{tmp_path}/x.parquet?field=body&id=key")
    assert [d.doc_id for d in docs] == [f"file:x.parquet:k{i}" for i in range(7)]
    assert docs[3].text == "document number 3 has words of its own"
    docs = open_corpus(write(tmp_path / "a.txt.zst", zst(b"a text")))
    assert docs == [Document("file:a.txt.zst", "a text", docs[0].split)]


def test_options_and_question_marks_of_patterns(tmp_path):
    write(tmp_path / "a1.jsonl", lines(field="body"))
    write(tmp_path / "a22.jsonl", lines(["other"]))
    assert len(open_corpus(f"file:{tmp_path}/a?.jsonl?field=body&limit=2")) == 2
    assert [d.text for d in open_corpus(f"file:{tmp_path}/a??.jsonl")] == ["other"]
    assert len(open_corpus(f"file:{tmp_path}/a?.jsonl?field=body", limit=3)) == 3


def test_a_corpus_is_read_no_further_than_it_is_used(tmp_path):
    uri = write(tmp_path / "x.jsonl", lines() + b"{damaged\n")
    assert len(list(documents(uri, limit=7))) == 7
    stream = documents(uri)
    assert next(stream).doc_id == "file:x.jsonl:0"
    with pytest.raises(UserError, match=r"x\.jsonl:8: not valid JSON"):
        list(stream)


def test_what_is_left_out_is_counted(tmp_path):
    uri = write(tmp_path / "x.jsonl", lines(["a", None, " \n", " a ", "\ud800", "b"]))
    drops = collections.Counter()
    assert [d.text for d in open_corpus(uri, drops=drops)] == ["a", "b"]
    assert drops == {"no text": 1, "empty": 1, "exact duplicate": 1, "not valid Unicode": 1}


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"text": TEXTS, "n": range(7)}), PARQUET)
PARQUET = PARQUET.getvalue().to_pybytes()


def gzipped(content: bytes) -> bytes:
    """Without the time, so that every worker collects the same test ids."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl.gz", gzipped(lines())[:-9], r"x\.jsonl\.gz: cannot be read after line \d.*copy it again"),
    ("x.jsonl.gz", b"no gzip at all", r"x\.jsonl\.gz: cannot be read after line 0"),
    ("x.jsonl.zst", zst(lines())[:-9], r"x\.jsonl\.zst: cannot be read after line"),
    ("x.jsonl.zst", b"no zstd at all", r"x\.jsonl\.zst: cannot be read after line 0"),
    ("x.jsonl", b"[" * 100_000, r"x\.jsonl:1: not valid JSON \(nested too deeply\)"),
    ("x.jsonl", b'{"text": ["a"]}\n', r'x\.jsonl:1: no string under "text"'),
    ("x.jsonl", lines() + b"\xff\n", rf"x\.jsonl: not UTF-8 text \(byte {len(lines())}, near line"),
    ("x.jsonl.gz", gzipped(lines() * 400 + b"\xff"), rf"not UTF-8 text \(byte {len(lines() * 400)}, near"),
    ("x.txt.zst", zst(b"caf\xe9 au lait"), r"x\.txt\.zst: not UTF-8 text \(byte 3, near line 1\): .*iconv"),
    ("x.jsonl", "{}".encode("utf-16"), r"x\.jsonl: not UTF-8 text \(byte 0, near line 1\)"),
    ("x.parquet", PARQUET[:-20], r"x\.parquet: damaged, or not a parquet file"),
    ("x.parquet", PARQUET[:30] + b"\xff" * 40 + PARQUET[70:], r"x\.parquet: damaged, or not a parquet file"),
    ("x.parquet", lines(), r"x\.parquet: damaged, or not a parquet file"),
    ("x.parquet.gz", gzipped(PARQUET), r"x\.parquet\.gz: neither"),
])
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as e:
        open_corpus(write(tmp_path / name, content))
    assert "\n" not in str(e.value)


def test_a_missing_column_is_named_with_those_that_there_are(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r'no column "text" \(columns: a, b\); name one with \?field=NAME'):
        open_corpus(f"file:{tmp_path}/x.parquet")
    with pytest.raises(UserError, match=r'x\.parquet, row 0: no string under "a"'):
        open_corpus(f"file:{tmp_path}/x.parquet?field=a")


@pytest.mark.parametrize("uri, message", [
    ("nwes", "unknown corpus 'nwes'"),
    ("news:x", "unknown corpus"),
    ("file:", "unknown corpus"),
    ("chat:news", "news has no conversations"),
    ("file:x.jsonl?fields=a", "unknown option 'fields'"),
    ("file:x.jsonl?limit=-1", "limit=-1: must be a number"),
    ("chat:file:x.jsonl?roles=user,robot", "roles=user,robot"),
    ("hf:a/b:train", "hf:REPO:CONFIG:SPLIT"),
    ("mix:0.7*news,file:x", "unknown corpus 'news,file:x'"),
    ("mix:news", "'news' is not WEIGHT"),
    ("mix:0*news,1*file:x", r"'0\*news' is not WEIGHT"),
    ("mix:1*mix:1*news", "is not WEIGHT"),
])
def test_impossible_uris_are_refused_without_looking(uri, message):
    with pytest.raises(UserError, match=message):
        check(uri)


# --- TFDS and the Hub -----------------------------------------------------------------------------


def dataset(directory):
    """A TFDS directory: a store of activations is one."""
    writer = store_writer.Writer(directory, 2, {})
    row = dict(position=0, n_tokens=1, next_text="", explanation="", h=np.ones(2))
    writer.write_shard("warm", 0, 1, [row | {"doc_id": f"d{i}", "text": t} for i, t in enumerate(TEXTS)])
    writer.commit()
    return directory


def test_tfds_without_tensorflow(tmp_path):
    folder = dataset(tmp_path / "store")
    docs = open_corpus(f"tfds:{folder}:warm?id=doc_id")
    assert [(d.doc_id, d.text) for d in docs] == [
        (f"tfds:store:warm:d{i}", " ".join(t.split())) for i, t in enumerate(TEXTS)
    ]
    assert open_corpus(f"tfds:{folder}:warm")[6].doc_id == "tfds:store:warm:6"
    with pytest.raises(UserError, match="cannot be read .*check its name and split"):
        open_corpus(f"tfds:{folder}:test")
    with pytest.raises(UserError, match=r'record 0: no string under "body" \(fields: .*text'):
        open_corpus(f"tfds:{folder}:warm?field=body")
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("change", [lambda b: b[: len(b) // 2], lambda b: b[:100] + b"\xff" * 40 + b[140:]])
def test_a_damaged_array_record(tmp_path, change):
    folder = dataset(tmp_path / "store")
    (shard,) = folder.glob("*.array_record*")
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(UserError, match="cannot be read"):
        open_corpus(f"tfds:{folder}:warm")


def test_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(repo, name, **options):
        asked.append((repo, name, options))
        yield {"body": "one"}
        yield {"body": b"two"}
        raise ConnectionError("the line\nis gone")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    docs = list(documents("hf:a/b:en:test?field=body&revision=v1", limit=2))
    assert [(d.doc_id, d.text) for d in docs] == [("hf:a/b:en:test:0", "one"), ("hf:a/b:en:test:1", "two")]
    assert asked == [("a/b", "en", dict(split="test", streaming=True, revision="v1"))]
    with pytest.raises(UserError, match=r"cannot be read \(ConnectionError: the line is gone\); record 2"):
        list(documents("hf:a/b?field=body"))
    assert asked[1] == ("a/b", None, dict(split="train", streaming=True, revision=None))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'nla_jax\[hf\]'"):
        list(documents("hf:a/b"))


# --- conversations --------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " what is\nthe name of the text? ", "language": "English"},
    {"role": "assistant", "content": "the name of the text is the text"},
]
SHARED = [
    {"from": "human", "value": "the user asks the assistant"},
    {"from": "gpt", "value": "of the summary"},
]


def chats(tmp_path, *conversations):
    return "chat:" + write(tmp_path / "chat.jsonl", lines(conversations, "conversation"))


def test_conversations_go_through_the_template(tmp_path):
    uri = chats(tmp_path, TURNS, SHARED)
    one, two = open_corpus(uri, tok=tiny.tokenizer())
    assert one.text == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhat is\nthe name of the text?<|im_end|>\n"
        "<|im_start|>assistant\nthe name of the text is the text<|im_end|>\n"
    )
    turns = [one.text[a:b] for a, b in one.spans]
    assert turns == ["what is\nthe name of the text?", "the name of the text is the text"]
    assert [two.text[a:b] for a, b in two.spans] == ["the user asks the assistant", "of the summary"]
    (only,) = open_corpus(f"{uri}?roles=assistant&limit=1", tok=tiny.tokenizer())
    assert [only.text[a:b] for a, b in only.spans] == ["the name of the text is the text"]
    assert only.split == one.split  # whatever the template


def test_turns_that_say_what_the_template_says():
    """Words are found where they were put, and what leads every text is left out, only that."""
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
    bare, led = tiny.tokenizer(), tiny.tokenizer(bos=True)
    led.chat_template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    bare.bos_token = tiny.SPECIAL[1]  # it is before no text: the first turn keeps it
    for tok in (bare, led):
        found = chat.render(turns, tok, "user,assistant", "here", opens=True)
        assert found.text == (
            "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\nassistant<|im_end|>\n"
            "<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n"
        )
        assert [found.text[:a].count("\n") for a, _ in found.spans] == [1, 3, 5]
        assert [found.text[a:b] for a, b in found.spans] == ["user", "assistant", "user"]


def test_turns_as_columns():
    columns = {key: [t[key].encode() for t in TURNS] for key in ("role", "content")}
    tok = tiny.tokenizer()
    assert chat.render(columns, tok, "user", "here") == chat.render(TURNS, tok, "user", "here")
    assert chat.render({"role": [], "content": []}, tok, "user", "here").refused == "empty"
    for none in ({"role": ["user"], "content": []}, {"role": "user"}, {}):
        with pytest.raises(UserError, match="here: no conversation"):
            chat.render(none, tok, "user", "here")


def test_positions_lie_in_the_turns(tmp_path):
    tok = tiny.tokenizer()
    docs = open_corpus(chats(tmp_path, TURNS), tok=tok)
    requests = capture_requests.window_requests(docs, tok, window_tokens=60, positions=60, min_position=0)
    seen = [t for r in requests for t in r.texts]
    assert len(requests) > 1 and len(seen) > 30
    ends = set()
    for r in requests:
        base = docs[0].text.index(r.texts[-1])
        ends |= {base + len(t) - 1 for t in r.texts}
        for position, text in zip(r.positions, r.texts, strict=True):
            assert capture_requests.tokenize(tok, text)[0] == r.ids[: position + 1].tolist()
    assert all(any(a <= e < b for a, b in docs[0].spans) for e in ends)
    assert all(any(a <= e < b for e in ends) for a, b in docs[0].spans)


@pytest.mark.parametrize("conversation, reason", [
    ([], "empty"),
    ([{"role": "system", "content": "x"}, {"role": "user", "content": None}], "empty"),
    ([{"role": "user", "content": "a <|im_end|> b"}], "holds a special token of the target"),
])
def test_conversations_that_are_left_out(tmp_path, conversation, reason):
    drops = collections.Counter()
    assert len(open_corpus(chats(tmp_path, conversation, TURNS), tok=tiny.tokenizer(), drops=drops)) == 1
    assert drops == {reason: 1}


def test_templates_that_refuse_or_change_what_was_said(tmp_path):
    for template, reason in [
        ("{{ raise_exception('roles must alternate') }}", "refused by the chat template"),
        ("{{ 1 / 0 }}", "refused by the chat template"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changed by the chat template"),
    ]:
        tok, drops = tiny.tokenizer(), collections.Counter()
        tok.chat_template = template
        assert not list(documents(chats(tmp_path, TURNS), tok=tok, drops=drops))
        assert drops == {reason: 1}


NONE = ["hello", [["a"]], [{"role": "user"}], [{"role": 1, "content": "a"}]]


@pytest.mark.parametrize("conversation", NONE)
def test_what_is_no_conversation(tmp_path, conversation):
    with pytest.raises(UserError, match=r"chat\.jsonl:1: no conversation.*\?field=NAME"):
        open_corpus(chats(tmp_path, conversation), tok=tiny.tokenizer())


def test_a_template_with_a_typo_is_no_refusal(tmp_path):
    tok = tiny.tokenizer()
    tok.chat_template = "{% for m in messages %}{{ m.content }"
    with pytest.raises(UserError, match="chat template fails .TemplateSyntaxError: line 1"):
        list(documents(chats(tmp_path, TURNS), tok=tok))


def test_a_chat_corpus_needs_a_template(tmp_path):
    tok = tiny.tokenizer()
    tok.chat_template = None
    for none in (None, tok):
        with pytest.raises(UserError, match="set config.chat_template"):
            open_corpus(chats(tmp_path, TURNS), tok=none)


# --- special tokens, marks of files, reasons ------------------------------------------------------


def talk(said: str, role: str = "user") -> list[dict]:
    return [{"role": role, "content": said}, {"role": "assistant", "content": "of the summary"}]


@pytest.mark.parametrize("token", [*tiny.SPECIAL, "<|reserved|>", "<end_of_turn>"])
def test_what_spells_a_special_token_is_left_out(tmp_path, token):
    """Of a plain corpus and of a chat by one rule: named ones, further ones, and every end of a turn."""
    tok, said = tiny.tokenizer(), f"of the{token}text"
    tok.add_special_tokens({"additional_special_tokens": ["<|reserved|>"]})
    tok.add_tokens(["<end_of_turn>", "<table>"])  # not special: by mistake, and on purpose
    plain = write(tmp_path / "a.jsonl", lines([said, "a <table> of the text"]))
    chat = chats(tmp_path, talk(said), talk("of the text", role=token), talk("a <table>"))
    for uri, n in ((plain, 1), (chat, 2)):
        drops = collections.Counter()
        (doc,) = open_corpus(uri, tok=tok, drops=drops)
        assert "<table>" in doc.text and drops == {"holds a special token of the target": n}
    assert len(open_corpus(plain)) == 2  # of no target


def test_special_tokens_are_never_drawn():
    """Neither in windows nor in explained texts, whoever made the document."""
    tok = tiny.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<|reserved|>"]})
    text = "of the <|reserved|> text <|im_end|> of the summary " * 4
    doc = Document("d", text.strip(), "train")
    special = {tok.convert_tokens_to_ids(t) for t in ("<|reserved|>", "<|im_end|>")}
    (window,) = capture_requests.window_requests([doc], tok, window_tokens=99, positions=99, min_position=0)
    assert special <= set(window.ids.tolist()) and len(window.positions) > 20
    assert not special & set(window.ids[list(window.positions)].tolist())


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("end, pack", [("", bytes), (".gz", gzip.compress), (".zst", zst)])
def test_files_of_another_system_read_the_same(tmp_path, end, pack):
    """A byte order mark, carriage returns, no newline at the end; and two such files joined."""
    want = [d.text for d in open_corpus(write(tmp_path / "want.jsonl", lines()))]
    windows = BOM + lines().replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    more = BOM + json.dumps({"text": "\ufeffone more"}).encode()
    docs = open_corpus(write(tmp_path / f"a.jsonl{end}", pack(windows + b"\r\n" + more)))
    assert [d.text for d in docs] == [*want, "one more"]


@pytest.mark.parametrize("end, pack", [("", bytes), (".gz", gzip.compress), (".zst", zst)])
def test_a_byte_order_mark_is_no_text(tmp_path, end, pack):
    (doc,) = open_corpus(write(tmp_path / f"a.txt{end}", pack(BOM + b"one\r\ntwo")))
    assert doc.text == "one two"
    (doc,) = open_corpus(chats(tmp_path, talk("\ufeff of the")), tok=tiny.tokenizer())
    assert doc.text.startswith("<|im_start|>user\n of the") and "\ufeff" not in doc.text


def test_a_corpus_without_documents_says_why(tmp_path):
    tok = tiny.tokenizer()
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    uri = chats(tmp_path, TURNS, SHARED, [])
    with pytest.raises(UserError, match="left out: 2 refused by the chat template, 1 empty"):
        open_corpus(uri, tok=tok)
    with pytest.raises(UserError, match="no usable document; left out: none"):
        open_corpus(write(tmp_path / "none.jsonl", b"\n"))


# --- mixtures, streams ----------------------------------------------------------------------------


def test_mixtures_keep_their_proportions(tmp_path):
    a = write(tmp_path / "a,b.jsonl", lines([f"a {i}" for i in range(90)]))
    b = write(tmp_path / "c.jsonl", lines([f"b {i}" for i in range(9)]))
    docs = open_corpus(f"mix:0.7*{a}, 0.3*{b}")
    kinds = [d.text[0] for d in docs]
    for n in range(1, len(docs) + 1):
        assert abs(kinds[:n].count("b") - 0.3 * n) <= 1
    assert kinds.count("b") == 9  # the first to end ends the mixture
    assert [d.text for d in docs if d.text[0] == "a"] == [f"a {i}" for i in range(kinds.count("a"))]
    assert open_corpus(f"mix:7*{a},3*{b}") == docs
    with pytest.raises(UserError, match=r"document id 'file:c\.jsonl:0' was already used"):
        open_corpus(f"mix:1*{b},1*{b}")


def test_a_sample_of_a_stream_does_not_depend_on_its_order():
    docs = [Document(f"d{i}", "text", "train") for i in range(50)]

    def chosen(stream, n, seed=0):
        sample = Sample(n, seed)
        for doc in stream:
            sample.add(doc)
        return sample.documents()

    some = chosen(docs, 9)
    mixed = random.Random(0).sample(docs, 50)
    assert len(some) == 9 and some == sorted(some, key=docs.index)
    assert set(chosen(mixed, 9)) == set(some) > set(chosen(docs, 4)) and chosen(docs, 0) == []
    assert chosen(docs, 60) == docs and set(chosen(docs, 9, 1)) != set(some)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 60), st.randoms(use_true_random=False))
def test_a_sample_of_so_many_characters(lengths, room, rng):
    docs = [Document(f"d{i}", "x" * n, "train") for i, n in enumerate(lengths)]
    ranks = {d: keyed_hash("doc", 0, d.doc_id) for d in docs}
    want, held = set(), 0
    for doc in sorted(docs, key=ranks.get):  # in the order of their ranks, until the first that does not fit
        held += len(doc.text)
        if held > room:
            break
        want.add(doc)
    rng.shuffle(docs)
    sample = Sample(100, 0, room)
    for doc in docs:
        sample.add(doc)
    assert set(sample.documents()) == want


def test_a_document_of_a_million_tokens_and_one_without_spaces():
    words = ["abcdefghij"[i % 10] for i in range(500_000)]  # each is two tokens
    docs = [Document("long", " ".join(words), "train"), Document("one word", "x" * 300_000, "train")]
    tok = tiny.tokenizer()
    requests = capture_requests.window_requests(docs, tok, positions=2, max_windows=20)
    assert len(requests) == 20
    assert all(len(r.ids) <= 128 for r in requests)
