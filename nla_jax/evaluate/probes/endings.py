"""Measure what the description adds to the ending line, and whether the ending line quotes the text."""

from collections.abc import Sequence

import numpy as np

from nla_jax.data import lessons
from nla_jax.evaluate.probe_types import Evidence, Figure

BACK = (2, 3)  # numbers of last words that must agree


def description_gain(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of whole explanations minus FVE of their ending lines alone, by AR and by the frozen target.

    Returns no figure if no readable explanation has both a description and an ending line."""
    texts = ev.trip.explanations
    parts = [lessons.split_end(t) for t in texts]
    rows = np.array([i for i, (said, end) in enumerate(parts) if said and end and ev.trip.ok[i]], int)
    if not len(rows):
        return []
    # The other rows keep their whole text, which costs nothing: it is read in any case.
    lines = list(texts)
    for i in rows:
        lines[i] = texts[i].rpartition("\n")[2]
    out = []
    for name, read, who in [
        ("description_gain", ev.reconstruct, "AR"),
        ("description_gain_frozen", ev.read_frozen, "the frozen target"),
    ]:
        alone, whole = ev.errors(read(lines, label)), ev.errors(read(texts, label))
        asks = f"FVE that the description lines add to the ending line alone, read by {who}"
        out.append(ev.fve_lost(name, alone, whole, asks, rows=rows))
    return out


def has_last_words(explanation: str, text: str, n: int) -> bool:
    """Return whether the last n words of an explanation are the last n words of the text.

    If the explanation has an ending line, only its words count. A last word that the text cuts short must be
    cut short in the explanation, too."""
    words = (lessons.split_end(explanation)[1] or explanation).split()
    return bool(words) and words[-n:] == text.split()[-n:]


def last_word(explanations: Sequence[str], texts: Sequence[str], n: int = 1) -> np.ndarray:
    """Return `has_last_words` of each explanation as float [N]."""
    return np.array([has_last_words(z, t, n) for z, t in zip(explanations, texts, strict=True)], float)


def last_words(ev: Evidence) -> list[Figure]:
    """Return the shares of explanations that end with the last words of their texts; [] without the texts."""
    if not ev.has_texts():
        return []
    said, texts = ev.trip.explanations, ev.columns["text"]
    asks = "share of explanations whose last {} the text has there"
    return [
        ev.mean("last_word", last_word(said, texts), asks.format("word is what")),
        *(ev.mean(f"last_words_back_{n}", last_word(said, texts, n), asks.format(f"{n} words are what"))
          for n in BACK),
    ]
