"""Tokenizers from the metadata of GGUF files, equal to the published tokenizer.json of each kind.

They are built from `tokenizers` parts. transformers' conversion lacks Qwen's normalisation and Llama 3's
preference for whole words, and is not part of its public interface.
"""

import dataclasses
import math
from typing import Any

from nla_jax.errors import UserError, one_line, short_repr

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # of tokenizer.ggml.token_type
SPACE = "\u2581"  # the space character of SentencePiece vocabularies
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """The pre-tokenization of byte-level BPE: a value of tokenizer.ggml.pre."""

    words: str = ""  # pattern of the pieces; merges do not cross pieces; "": GPT-2's pattern
    digits: bool = False  # every digit is a separate piece
    nfc: bool = False  # the text is normalised to NFC first
    whole: bool = False  # a piece that is in the vocabulary is one token, without merges
    bos: bool = False  # a text begins with BOS unless the file says otherwise


LLAMA3 = PreTokenizer(words=WORDS.format(digits=r"\p{N}{1,3}"), whole=True, bos=True)
PRE_TOKENIZERS = {
    "smollm": PreTokenizer(digits=True),
    "gpt-2": PreTokenizer(),
    "qwen2": PreTokenizer(words=WORDS.format(digits=r"\p{N}"), nfc=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
}
BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"  # values of tokenizer.ggml.model


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A file's tokens by id, and the type of each token."""

    tokens: list[str]
    types: list[int]

    def of_type(self, *types: int) -> list[str]:
        return [t for t, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def build(meta: dict[str, Any], where) -> tuple[Any, dict[str, str]]:
    """Build (tokenizers.Tokenizer, {"bos_token": ..., "eos_token": ...}) from a file's metadata.

    `where` is the file's name in errors. Raises UserError for an unknown kind, and for metadata that is
    missing or damaged.
    """
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    known = isinstance(pre, str) and pre in PRE_TOKENIZERS
    if kind != SENTENCE_PIECE and not (kind == BYTE_LEVEL and known):
        raise UserError(
            f"{where}: cannot rebuild a tokenizer of model {short_repr(kind)}, pre-tokenizer "
            f"{short_repr(pre)} (known: {SENTENCE_PIECE}; {BYTE_LEVEL} with {', '.join(PRE_TOKENIZERS)}); "
            "use the model's directory with tokenizer.json"
        )
    try:
        vocab = _vocabulary(meta)
        if kind == BYTE_LEVEL:
            core = _byte_level(meta, vocab, PRE_TOKENIZERS[pre])
        else:
            vocab = _respell_spaces(vocab)
            core = _sentence_piece(meta, vocab)
        _add_tokens(core, vocab)
        special = _special(meta, vocab)
        default_bos = kind == SENTENCE_PIECE or PRE_TOKENIZERS[pre].bos
        _add_bos_eos(core, meta, special, default_bos)
    except KeyError as err:
        raise UserError(f"{where}: metadata {err} is missing; use the model's directory") from err
    except Exception as err:  # tokenizers raises bare Exception for what does not fit together
        raise UserError(
            f"{where}: its tokenizer is damaged ({one_line(err)}); use the model's directory"
        ) from err
    return core, special


def _read_list(meta: dict, name: str, kinds: tuple[type, ...], length: int | None = None) -> list:
    """Return a list of the metadata. Raises KeyError if it is missing, ValueError if it is invalid."""
    found = meta[f"tokenizer.ggml.{name}"]
    if not isinstance(found, list) or not all(type(value) in kinds for value in found):
        raise ValueError(f"{name} is not a list of {kinds[0].__name__}")
    if length is not None and len(found) != length:
        raise ValueError(f"{len(found)} {name} for {length} tokens")
    return found


def _vocabulary(meta: dict) -> Vocabulary:
    tokens = _read_list(meta, "tokens", (str,))
    if not tokens:
        raise ValueError("there are no tokens")
    return Vocabulary(tokens, _read_list(meta, "token_type", (int,), len(tokens)))


def _ids(vocab: Vocabulary) -> dict[str, int]:
    ids = {token: id for id, token in enumerate(vocab.tokens)}
    if len(ids) != len(vocab.tokens):
        twice = next(t for id, t in enumerate(vocab.tokens) if ids[t] != id)
        raise ValueError(f"two tokens are spelt {short_repr(twice)}")
    return ids


def _byte_level(meta: dict, vocab: Vocabulary, cut: PreTokenizer):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in _read_list(meta, "merges", (str,))]
    if not all(len(pair) == 2 for pair in merges):
        raise ValueError("a merge is not two tokens")
    core = Tokenizer(models.BPE(vocab=_ids(vocab), merges=merges, ignore_merges=cut.whole))
    if cut.nfc:
        core.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.words:
        steps.append(pre_tokenizers.Split(Regex(cut.words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.words))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    core.decoder = decoders.ByteLevel()
    return core


def _respell_spaces(vocab: Vocabulary) -> Vocabulary:
    """Spell user-defined runs of spaces with SPACE, because converters write them as plain spaces."""
    tokens = [
        SPACE * len(token) if kind == USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(vocab.tokens, vocab.types, strict=True)
    ]
    return Vocabulary(tokens, vocab.types)


def _sentence_piece(meta: dict, vocab: Vocabulary):
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _read_list(meta, "scores", (float,), len(vocab.tokens))
    unknown = meta.get("tokenizer.ggml.unknown_token_id")
    core = Tokenizer(
        models.BPE(
            vocab=_ids(vocab),
            merges=merges_of(vocab, scores),
            unk_token=None if unknown is None else _token(vocab, unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    replace = normalizers.Replace(" ", SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if spaced else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaced:
        steps.append(decoders.Strip(content=" ", left=1))
    core.decoder = decoders.Sequence(steps)
    return core


def merges_of(vocab: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Return the merges that a SentencePiece vocabulary implies: every way to join two tokens into a third.

    Merges into user-defined tokens (runs of spaces, whose scores have no meaning) come first, then the
    others by descending score. Special, unused and byte tokens have no merges.
    """
    if any(map(math.isnan, scores)):
        raise ValueError("a score is not a number")
    apart = {UNKNOWN, CONTROL, UNUSED, BYTE}
    known = {t for t, kind in zip(vocab.tokens, vocab.types, strict=True) if kind not in apart}
    user = [kind == USER_DEFINED for kind in vocab.types]
    ranked = sorted(range(len(scores)), key=lambda id: (not user[id], -scores[id], id))
    return [
        (token[:at], token[at:])
        for token in (vocab.tokens[id] for id in ranked)
        if token in known
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]


def _add_tokens(core, vocab: Vocabulary) -> None:
    """Add the tokens that are matched in a text before normalisation."""
    from tokenizers import AddedToken

    if "" in vocab.of_type(UNKNOWN, CONTROL, USER_DEFINED):
        raise ValueError("a special token is empty")
    for add, types in ((core.add_special_tokens, (UNKNOWN, CONTROL)), (core.add_tokens, (USER_DEFINED,))):
        add([AddedToken(token, normalized=False) for token in vocab.of_type(*types)])


def _token(vocab: Vocabulary, id) -> str:
    if type(id) is not int or not 0 <= id < len(vocab.tokens):
        raise ValueError(f"there is no token {short_repr(id)}")
    return vocab.tokens[id]


def _special(meta: dict, vocab: Vocabulary) -> dict[str, str]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        f"{ours}_token": _token(vocab, meta[key])
        for ours, theirs in names.items()
        if (key := f"tokenizer.ggml.{theirs}_token_id") in meta
    }


def _add_bos_eos(core, meta: dict, special: dict[str, str], default_bos: bool) -> None:
    """Add BOS before and EOS after every text, if the file or the kind of tokenizer says so."""
    from tokenizers import processors

    first = bool(meta.get("tokenizer.ggml.add_bos_token", default_bos))
    last = bool(meta.get("tokenizer.ggml.add_eos_token", False))
    if not first and not last:
        return
    bos = [special["bos_token"]] if first else []
    eos = [special["eos_token"]] if last else []
    core.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{t}:1" for t in bos), "$B:1", *(f"{t}:1" for t in eos)],
        special_tokens=[(token, core.token_to_id(token)) for token in bos + eos],
    )
