"""Prompts as each family's template renders them: the same ids as in transformers, in one step."""

import dataclasses
import json

import numpy as np
import pytest
import transformers

from nla_jax import prompts, reconstructor, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import released
from tests.helpers.vocabularies import KINDS, MARKER, TEMPLATES, reference, write_gguf

MESSAGE = f"  Say what <concept>{MARKER}</concept> is,\n\nin English. \n"
BARE = MESSAGE.strip()
# What a person would write down for each template: the whole prompt as text.
RENDERED = {
    "llama 2": f"<s>[INST] {BARE} [/INST]",
    "llama 3": f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{BARE}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": f"<s>[INST] {MESSAGE} [/INST]",
    "qwen 2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    f"<|im_end|>\n<|im_start|>user\n{MESSAGE}<|im_end|>\n<|im_start|>assistant\n",
    "qwen 3": f"<|im_start|>user\n{MESSAGE}<|im_end|>\n<|im_start|>assistant\n",
    "gemma 2 and 3": f"<bos><start_of_turn>user\n{BARE}<end_of_turn>\n<start_of_turn>model\n",
}
# Classes of transformers that read such a directory; the others read its tokenizer.json as it is.
CLASSES = {"qwen2": "Qwen2Tokenizer", "gemma": "GemmaTokenizer"}
EXPLANATIONS = ["Ends on a comma.", "x", "  two  spaces,\nlines\n\nand 123 " + "more " * 40, f"号 {MARKER} é"]


@dataclasses.dataclass(frozen=True)
class Read:
    template: str
    kind: str
    theirs: object  # what transformers makes of the directory
    ours: object


