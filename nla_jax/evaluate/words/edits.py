"""Edits of an explanation that keep one thing and destroy another. Pure functions of text and seed."""

import hashlib
import re

import numpy as np

# A double-quoted span, straight or curly, on one line (a written line may hold several), or an ending line.
QUOTE = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|(?<![^\n])…[ \t]*([^\n]+)')


def quoted(text: str) -> list[str]:
    """The spans between double quotes, without the quotes, and the words of the ending line."""
    return [a or b or c for a, b, c in QUOTE.findall(text)]


def quotes_only(text: str) -> str:
    """The quoted spans alone, each still in quotes, and the ending line; line by line, as they were."""
    lines = (" ".join(m.group(0) for m in QUOTE.finditer(line)) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def prose_only(text: str) -> str:
    """What is left without the quoted spans, their quotes and the ending line."""
    lines = (" ".join(QUOTE.sub(" ", line).split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def keyed(seed: int, text: str) -> np.random.Generator:
    """A generator keyed on the text: an edit is the same wherever its row stands."""
    digest = hashlib.blake2b(f"{seed}\x1f{text}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def words_shuffled(text: str, seed: int = 0) -> str:
    """The words of each line in random order; line breaks stay."""
    rng = keyed(seed, text)
    return "\n".join(" ".join(rng.permutation(line.split())) for line in text.splitlines())


def lines_shuffled(text: str, seed: int = 0) -> str:
    """The lines in another order, never the one that they stood in (unless there is only one)."""
    lines = text.splitlines()
    if len(lines) < 2:
        return text
    shift = int(keyed(seed, text).integers(1, len(lines)))
    return "\n".join(lines[shift:] + lines[:shift])


def _claim_spans(text: str) -> list[tuple[int, int]]:
    hidden = QUOTE.sub(lambda m: "_" * len(m.group(0)), text)
    ends = [m.end() for m in re.finditer(r"[.;!?](?=\s)|\n", hidden)]
    spans = zip([0, *ends], [*ends, len(text)], strict=True)
    return [(a, b) for a, b in spans if text[a:b].strip()]


def claims(text: str) -> list[str]:
    """The pieces that can be left out one at a time: lines, and within a line what `;` or the end of a
    sentence divides outside quotes."""
    return [text[a:b].strip() for a, b in _claim_spans(text)]


def without_claim(text: str, i: int) -> str:
    """`text` without its i-th claim, the others laid out as they were; an only claim stays."""
    spans = _claim_spans(text)
    if len(spans) < 2:
        return text
    a, b = spans[i]
    lines = (text[:a] + ("\n" if "\n" in text[a:b] else "") + text[b:]).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def verbatim(text: str, source: str) -> tuple[int, int]:
    """(how many quoted spans stand word for word in `source`, how many there are); case and spaces aside."""
    where = f" {_plain(source)} "
    spans = [_plain(q) for q in quoted(text)]
    spans = [s for s in spans if s]
    return sum(f" {s} " in where for s in spans), len(spans)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower()))
