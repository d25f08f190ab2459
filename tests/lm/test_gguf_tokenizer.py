"""Tokenizers of GGUF files give the ids of the published ones, for every family's kind."""

import heapq
import random

import pytest

from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.special_tokens import check_text, special_tokens
from tests.helpers.vocabularies import KINDS, MARKER, SPACE, TEMPLATES, corpus, reference, write_gguf

NASTY = [
    "", " ", "  ", "\n", "\n\n\n", "\t", "\t\t x", "a", " a", "  a", "a ", "a  ",
    "   three   spaces   ", "It's 2023's 1,000,000th day:\n\n  two  spaces\tand a tab \n",
    "1 12 123 1234 12345678901234567890", "DON'T don't WE'LL we'll I'm", "  \n  \n \t\n",
    "line\r\nline\r\n\r\n", "trailing newline\n",
    "def f(x):\n    return {'a': [1, 2, 3]}  # why\n\n\nclass A:\n\tpass",
    "<html><table>\t</table></html>", "😀👍🏽🏳️‍🌈 family 👨‍👩‍👧‍👦", "日本語の文章。中文，句子！ 한국어 문장",
    "русский язык, ελληνικά, עברית, العربية", "e\u0301 é \u1e9b\u0323 ﬁ ﷽ \u0958",
    "\u200b\u200d\ufeff\u00a0\u3000", "\U0001d54f\U0010ffff", "\x00\x01\x7f\x80",
    f"x{SPACE}y{SPACE}{SPACE}z", "hahahahahaha aaaaaaaaaaaaa -----------", " unreachable",
    "unreachable words", "<|im_start|>user\nhi<|im_end|>\n", "<s>[INST] hi [/INST] yes</s>",
    "</s> <s>  <unk>", "[INST][/INST]x",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<bos><start_of_turn>user\nhi", "<end_of_turn>\n<start_of_turn>model\n",
    "<tool_call>{}</tool_call>", "<|endoftext|>", "[PAD1200]", "<0x0A>",
    f"<concept>{MARKER}</concept>", "<explanation>\nwords\n</explanation>",
    "$100 50% a+b=c; x<y>z & \"q\" 'r' `s`",
]


def texts():
    """The nasty ones, ordinary ones, and pieces of all of them in random order."""
    rng = random.Random(0)
    whole = [*NASTY, *corpus()[:40]]
    pieces = [t[i : i + rng.randint(1, 9)] for t in whole for i in range(0, len(t), 7)]
    return whole + ["".join(rng.choices(pieces, k=rng.randint(2, 12))) for _ in range(400)]


@pytest.fixture(params=list(KINDS))
def name(request):
    return request.param


@pytest.fixture
def tok(name, tmp_path):
    return tok_lib.load(write_gguf(tmp_path / "m.gguf", name))


def test_ids_and_text_are_those_of_the_published_tokenizer(name, tok):
    want = reference(name)
    for text in texts():
        ids = tok_lib.plain_ids(tok, text)
        assert ids == tok_lib.plain_ids(want, text), text
        assert tok_lib.raw_ids(tok, text) == tok_lib.raw_ids(want, text), text
        assert tok_lib.offsets(tok, text) == tok_lib.offsets(want, text), text
        assert tok.decode(ids) == want.decode(ids), text
        assert tok.decode(ids, skip_special_tokens=True) == want.decode(ids, skip_special_tokens=True)


def test_what_is_encoded_comes_back(name, tok):
    """But for what the kind's own normalisation changes."""
    for text in texts():
        if name == "qwen2" and any(c in text for c in "\u0301\u1e9b\u0323\u0958"):
            continue
        text = text if KINDS[name].model == "gpt2" else text.replace(SPACE, " ")
        special = [t for t in KINDS[name].special if t in text]
        if KINDS[name].prefix and KINDS[name].model == "llama" and (special or not text.strip("\n")):
            continue  # every piece between special tokens gets its own space
        assert tok.decode(tok_lib.plain_ids(tok, text)) == text


