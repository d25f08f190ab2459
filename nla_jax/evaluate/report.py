"""One evaluation: held-out rows -> a list of figures with what each asks, and their table."""

import dataclasses

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.roundtrip import Runner


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table. `low`, `high`: 95 % bootstrap interval over documents, or None."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    asks: str


def evaluate(
    runner: Runner,
    columns: dict,
    mean_D: np.ndarray,
    key,
    *,
    temperature: float,
    max_new: int,
    bootstrap: int = 2000,
    seed: int = 0,
    label: str = "evaluate",
):
    """Round-trip figures on one set of rows.

    Args:
      columns: of a store split: "h" [N, D], "doc_id", "explanation" ("" where none is written).
      mean_D: `fve.mean_direction` of training activations.

    Returns:
      (figures, round trip).
    """
    h, docs = columns["h"], columns["doc_id"]
    trip = runner.round_trip(h, key, temperature=temperature, max_new=max_new, label=label)
    var, var_mn = F.variances(h), F.variances(h, meannorm=True)
    figures = []

    def add(name, error, asks, variance=var, rows=None):
        rows = np.arange(len(h)) if rows is None else rows
        picked = [docs[i] for i in rows]
        low, high = F.interval(error, variance[rows], picked, n=bootstrap, seed=seed)
        figures.append(Figure(name, F.fve(error, variance[rows]), low, high, len(rows), asks))

    def rate(name, values, asks):
        figures.append(Figure(name, float(np.mean(values)), None, None, len(values), asks))

    error = F.errors(trip.h_text, h, trip.ok)
    add("fve", error, "how much of h comes back through the words")
    add(
        "fve_meannorm",
        error,
        "the same over the other denominator in use; for comparison only",
        var_mn,
    )
    other = elsewhere(docs)
    add(
        "fve_shuffled",
        F.errors(trip.h_text[other], h, trip.ok[other]),
        "does it matter whose words they are (another document's)",
    )
    add(
        "fve_mean_direction",
        F.errors(np.broadcast_to(mean_D, h.shape), h),
        "what knowing nothing scores",
    )
    add(
        "fve_token_path",
        F.errors(trip.h_token, h, trip.ok_token),
        "the sampled ids spliced, not the text: a hidden channel if higher",
    )
    written = np.array([i for i, e in enumerate(columns["explanation"]) if e], int)
    if len(written):
        rebuilt = runner.reconstruct([columns["explanation"][i] for i in written])
        add(
            "fve_written",
            F.errors(rebuilt, h[written]),
            "AR on the explanations written by an LLM",
            rows=written,
        )
    both = trip.ok & trip.ok_token
    rate(
        "retokenization_mismatch",
        trip.retokenised[both] if both.any() else [0.0],
        "share of explanations whose text tokenises to other ids",
    )
    rate("ok", trip.ok, "share of answers with a readable explanation")
    rate("tokens", trip.length, "tokens written, tags included")
    rate(
        "ascii",
        [c.isascii() for t in trip.explanations for c in t] or [1.0],
        "share of ASCII characters",
    )
    rate(
        "repeated",
        [_repeated(t) for t in trip.explanations],
        "share of words that stood before in it",
    )
    return figures, trip


def elsewhere(docs) -> np.ndarray:
    """For each row another row of a different document, each used once unless one document holds more
    than half of the rows. With a single document, merely another row."""
    _, first_N, doc_N = np.unique(np.asarray(docs), return_index=True, return_inverse=True)
    doc_N = first_N[doc_N]  # documents by their first row
    n, sizes = len(doc_N), np.bincount(doc_N)
    by_doc, biggest = np.argsort(doc_N, kind="stable"), int(sizes.argmax())
    pick = np.empty(n, int)
    if 2 * sizes[biggest] <= n or sizes[biggest] == n:
        # In this order half the rows further is always another document.
        pick[by_doc] = np.roll(by_doc, -(n // 2))
    else:
        inside, outside = np.flatnonzero(doc_N == biggest), np.flatnonzero(doc_N != biggest)
        pick[inside] = np.resize(outside, len(inside))
        pick[outside] = inside[: len(outside)]
    return pick


def _repeated(text: str) -> float:
    words = text.lower().split()
    return 1.0 - len(set(words)) / len(words) if words else 0.0


def table(columns: dict[str, list[Figure]], title: str):
    """A rich table: one column of values for each named list of figures."""
    from rich.table import Table

    out = Table(title=title)
    out.add_column("figure")
    for name in columns:
        out.add_column(name, justify="right")
    out.add_column("what it asks")
    names = list(dict.fromkeys(f.name for fs in columns.values() for f in fs))
    for name in names:
        found = [next((f for f in fs if f.name == name), None) for fs in columns.values()]
        asks = next(f.asks for f in found if f)
        out.add_row(name, *(_cell(f) for f in found), asks)
    return out


def _cell(f: Figure | None) -> str:
    if f is None:
        return ""
    text = f"{f.value:.3f}"
    return text if f.low is None else f"{text} [{f.low:.3f}, {f.high:.3f}]"
