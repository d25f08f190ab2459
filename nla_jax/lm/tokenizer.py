"""Functions on a `transformers` fast tokenizer."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from nla_jax.errors import UserError, one_line, short_repr
from nla_jax.lm.files import gguf_tokenizer
from nla_jax.lm.files.gguf import open_gguf
from nla_jax.lm.special_tokens import TURN_ENDS, break_special, special_pattern

MARKER_BLOCK = range(0x3200, 0x3400)  # enclosed CJK and CJK compatibility, which are rare in texts
CJK_BLOCK = range(0x4E00, 0xA000)  # CJK unified ideographs, if MARKER_BLOCK has no marker
# Its ids tell tokenizers of one vocabulary apart by how they treat case, accents, spaces, digits and bytes.
SPECIMEN = (
    "The reviewer's 3,141 notes (2019-2024) weren't READ;  they\u2019re in\tHTMLParser2::feed_all().\r\n\n"
    " \u00c9cole na\u00efve e\u0301tude \ufb01ne \u4f60\u597d\u3001\u4e16\u754c "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f469\u200d\U0001f52c \u2211x\u00b2 == 1e-5 || 0xFF\n    return None"
)


def load(path):
    """Load the tokenizer of a GGUF file or of a directory in Hugging Face layout.

    Raises UserError if there is none, or if the tokenizer cannot be rebuilt from a GGUF file's metadata.
    In the latter case use the model's directory.
    """
    path = Path(path)
    tok = _from_directory(path) if path.is_dir() else _from_gguf(path)
    _keep_spaces_in_spans(tok)
    return tok


def save(tok, directory) -> None:
    """Write tokenizer.json, its configuration and the chat template, for `load(directory)`."""
    tok.save_pretrained(str(directory))


def check_vocabulary(tok, size: int) -> None:
    """Raise UserError if the tokenizer has an id that a model with this vocabulary does not have.

    Such an id has no embedding: all tokens of its row would be NaN. Ids may have gaps, so that the number of
    tokens does not show it.
    """
    vocab = tok.get_vocab()
    token = max(vocab, key=vocab.get)
    if vocab[token] >= size:
        raise UserError(
            f"the tokenizer gives {token!r} the id {vocab[token]}, and the model's vocabulary ends at "
            f"{size - 1}: use the model's own tokenizer"
        )


def plain_ids(tok, text: str) -> list[int]:
    """Return the ids of a text without the special tokens that the tokenizer adds around it."""
    return tok(text, add_special_tokens=False, verbose=False)["input_ids"]


def raw_ids(tok, text: str) -> list[int]:
    """Return the ids of a whole prompt, with special tokens (BOS if the family has one)."""
    return tok(text, add_special_tokens=True, verbose=False)["input_ids"]


def all_plain_ids(tok, texts: list[str]) -> list[list[int]]:
    """Return `plain_ids` of many explanations, computed on all cores.

    A special token that an explanation spells is read as text: only our code may put one there.
    """
    how = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
    return tok(texts, **how)["input_ids"] if texts else []


def all_raw_ids(tok, texts: list[str], template: str = "{explanation}") -> list[list[int]]:
    """Return `raw_ids` of a template around many explanations, computed on all cores.

    A special token that an explanation spells is read as text. In a template it is a token; beside such
    a token, a space is put into those that explanations spell.
    """
    control = bool(special_pattern(tok).search(template))
    texts = [break_special(tok, text) for text in texts] if control else texts
    prompts = [template.replace("{explanation}", text) for text in texts]
    how = dict(add_special_tokens=True, split_special_tokens=not control, verbose=False)
    return tok(prompts, **how)["input_ids"] if texts else []


def inner_ids(tok, text: str) -> list[int]:
    """Return the ids of a text inside another text, without the space that some tokenizers prepend.

    The tokenizers of Llama 2 and Mistral read "a" as " a". After a line break they add no space, so the
    text is tokenised after one, whose own ids are removed. Raises UserError if they merge.
    """
    return _inner_ids(tok, [text], lambda texts: [plain_ids(tok, t) for t in texts])[0]


def batch_ids(tok, texts: list[str]) -> list[list[int]]:
    """Return `inner_ids` of many explanations; special tokens that they spell are read as text."""
    return _inner_ids(tok, texts, lambda texts: all_plain_ids(tok, texts))


def _inner_ids(tok, texts: list[str], tokenize: Callable) -> list[list[int]]:
    first = tok.convert_ids_to_tokens(plain_ids(tok, "a"))[:1]
    spaced = first and first[0][0] in (gguf_tokenizer.SPACE, "\u0120")  # the byte-level space
    guard = plain_ids(tok, "\n") if spaced else []
    guarded = ["\n" + text for text in texts] if spaced else list(texts)
    found = tokenize(guarded)
    for text, ids in zip(texts, found, strict=True):
        if ids[: len(guard)] != guard:
            raise UserError(f"the tokenizer merges {text!r} with a line break before it: choose another text")
    return [ids[len(guard) :] for ids in found]


def lead_ids(tok) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before every text: beginning of text, or nothing.

    Raises UserError if the tokenizer does more than that.
    """
    plain, whole = plain_ids(tok, "a"), raw_ids(tok, "a")
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at])
    raise UserError(
        f"this tokenizer reads 'a' as {plain} alone and as {whole} with its special tokens: it "
        "does more than put tokens before and after a text; use another tokenizer.json"
    )


