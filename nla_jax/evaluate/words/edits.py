"""Edit explanations so that one property is kept and another destroyed. Pure functions of text and seed."""

import hashlib
import re

import numpy as np

# A double-quoted span (straight or curly) within a line, or an ending line.
QUOTE = re.compile(r'"([^"\n]+)"|“([^”\n]+)”|(?<![^\n])…[ \t]*([^\n]+)')


def quoted_spans(text: str) -> list[str]:
    """Return the spans between double quotes, without the quotes, and the words of the ending line."""
    return [a or b or c for a, b, c in QUOTE.findall(text)]


def keep_quotes(text: str) -> str:
    """Keep only the quoted spans, with their quotes, and the ending line. Line breaks are kept."""
    lines = (" ".join(m.group(0) for m in QUOTE.finditer(line)) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def remove_quotes(text: str) -> str:
    """Remove the quoted spans, their quotes and the ending line."""
    lines = (" ".join(QUOTE.sub(" ", line).split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def keyed_generator(seed: int, text: str) -> np.random.Generator:
    """Return a generator keyed on seed and text, so that an edit does not depend on the row's position."""
    digest = hashlib.blake2b(f"{seed}\x1f{text}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def shuffle_words(text: str, seed: int = 0) -> str:
    """Shuffle the words within each line."""
    rng = keyed_generator(seed, text)
    return "\n".join(" ".join(rng.permutation(line.split())) for line in text.splitlines())


def rotate_lines(text: str, seed: int = 0) -> str:
    """Rotate the lines by a random offset, so that every line moves. A single line is returned as it is."""
    lines = text.splitlines()
    if len(lines) < 2:
        return text
    shift = int(keyed_generator(seed, text).integers(1, len(lines)))
    return "\n".join(lines[shift:] + lines[:shift])


def _claim_spans(text: str) -> list[tuple[int, int]]:
    hidden = QUOTE.sub(lambda m: "_" * len(m.group(0)), text)
    ends = [m.end() for m in re.finditer(r"[.;!?](?=\s)|\n", hidden)]
    spans = zip([0, *ends], [*ends, len(text)], strict=True)
    return [(a, b) for a, b in spans if text[a:b].strip()]


def claims(text: str) -> list[str]:
    """Split a text into claims: lines, split further at `;` and at ends of sentences outside quotes."""
    return [text[a:b].strip() for a, b in _claim_spans(text)]


def remove_claim(text: str, i: int) -> str:
    """Remove the i-th claim and keep the layout of the others. A single claim is kept."""
    spans = _claim_spans(text)
    if len(spans) < 2:
        return text
    a, b = spans[i]
    lines = (text[:a] + ("\n" if "\n" in text[a:b] else "") + text[b:]).splitlines()
    return "\n".join(line.strip() for line in lines if line.strip())


def count_verbatim(text: str, source: str) -> tuple[int, int]:
    """Return (quoted spans that occur in `source`, quoted spans), without case, spaces and punctuation."""
    where = f" {_plain(source)} "
    spans = [_plain(q) for q in quoted_spans(text)]
    spans = [s for s in spans if s]
    return sum(f" {s} " in where for s in spans), len(spans)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower()))