CASES = [(template, source) for template in TEMPLATES for source in ("directory", "gguf")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def read(request, tmp_path_factory):
    template, source = request.param
    kind, text = TEMPLATES[template]
    folder = tmp_path_factory.mktemp("templates")
    published = transformers.PreTrainedTokenizerFast(
        tokenizer_object=reference(kind).backend_tokenizer, chat_template=text,
        **{f"{k}_token": getattr(reference(kind), f"{k}_token") for k in ("bos", "eos", "pad", "unk")},
        clean_up_tokenization_spaces=False,
    )
    published.save_pretrained(folder)
    if kind in CLASSES:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": CLASSES[kind]}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == CLASSES.get(kind, "TokenizersBackend")
    path = folder if source == "directory" else write_gguf(folder / "m.gguf", kind, text)
    return Read(template, kind, theirs, tok_lib.load(path))


def test_rendered_prompts(read):
    ids = chat_prompts.chat_ids(read.ours, MESSAGE)
    assert ids == read.theirs.apply_chat_template(
        [{"role": "user", "content": MESSAGE}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    rendered = RENDERED[read.template]
    assert ids == read.theirs(rendered, add_special_tokens=False)["input_ids"]
    assert "".join(read.ours.decode(ids).split()) == "".join(rendered.split())
    bos = read.ours.bos_token_id
    if KINDS[read.kind].bos:
        assert ids[0] == bos and ids.count(bos) == 1
        # The way in two steps puts BOS twice: what the one step is for.
        assert tok_lib.raw_ids(read.ours, rendered)[:2] == [bos, bos]


def test_marker_and_neighbours(read):
    tok = read.ours
    assert tok_lib.find_marker(tok) == (MARKER, read.theirs.convert_tokens_to_ids(whole(read, MARKER)))
    prompt = prompts.av_prompt(tok, prompts.AV_TEMPLATE, MARKER)
    ids = [*prompt.before, prompt.marker, *prompt.after]
    assert ids == chat_prompts.chat_ids(tok, prompts.AV_TEMPLATE.replace("{marker}", MARKER))
    assert ids.count(prompt.marker) == 1 and tok.decode([prompt.marker]) == MARKER
    around = tok.decode([prompt.before[-1], prompt.marker, prompt.after[0]])
    assert around in (f">{MARKER}<", f">{MARKER}</")
    # What is written and read back is made of the same tokens as the whole text.
    answer = prompts.OPEN + "some words" + prompts.CLOSE
    written = tok_lib.plain_ids(tok, answer)
    assert tuple(written[: len(prompt.open)]) == prompt.open
    assert tuple(written[-len(prompt.close) :]) == prompt.close
    assert tuple(written[-len(prompt.close) - len(prompt.newline) : -len(prompt.close)]) == prompt.newline
    assert prompt.end_of_turn == tok.eos_token_id and prompt.end_of_turn in prompt.eos


def whole(read, char):
    """How the vocabulary spells a character."""
    return read.theirs.convert_ids_to_tokens(tok_lib.inner_ids(read.theirs, char))[0]


def test_reconstructor_prompts(read):
    """Raw text with BOS where the family has one, padding on the right, the fixed end at the end."""
    tok, bos = read.ours, read.ours.bos_token_id
    template = prompts.ar_template_for(tok)
    prompt = prompts.ar_prompt(tok, template)
    ids_BT, valid_BT, last_B = reconstructor.rows(tok, template, EXPLANATIONS, pad=0)
    assert len({*last_B.tolist()}) > 2
    for row, valid, last, text in zip(ids_BT, valid_BT, last_B, EXPLANATIONS, strict=True):
        want = read.theirs(template.replace("{explanation}", text))["input_ids"]
        assert row[: last + 1].tolist() == want
        np.testing.assert_array_equal(valid, np.arange(len(row)) <= last)
        assert not row[last + 1 :].any()
        assert tuple(want[: len(prompt.before)]) == prompt.before
        assert prompt.after == prompt.suffix == ()
        if KINDS[read.kind].adds_bos:
            assert want[0] == bos and want.count(bos) == 1
        else:
            assert bos not in want


@pytest.mark.parametrize("text", ["Ends on a comma.", "x", 'It says "why?"', "two\n\nlines (and 123)"])
def test_what_av_writes_is_what_ar_reads(read, text):
    """The sampled ids, cut out and spliced, are those of the text: also where the last mark merged with the
    line break before the closing tag."""
    tok = read.ours
    template = prompts.ar_template_for(tok)
    av, ar = prompts.av_prompt(tok, prompts.AV_TEMPLATE, MARKER), prompts.ar_prompt(tok, template)
    ids = np.array([tok_lib.plain_ids(tok, prompts.OPEN + text + prompts.CLOSE)])
    n = np.array([ids.shape[1]])
    start, end, ok = verbalizer.parse_ids(av, ids, n, np.array([True]))
    spliced, valid, last = reconstructor.splice(ar, ids, start, end)
    want = reconstructor.rows(tok, template, [text], pad=0)
    assert bool(ok[0]) and int(last[0]) == int(want[2][0])
    assert spliced[0, : int(last[0]) + 1].tolist() == want[0][0, : int(last[0]) + 1].tolist()
    assert bool(ar.breaks) == (read.kind in ("qwen2", "llama3"))


def test_reconstructor_template(read):
    """The bare explanation, but where the tokenizer puts a space before a text (Llama 2, Mistral): there it
    comes behind a line break, so that its first word has the same tokens as in an answer."""
    tok = read.ours
    spaced = read.kind in ("llama2", "mistral")
    assert prompts.ar_template_for(tok) == ("\n{explanation}" if spaced else "{explanation}")
    if spaced:
        with pytest.raises(UserError, match="merges with the explanation's tokens"):
            prompts.ar_prompt(tok, "{explanation}")
    prompt = prompts.ar_prompt(tok, prompts.ar_template_for(tok))
    bos = [tok.bos_token_id] if KINDS[read.kind].adds_bos else []
    assert list(prompt.before) == [*bos, *(tok_lib.plain_ids(tok, "\n") if spaced else ())]


@pytest.mark.parametrize("template", [released.AR_TEMPLATE, "<text>\n{explanation} </text> <summary>"])
def test_a_template_with_a_suffix_is_read_at_its_end(read, template):
    """As in the release: what follows the explanation is the same ids, whatever the explanation."""
    tok, before = read.ours, template.split("{explanation}")[0]
    suffix = read.theirs(template.replace("{explanation}", "Some words"))["input_ids"][-1:]
    prompt = prompts.ar_prompt(tok, template, n_suffix=1)
    assert list(prompt.suffix) == suffix == list(prompt.after[-1:])
    assert list(prompt.before) == tok_lib.raw_ids(tok, before)
    ids_BT, _, last_B = reconstructor.rows(tok, template, EXPLANATIONS, pad=0)
    for row, last in zip(ids_BT, last_B, strict=True):
        assert row[last : last + 1].tolist() == suffix
    for n in (0, 1, 3):
        cut = reconstructor.splice(prompt, np.array([[7, 8, 9]]), np.array([0]), np.array([n]))
        want = [*prompt.before, *[7, 8, 9][:n], *prompt.after]
        assert int(cut[2][0]) == len(want) - 1 and cut[0][0, : len(want)].tolist() == want
        np.testing.assert_array_equal(cut[1][0], np.arange(cut[0].shape[1]) < len(want))


ENDINGS = ["A report.\n… in the end.", "On:\n… he said:", 'So.\n… what is "this?"', "One.\n… a, b."]


@pytest.mark.parametrize("text", ENDINGS)
def test_an_ending_line_reads_the_same_by_ids_and_by_text(read, text):
    """The last word of an explanation is the read-out, also where its mark and the line break before the
    closing tag are one token (Qwen, Llama 3)."""
    tok = read.ours
    template = prompts.ar_template_for(tok)
    av, ar = prompts.av_prompt(tok, prompts.AV_TEMPLATE, MARKER), prompts.ar_prompt(tok, template)
    answer = tok_lib.plain_ids(tok, prompts.OPEN + text + prompts.CLOSE)
    ids = np.array([[*answer, *[av.pad] * 5]])
    start, end, ok = verbalizer.parse_ids(av, ids, np.array([len(answer)]), np.array([True]))
    spliced, valid, last = reconstructor.splice(ar, ids, start, end)
    want, want_valid, want_last = reconstructor.rows(tok, template, [text], pad=0)
    n = int(want_last[0]) + 1
    assert bool(ok[0]) and int(last[0]) == n - 1 and int(valid[0].sum()) == n == int(want_valid[0].sum())
    assert spliced[0, :n].tolist() == want[0, :n].tolist()
    # What is read last is the last of the words themselves.
    read_out = tok.decode(spliced[0, n - 1 : n]).strip()
    assert read_out and text.endswith(read_out)


def test_text_inside_text(read):
    """`inner_ids` of what follows a line is the rest of the whole."""
    tok, before = read.ours, "The first line.\n"
    for text in ("words", " words", "<b>", MARKER, "</explanation>"):
        both = tok_lib.plain_ids(tok, before + text)
        ids = tok_lib.inner_ids(tok, text)
        assert both[-len(ids) :] == ids and both[: -len(ids)] == tok_lib.plain_ids(tok, before)
