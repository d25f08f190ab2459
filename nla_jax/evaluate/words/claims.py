"""Split an explanation into claims, and judge each against its source text by rules.

A claim is a word of the ending line, a quotation, a name, a number, or a content word of the description.
The rules find words, not meaning: a true summary in other words is judged false. docs/grounding.md has the
rules and what they miss.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nla_jax.data import lessons
from nla_jax.evaluate.words import edits, wordnet

KINDS = ("ending", "quote", "name", "number", "word")
# Words that say what kind of text it is. The rules cannot judge them, so they are no claims.
GENRE = frozenset(
    """
    account analysis announcement article author biography blog book brief bulletin chapter clause column
    comment commentary coverage description discussion editorial entry essay excerpt explainer feature
    fragment guide headline interview introduction item journalist journal line list magazine message news
    newspaper notice opinion page paragraph passage phrase piece post preview profile quotation quote
    recap recipe release report reporter reporting review sentence statement story summary text update writer
""".split()
)
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*")
_STARTS = re.compile(r"(?:^|[.!?:][\"”]?\s+|\n\s*|[\"“])$")
_INITIALS = frozenset("st mr mrs ms dr".split())


class Claim(NamedTuple):
    """The span [start, end) of an explanation, its words, and its kind, one of KINDS."""

    kind: str
    start: int
    end: int
    text: str


def split_claims(explanation: str) -> list[Claim]:
    """Return the claims of an explanation in the order of the text.

    Each word of the ending line is a claim, and each content word of the description. Capitalised words in
    a row are one name. Words inside quotation marks belong to the quotation.
    """
    description, ending = lessons.split_end(explanation)
    found, quotes = [], [m for m in edits.QUOTE.finditer(description) if not m[0].startswith(lessons.MARK)]
    for m in quotes:
        found.append(Claim("quote", *m.span(), next(filter(None, m.groups()))))
    shown = list(description)
    for m in quotes:
        shown[m.start() : m.end()] = "\x1f" * len(m[0])  # hides the words, and keeps the positions
    shown = "".join(shown)
    found += [Claim("number", *m.span(), m[0]) for m in _NUMBER.finditer(shown)]
    found += _names_and_words(shown)
    start = len(explanation) - len(ending)
    if ending:
        found += [
            Claim("ending", start + m.start(), start + m.end(), m[0]) for m in re.finditer(r"\S+", ending)
        ]
    return sorted(found, key=lambda c: c.start)


def _names_and_words(text: str) -> list[Claim]:
    wn, out = wordnet.wordnet(), []
    for m in _WORD.finditer(text):
        word, lower = m[0], m[0].lower()
        starts = bool(_STARTS.search(text[max(0, m.start() - 6) : m.start()]))
        known = bool(wordnet.readings(wn, lower))
        if lower in wordnet.STOP or (starts or word.islower()) and _lemmas(lower) & GENRE:
            continue
        if word[0].isupper() and len(word) > 1 and lower not in _INITIALS and (not starts or not known):
            joined = out and out[-1].kind == "name" and text[out[-1].end : m.start()] == " "
            start = out.pop().start if joined else m.start()
            out.append(Claim("name", start, m.end(), text[start : m.end()]))
        elif len(word) > (2 if known else 3):
            out.append(Claim("word", *m.span(), word))
    return out


@functools.lru_cache(maxsize=65536)
def _lemmas(word: str) -> frozenset[str]:
    """Return a lower-case word and the lemmas of which it is a form."""
    return frozenset({word, *(r.lemma for r in wordnet.readings(wordnet.wordnet(), word))})


@functools.lru_cache(maxsize=65536)
def _same_meaning(word: str) -> frozenset[str]:
    """Return the lemmas of a lower-case word, and the synonyms of its most likely reading."""
    wn = wordnet.wordnet()
    first = wordnet.readings(wn, word)[:1]
    return _lemmas(word).union(*(wordnet.synonyms(wn, r.kind, r.lemma) for r in first))


class _Source(NamedTuple):
    words: list[str]
    plain: str
    known: frozenset[str]
    lemmas: frozenset[str]
    numbers: frozenset[str]


@functools.lru_cache(maxsize=8192)
def _source(text: str) -> _Source:
    known = frozenset(m[0].lower() for m in _WORD.finditer(text))
    known |= {part for word in known for part in word.split("-")}
    numbers = frozenset(m[0].replace(",", "") for m in _NUMBER.finditer(text))
    lemmas = frozenset().union(*map(_lemmas, known)) if known else frozenset()
    return _Source(text.split(), f" {_plain(text)} ", known, lemmas, numbers)


def judge_claims(claims: Sequence[Claim], text: str) -> np.ndarray:
    """Return whether each claim of one explanation is true of its source text: bool [len(claims)].

    ending: the k-th last word is the text's k-th last word, without case and punctuation around it.
    quote: its words are in the text, in this order.
    name: each of its words, or a form of it, is in the text. number: the text has the same number.
    word: the text has a form of it, or a form of a synonym of its most likely sense (WordNet).
    """
    source = _source(text)
    last = len([c for c in claims if c.kind == "ending"])
    out = []
    for c in claims:
        if c.kind == "ending":
            there = source.words[-last] if last <= len(source.words) else ""
            out.append(_bare(c.text) == _bare(there))
            last -= 1
        elif c.kind == "quote":
            out.append(f" {_plain(c.text)} " in source.plain)
        elif c.kind == "number":
            out.append(c.text.replace(",", "") in source.numbers)
        elif c.kind == "name":
            words = [w for part in c.text.lower().split() for w in part.split("-")]
            out.append(all(w in source.known or _lemmas(w) & source.lemmas for w in words))
        else:
            out.append(bool(_same_meaning(c.text.lower()) & source.lemmas))
    return np.array(out, bool)


def count_words(words: Sequence[str], text: str) -> int:
    """Return how many of the words a text has in some form (WordNet)."""
    source = _source(text)
    return sum(bool(_lemmas(w.lower()) & source.lemmas) for w in words)


def repeat_claims(claims: Sequence[Claim], other: str) -> np.ndarray:
    """Return whether another explanation, such as the next token's, makes each claim: bool [len(claims)].

    As `judge_claims`, but a word of the ending line may stand anywhere among the other's words.
    """
    words = {_bare(w) for w in other.split()}
    true = judge_claims(claims, other)
    return np.array(
        [_bare(c.text) in words if c.kind == "ending" else t for c, t in zip(claims, true, strict=True)], bool
    )


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _bare(word: str) -> str:
    return re.sub(r"^\W+|\W+$", "", word.lower()) or word
