"""Edits of an explanation that keep one thing and destroy another. Pure functions of text and seed."""

import hashlib
import re

import numpy as np

# A double-quoted span, straight or curly, on one line. A written line may hold several.
_QUOTE = re.compile(r'"([^"\n]+)"|“([^”\n]+)”')


def quoted(text: str) -> list[str]:
    """The spans between double quotes, without the quotes."""
    return [a or b for a, b in _QUOTE.findall(text)]


def quotes_only(text: str) -> str:
    """The quoted spans alone, each still in quotes; line by line, as they stood."""
    lines = (" ".join(m.group(0) for m in _QUOTE.finditer(line)) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def prose_only(text: str) -> str:
    """What is left without the quoted spans and their quotes."""
    lines = (" ".join(_QUOTE.sub(" ", line).split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _random(seed: int, text: str) -> np.random.Generator:
    """A generator keyed on the text: an edit is the same wherever its row stands."""
    digest = hashlib.blake2b(f"{seed}\x1f{text}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def words_shuffled(text: str, seed: int = 0) -> str:
    """The words of each line in random order; line breaks stay."""
    rng = _random(seed, text)
    return "\n".join(" ".join(rng.permutation(line.split())) for line in text.splitlines())


def lines_shuffled(text: str, seed: int = 0) -> str:
    """The lines in another order, never the one that they stood in (unless there is only one)."""
    lines = text.splitlines()
    if len(lines) < 2:
        return text
    shift = int(_random(seed, text).integers(1, len(lines)))
    return "\n".join(lines[shift:] + lines[:shift])


def claims(text: str) -> list[str]:
    """The pieces that can be left out one at a time: lines, and within a line what `;` or the end of a
    sentence divides outside quotes."""
    out = []
    for line in text.splitlines():
        hidden = _QUOTE.sub(lambda m: "_" * len(m.group(0)), line)
        at = 0
        for end in [m.end() for m in re.finditer(r"[.;!?]\s+", hidden)] + [len(line)]:
            piece = line[at:end].strip()
            if piece:
                out.append(piece)
            at = end
    return out


def without_claim(text: str, i: int) -> str:
    """`text` without its i-th claim, a line for each that stays; an only claim stays too."""
    pieces = claims(text)
    if len(pieces) < 2:
        return text
    del pieces[i]
    return "\n".join(pieces)


def verbatim(text: str, source: str) -> tuple[int, int]:
    """(how many quoted spans stand word for word in `source`, how many there are); case and spaces aside."""
    where = f" {_plain(source)} "
    spans = [_plain(q) for q in quoted(text)]
    spans = [s for s in spans if s]
    return sum(f" {s} " in where for s in spans), len(spans)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower()))