def test_special_tokens(name, tok):
    kind, want = KINDS[name], reference(name)
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == (kind.bos, kind.eos, kind.pad)
    assert tok_lib.eos_ids(tok) == tok_lib.eos_ids(want)
    assert tok_lib.lead_ids(tok) == ((want.bos_token_id,) if kind.adds_bos else ())
    for token in kind.special:
        assert tok_lib.inner_ids(tok, token) == [want.convert_tokens_to_ids(token)]
        assert tok.decode(tok_lib.inner_ids(tok, token), skip_special_tokens=True) == ""
    for token in kind.user:
        id = want.convert_tokens_to_ids(token)
        assert tok.convert_ids_to_tokens(id) == token
        assert tok.decode([id], skip_special_tokens=True) == token.replace(SPACE, " ")
    pads = range(len(want), len(tok))
    assert len(pads) == 3 and [tok.convert_ids_to_tokens(i) for i in pads] == [f"[PAD{i}]" for i in pads]


def test_what_files_may_leave_out(name, tmp_path):
    """Without the flags, a SentencePiece file and Llama 3 add BOS; a space prefix is the rule."""
    left_out = ("add_bos", "add_space_prefix") if KINDS[name].prefix else ("add_bos",)
    tok = tok_lib.load(write_gguf(tmp_path / "m.gguf", name, drop=left_out))
    for text in NASTY:
        assert tok_lib.raw_ids(tok, text) == tok_lib.raw_ids(reference(name), text)


@pytest.mark.parametrize("template", list(TEMPLATES))
def test_chat_template_and_saving(template, tmp_path):
    name, text = TEMPLATES[template]
    tok = tok_lib.load(write_gguf(tmp_path / "m.gguf", name, text))
    assert tok.chat_template == text
    tok_lib.save(tok, tmp_path / "saved")
    again = tok_lib.load(tmp_path / "saved")
    for text in NASTY:
        assert chat_prompts.chat_ids(again, text) == chat_prompts.chat_ids(tok, text)
        assert tok_lib.raw_ids(again, text) == tok_lib.raw_ids(tok, text)
        assert tok_lib.offsets(again, text) == tok_lib.offsets(tok, text)
    assert tok_lib.eos_ids(again) == tok_lib.eos_ids(tok)


