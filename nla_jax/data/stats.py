"""Statistics of a store for `nla data stats`: norms (which give α), variance and its principal components,
massive dimensions, lengths, and repeated rows.

At most about `SAMPLE` evenly spaced activations of a split are in memory at once.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.util.batching import chunks
from nla_jax.util.tables import markdown_table

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
SAMPLE = 10_000
TOP = (1, 2, 5, 10, 50)
# A dimension is listed as massive if its share of the squared norm is above MASSIVE and above MASSIVE_TIMES
# times the median dimension's share.
MASSIVE = 0.01
MASSIVE_TIMES = 100
_CHUNK = 256


@dataclasses.dataclass
class Stats:
    """The figures of one split as JSON values, and the curves of the plot.

    `curves` has "norms" [N], "lengths" [N], "components" (shares of the variance, descending) and
    "dimensions" (shares of the squared norm, descending).
    """

    figures: dict[str, Any]
    curves: dict[str, np.ndarray]


def of_split(directory: str | Path, split: str) -> Stats:
    """Compute the figures of one split of a store.

    Variance, components and dimensions are computed from a sample of at most `SAMPLE` rows. Norms, lengths
    and duplicates are computed from all rows. The variance is that of h scaled to norm √D, per dimension. It
    is the denominator of FVE.

    Raises UserError as `store.open_store`, for a damaged record, and if no activation is finite.
    """
    rows = store.open_store(directory, split)
    every = max(-(-len(rows) // SAMPLE), 1)
    norms, lengths, positions, kept, bad = [], [], [], [], 0
    doc_ids: set[str] = set()
    texts, vectors = _Repeats(), _Repeats()
    for i, row in _read(rows, directory, split):
        h_D = np.asarray(row["h"], np.float32)
        lengths.append(row["n_tokens"])
        positions.append(row["position"])
        doc_ids.add(row["doc_id"])
        texts.add(row["text"].encode("utf-8", "replace"))
        if not np.isfinite(h_D).all() or not h_D.any():
            bad += 1
            continue
        vectors.add(h_D.tobytes())
        norms.append(float(np.linalg.norm(h_D.astype(np.float64))))
        if i % every == 0:
            kept.append(h_D)
    if not norms:
        raise UserError(f"{directory}: split {split!r} has no finite activation: extract again")
    h_ND = np.stack(kept or [h_D])
    shape, shares = _shape(h_ND)
    figures = {
        "rows": len(lengths),
        "documents": len(doc_ids),
        "not finite or zero": bad,
        "norm": _quantiles(norms),
        "alpha": float(f"{np.percentile(norms, 75):.2g}"),
        **shape,
        "tokens": _quantiles(lengths),
        "position": _quantiles(positions),
        "texts there twice": texts.n,
        "activations there twice": vectors.n,
    }
    curves = {"norms": np.array(norms), "lengths": np.array(lengths), **shares}
    return Stats(figures, curves)


class _Repeats:
    """A counter of values that occurred before."""

    def __init__(self):
        self.n, self._seen = 0, set()

    def add(self, value: bytes) -> None:
        digest = hashlib.blake2b(value, digest_size=8).digest()
        self.n += digest in self._seen
        self._seen.add(digest)


def _read(rows: store.Rows, directory, split: str) -> Iterator[tuple[int, dict]]:
    for wanted in chunks(range(len(rows)), _CHUNK):
        try:
            found = rows.__getitems__(wanted)
        except Exception as e:  # array_record and TFDS have no exception class for damaged files
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:150]
            raise UserError(
                f"{directory}: split {split!r} is damaged near row {wanted[0]} ({reason}); "
                "extract again"
            ) from e
        yield from zip(wanted, found, strict=True)


def _shape(h_ND: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Compute mean, variance, components and dimensions of activations [N, D]: (figures, curves)."""
    n, d = h_ND.shape
    x_ND = h_ND.astype(np.float64)
    squared_D = np.mean((x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)) ** 2, 0)  # sums to 1
    biggest_D = np.abs(h_ND).max(0)
    x_ND *= np.sqrt(d) / np.linalg.norm(x_ND, axis=1, keepdims=True)
    mean_D = x_ND.mean(0)
    x_ND -= mean_D
    variance = float(np.mean(x_ND**2))
    # The smaller of the two Gram matrices has all nonzero eigenvalues.
    gram = (x_ND @ x_ND.T if n < d else x_ND.T @ x_ND) / (n * d)
    spectrum = np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None)
    components = spectrum / spectrum.sum() if spectrum.sum() > 0 else spectrum
    order = np.argsort(-squared_D, kind="stable")
    floor = max(MASSIVE, MASSIVE_TIMES * float(np.median(squared_D)))
    massive = [
        {"dimension": int(i), "share": float(squared_D[i]), "largest": float(biggest_D[i])}
        for i in order[:16]
        if squared_D[i] > floor
    ]
    effective = float(1 / np.sum(components**2)) if components.any() else 0.0
    figures = {
        "sample": n,
        "d_model": d,
        "variance": variance,
        "share of the mean": float(mean_D @ mean_D / d),
        "components": {str(k): float(components[:k].sum()) for k in TOP if k <= len(components)},
        "effective components": effective,
        "massive": massive,
    }
    return figures, {"components": components, "dimensions": squared_D[order]}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(v) for q, v in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)}


def markdown(found: dict[str, Stats]) -> list[str]:
    """Return `lines` as a Markdown table."""
    header, *body = lines(found)
    return markdown_table(header, body)


def lines(found: dict[str, Stats]) -> list[list[str]]:
    """Return the figures as a table: a header, then one line per figure with one column per split."""
    names = [
        ("rows", lambda f: f"{f['rows']:,}"),
        ("documents", lambda f: f"{f['documents']:,}"),
        ("not finite or zero", lambda f: str(f["not finite or zero"])),
        (
            "norm p1 / p25 / p50 / p75 / p99",
            lambda f: _format_quantiles(f["norm"], ("p1", "p25", "p50", "p75", "p99")),
        ),
        ("norm least / greatest", lambda f: _format_quantiles(f["norm"], ("p0", "p100"))),
        ("alpha (p75 of the norms, two digits)", lambda f: f"{f['alpha']:g}"),
        ("variance a dimension, h scaled to √D", lambda f: f"{f['variance']:.3f}"),
        ("share of the mean direction", lambda f: f"{f['share of the mean']:.1%}"),
        *((f"first {k} of the components", lambda f, k=k: _share(f, str(k))) for k in TOP),
        ("effective components", lambda f: f"{f['effective components']:.1f}"),
        (
            "massive dimensions: share of the squared norm, largest",
            lambda f: (
                "; ".join(f"{m['dimension']}: {m['share']:.1%}, {m['largest']:.4g}" for m in f["massive"])
                or "none"
            ),
        ),
        ("tokens p50 / p95 / greatest", lambda f: _format_quantiles(f["tokens"], ("p50", "p95", "p100"))),
        ("position p50 / p95 / greatest", lambda f: _format_quantiles(f["position"], ("p50", "p95", "p100"))),
        ("texts there twice", lambda f: str(f["texts there twice"])),
        ("activations there twice", lambda f: str(f["activations there twice"])),
    ]
    body = [[name, *(show(s.figures) for s in found.values())] for name, show in names]
    return [["", *found], *body]


def _share(figures: dict, k: str) -> str:
    return f"{figures['components'][k]:.1%}" if k in figures["components"] else "–"


def _format_quantiles(quantiles: dict[str, float], names: Sequence[str]) -> str:
    return " / ".join(f"{quantiles[n]:.4g}" for n in names)
