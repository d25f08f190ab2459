"""The line that ends every explanation: the last words of the text, bare, behind an ellipsis.

AR reads an explanation at its last token. Where the words of the text end there, the target's own computation
already brings AR near h (docs/method.md). The line is made by code from the text itself, so reading lessons
need no language model and never run out: any token of any document gives one.
"""

from collections.abc import Sequence

import numpy as np

from nla_jax.lm import tokenizer as tok_lib

MARK = "…"


def last_words(text: str, n: int) -> str:
    """The last n words of `text` joined by single spaces; a word that is cut short stays so."""
    return " ".join(text.split()[-n:])


def quote_words(text: str, n: int) -> str:
    """The ending line with the last n words of `text`; "" for a text without words."""
    return _line(last_words(text, n))


def quote_ends(tok, texts: Sequence[str], most: int, ids: dict[str, list[int]] | None = None) -> list[str]:
    """Of each text the ending line with as many last words as have at most `most` tokens. Of a last word
    that has more, such as an address or a sentence of a script without spaces, its end.

    ids: the tokens of words that were met before; new words are added. It saves a third of the time.
    """
    ids = {} if ids is None else ids
    tails = [text.split()[-most:] for text in texts]
    words = sorted({word for tail in tails for word in tail} - ids.keys())
    ids |= zip(words, tok_lib.batch_ids(tok, [f" {word}" for word in words]), strict=True)
    out = []
    for tail in tails:
        n = int(np.sum(np.cumsum([len(ids[word]) for word in reversed(tail)]) <= most))
        said = tail[len(tail) - n :] if n else [_end_of(tok, word, ids[word], most) for word in tail[-1:]]
        out.append(_line(" ".join(said)))
    return out


def split_end(explanation: str) -> tuple[str, str]:
    """(description, the words of the ending line); ("", words) or (description, "") where one is missing."""
    description, _, last = explanation.rpartition("\n")
    if last.startswith(MARK):
        return description, last.removeprefix(MARK).strip()
    return explanation, ""


def join_end(description: str, line: str) -> str:
    """An explanation of these lines of description and this ending line; an ending line that the
    description has already is replaced."""
    description = split_end(description)[0] if line else description
    return "\n".join(filter(None, (description, line)))


def _line(words: str) -> str:
    """The ending line with these words: verbatim but for our own tags, which would end it early."""
    for name in ("explanation>", "/explanation>"):
        words = words.replace(f"<{name}", f"< {name}")
    return f"{MARK} {words}" if words else ""


def _end_of(tok, word: str, ids: list[int], most: int) -> str:
    """The part of a word that its last tokens spell; the word where they do not spell its end."""
    end = tok.decode(ids[-most:]).strip(" \ufffd")  # the first token may begin inside a character
    return end if end and word.endswith(end) else word