def sentence_piece(pieces: dict[str, float], text: str) -> list[str]:
    """SentencePiece's own rule: join the neighbours with the best score, the leftmost first."""
    symbols = list(text)
    while True:
        joined = [
            (-pieces[a + b], i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in pieces
        ]
        if not joined:
            return symbols
        _, i = heapq.nsmallest(1, joined)[0]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_derived_merges_do_what_sentence_piece_does(name, tmp_path):
    tok = tok_lib.load(write_gguf(tmp_path / "m.gguf", name))
    kind = KINDS[name]
    first = len(kind.special) + len(kind.user) + 256
    by_id = tok.convert_ids_to_tokens(range(len(tok) - 3))
    pieces = {token: float(first - id) for id, token in enumerate(by_id) if id >= first}
    known = 0
    for text in texts():
        text = "".join(c for c in text if c in pieces or c == " ")
        if any(t in text for t in (*kind.special, *kind.user, "  ")):
            continue
        spaced = (SPACE if kind.prefix and text else "") + text.replace(" ", SPACE)
        assert tok.convert_ids_to_tokens(tok_lib.plain_ids(tok, text)) == sentence_piece(pieces, spaced)
        known += len(text)
    assert known > 5000


def edited(monkeypatch, path, **changes):
    """`tokenizer.load` of `path` with other metadata; None leaves a key out."""
    import dataclasses

    file = tok_lib.open_gguf(path)
    meta = file.meta | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    meta = {key: value for key, value in meta.items() if value is not None}
    monkeypatch.setattr(tok_lib, "open_gguf", lambda _: dataclasses.replace(file, meta=meta))
    try:
        return tok_lib.load(path)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen2", dict(pre="tekken"), "pre-tokenizer 'tekken'.*qwen2.*model's directory"),
        ("qwen2", dict(pre=None), "pre-tokenizer None"),
        ("llama2", dict(model="bert"), "model 'bert'"),
        ("llama2", dict(model=["llama"]), r"model \['llama'\]"),
        ("llama2", dict(scores=None), "tokenizer.ggml.scores' is missing"),
        ("llama2", dict(scores=[0.0]), "1 scores for"),
        ("gemma", dict(scores=[float("nan")] * 1203), "scores for|not a number"),
        ("gemma", dict(tokens=[]), "no tokens"),
        ("gemma", dict(token_type=None), "token_type' is missing"),
        ("llama3", dict(merges=None), "merges' is missing"),
        ("llama3", dict(merges=["a b c"]), "a merge is not two tokens"),
        ("llama3", dict(merges=["nowhere tobefound"]), "damaged"),
        ("llama3", dict(bos_token_id=10**9), "no token 1000000000"),
        ("llama3", dict(bos_token_id=None), "'bos_token' is missing"),
        ("qwen2", dict(eos_token_id=-1), "no token -1"),
        ("qwen2", dict(tokens=5), "tokens is not a list of str"),
    ],
)
def test_damaged_metadata(name, changes, named, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", name)
    with pytest.raises(UserError, match=named) as err:
        edited(monkeypatch, path, **changes)
    assert str(path) in str(err.value) and "\n" not in str(err.value)


def test_two_tokens_of_one_spelling(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "qwen2")
    tokens = tok_lib.open_gguf(path).meta["tokenizer.ggml.tokens"]
    with pytest.raises(UserError, match="two tokens are spelt '!'"):
        edited(monkeypatch, path, tokens=["!"] * 2 + tokens[2:])


def test_end_of_text_after_every_text(tmp_path, monkeypatch):
    tok = edited(monkeypatch, write_gguf(tmp_path / "m.gguf", "llama2"), add_eos_token=True)
    plain = tok_lib.plain_ids(tok, "words")
    assert tok_lib.raw_ids(tok, "words") == [tok.bos_token_id, *plain, tok.eos_token_id]


@pytest.mark.parametrize("source", ["file", "directory"])
def test_special_tokens_that_an_explanation_spells_are_text(name, source, tok, tmp_path):
    if source == "directory":
        tok_lib.save(reference(name), tmp_path / "saved")
        tok = tok_lib.load(tmp_path / "saved")
    special, lead = special_tokens(tok), list(tok_lib.lead_ids(tok))
    assert set(KINDS[name].special) <= special.keys()
    texts = [f"a {token} b{token}" for token in KINDS[name].special]
    plain, inner = tok_lib.all_plain_ids(tok, texts), tok_lib.batch_ids(tok, texts)
    for text, ids, within, whole in zip(texts, plain, inner, tok_lib.all_raw_ids(tok, texts), strict=True):
        assert whole == [*lead, *ids] and tok.decode(ids, skip_special_tokens=True) == text
        assert not set(ids) & set(special.values()) and not set(within) & set(special.values())
        # What a chat template rendered has the tokens, before and after.
        assert len(set(tok_lib.plain_ids(tok, text)) & set(special.values())) == 1
        # The template's token is a token; the explanation's is text.
        control = KINDS[name].special[-1]
        (ids,) = tok_lib.all_raw_ids(tok, [text], "{explanation}" + control)
        assert [i for i in ids[len(lead) :] if i in special.values()] == [special[control]]
    with pytest.raises(UserError, match="spells .* special token of the target.*: change its spelling, or x"):
        check_text(tok, texts[0], "x")
    check_text(tok, "a <table> </explanation> b", "x")