def offsets(tok, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids without special tokens and, for each, its (start, end) in characters of `text`.

    `text[:end]` is the text up to and including that token. If one character is split into several
    tokens, each of them has the span of the whole character.
    """
    out = tok(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], [tuple(span) for span in out["offset_mapping"]]


def eos_ids(tok) -> list[int]:
    """Return the sorted ids that end an assistant turn: EOS, end of turn, end of text.

    Raises UserError if the tokenizer has none, because no answer would then end.
    """
    vocab = tok.get_vocab()
    ends = {vocab[name] for name in TURN_ENDS if name in vocab}
    if tok.eos_token_id is not None:
        ends.add(tok.eos_token_id)
    if not ends:
        raise UserError(
            "the target's tokenizer has no token that ends an answer (no eos_token, and none of "
            f"{', '.join(TURN_ENDS)}): set eos_token in its tokenizer_config.json, or use an "
            "instruction-tuned model"
        )
    return sorted(ends)


def find_marker(tok) -> tuple[str, int]:
    """Return the marker, the character at the activation's position in a prompt, and its token id.

    The marker must be one token, alone and between `<concept>` and `</concept>`. It is the first such
    character of U+3200-33FF. Small vocabularies have none there: then it is the CJK ideograph
    (U+4E00-9FFF) with the highest id, because rare tokens of a BPE vocabulary have high ids.
    Raises UserError if neither block has one.
    """
    for code in MARKER_BLOCK:
        if (id := _single(tok, chr(code))) is not None:
            return chr(code), id
    found = [(id, chr(c)) for c in CJK_BLOCK if (id := _single(tok, chr(c))) is not None]
    if found:
        id, char = max(found)
        return char, id
    raise UserError(
        "no character of U+3200-33FF or U+4E00-9FFF is a single token of this tokenizer: "
        "set config.marker to a character that is one"
    )


def _single(tok, char: str) -> int | None:
    ids = inner_ids(tok, char)
    if len(ids) != 1 or ids[0] == tok.unk_token_id or tok.decode(ids) != char:
        return None
    around = inner_ids(tok, f"<concept>{char}</concept>")
    return ids[0] if around.count(ids[0]) == 1 else None


def fingerprint(tok) -> str:
    """Return a short hash of a tokenizer's vocabulary, merges, ends and ids of `SPECIMEN`.

    It does not depend on how the files are written.
    """
    model = json.loads(tok.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else []  # of a unigram model
    ends = (eos_ids(tok), tok.eos_token_id)
    parts = (sorted(tok.get_vocab().items()), merges, scores, ends, raw_ids(tok, SPECIMEN))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _transformers():
    # Without torch, transformers prints advice on import. We use its tokenizers only.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _from_directory(path: Path):
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json: save the model's fast tokenizer there")
    try:
        return _transformers().PreTrainedTokenizerFast.from_pretrained(str(path), verbose=False)
    except Exception as err:  # tokenizers raises bare Exception for a malformed file
        raise UserError(f"cannot read the tokenizer in {path}: {one_line(err)}") from err


def _from_gguf(path: Path):
    meta = open_gguf(path).meta
    core, special = gguf_tokenizer.build(meta, path)
    tok = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        **special,
    )
    template = meta.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{path}: its chat template is {short_repr(template)}; use the model's directory")
    tok.chat_template = template
    return tok


def _keep_spaces_in_spans(tok) -> None:
    """Make a byte-level post-processor keep spaces in spans, because spans must cover every character."""
    core = tok.backend_tokenizer
    if core.post_processor is None:
        return
    from tokenizers import processors

    state = json.loads(core.post_processor.__getstate__())
    if state["type"] == "ByteLevel":
        core.post_processor = processors.ByteLevel(trim_offsets=False)
