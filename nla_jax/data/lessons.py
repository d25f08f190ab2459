"""The ending line of every explanation: an ellipsis and the last words of the text, verbatim.

AR reads an explanation at its last token. If the last words of the text end there, the target's own
computation already brings AR near h (docs/method.md). Code makes the line from the text, so reading lessons
need no language model: every token of every document gives one.
"""

from collections.abc import Sequence

import numpy as np

from nla_jax.lm import tokenizer as tok_lib

MARK = "…"


def last_words(text: str, n: int) -> str:
    """Return the last n words of `text`, joined by single spaces; the last word may be incomplete."""
    return " ".join(text.split()[-n:])


def quote_words(text: str, n: int) -> str:
    """Return the ending line with the last n words of `text`; "" for a text without words."""
    return _line(last_words(text, n))


def quote_ends(tok, texts: Sequence[str], most: int, ids: dict[str, list[int]] | None = None) -> list[str]:
    """Return each text's ending line with as many last words as fit into `most` tokens.

    A last word that has more tokens, such as a URL or a sentence without spaces, gives its end.

    ids: a cache of the tokens of words, which saves a third of the time. New words are added to it.
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
    """Return (description, the words of the ending line), with "" for one that is missing."""
    description, _, last = explanation.rpartition("\n")
    if last.startswith(MARK):
        return description, last.removeprefix(MARK).strip()
    return explanation, ""


def join_end(description: str, line: str) -> str:
    """Return the description followed by the ending line `line`, which replaces one that it already has."""
    description = split_end(description)[0] if line else description
    return "\n".join(filter(None, (description, line)))


def _line(words: str) -> str:
    """Return the ending line with these words. Our own tags are altered because they would end it early."""
    for name in ("explanation>", "/explanation>"):
        words = words.replace(f"<{name}", f"< {name}")
    return f"{MARK} {words}" if words else ""


def _end_of(tok, word: str, ids: list[int], most: int) -> str:
    """Return the end of a word that its last tokens spell, or the word if they do not spell its end."""
    end = tok.decode(ids[-most:]).strip(" \ufffd")  # the first token may begin inside a character
    return end if end and word.endswith(end) else word
