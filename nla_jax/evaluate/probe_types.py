"""`Evidence`, the input of every probe, and `Figure`, an element of its output."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import RoundTrip, Runner


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table.

    `low`, `high`: 95 % bootstrap interval over documents, None if there are too few documents. `n`: number of
    activations. `asks`: a description. `reference`: published values on other models, "" if there is none.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    asks: str
    reference: str = ""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Held-out rows, their explanations, and a Runner to read other texts. A probe that lacks an optional
    field returns no figure.

    Args:
      columns: of a store split: "h" [N, D], "doc_id", "text", "next_text", "explanation" ("" where a data
        set has none).
      trip: the round trip of these rows. mean_D: `fve.mean_direction` of training activations.
      bootstrap: resamples of an interval. seed: of resamples, random edits and further samples.
      temperature, max_new: of further samples.
      warm: AV and AR before joint training. train: columns of training rows. readers: directory for the
        readers that some probes train.
      settings: the config that the NLA was trained with, as a plain dict.
      paraphraser: texts -> paraphrases by an LLM that is neither target nor AV; None for a text that it
        could not paraphrase.
      judge: (runner, items, label) -> judgements of claims by an LLM (`words.claim_judge`).
      left_out: one line for each figure or probe that was not measured, and why.
    """

    runner: Runner
    columns: dict
    trip: RoundTrip
    mean_D: np.ndarray
    bootstrap: int = 2000
    seed: int = 0
    temperature: float = 1.0
    max_new: int = 48
    warm: Runner | None = None
    train: dict | None = None
    readers: Path | None = None
    settings: dict | None = None
    paraphraser: Callable[[list[str]], list[str | None]] | None = None
    judge: Callable | None = None
    left_out: list[str] = dataclasses.field(default_factory=list)
    _read: dict = dataclasses.field(default_factory=dict, init=False, repr=False)
    _frozen: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.columns["h"])

    def has_texts(self, *, train: bool = False) -> bool:
        """Return whether every row has its source text; with `train`, every training row too."""
        known = all(self.columns["text"])
        return known and (not train or (self.train is not None and all(self.train["text"])))

    def reconstruct(self, texts: Sequence[str], label: str = "") -> np.ndarray:
        """Reconstruct h from any texts with AR: [len(texts), D]. Each distinct text is read only once."""
        return _read_once(self._read, self.runner.reconstruct, texts, label)

    def read_frozen(self, texts: Sequence[str], label: str = "") -> np.ndarray:
        """Read any texts with the frozen target (`Runner.read_frozen`): [len(texts), D]. Cached as above."""
        return _read_once(self._frozen, self.runner.read_frozen, texts, label)

    def errors(self, h_hat_ND, ok_N=None) -> np.ndarray:
        """Return the squared distance [N] of each row's h from `h_hat_ND`; 2 D where `ok_N` is False."""
        return F.errors(h_hat_ND, self.columns["h"], ok_N)

    def fve(self, name, error_N, asks, *, rows=None, meannorm=False, reference="") -> Figure:
        """Return the FVE of errors [N] over all rows, or over `rows`."""
        rows = self._rows(rows)
        error, variance = error_N[rows], F.variances(self.columns["h"], meannorm)[rows]
        low, high = F.interval(error, variance, self._docs(rows), n=self.bootstrap, seed=self.seed)
        return Figure(name, F.fve(error, variance), low, high, len(rows), asks, reference)

    def fve_lost(self, name, error_N, than_N, asks, *, rows=None, reference="") -> Figure:
        """Return FVE with `than_N` minus FVE with `error_N` on the same rows, with a paired interval."""
        rows = self._rows(rows)
        return self.ratio(name, (error_N - than_N)[rows], F.variances(self.columns["h"])[rows], asks,
                          rows=rows, reference=reference)

    def mean(self, name, values, asks, *, rows=None, reference="") -> Figure:
        """Return the mean of one value per row ([N], or [len(rows)] with `rows`)."""
        rows = self._rows(rows)
        return self.ratio(name, values, np.ones(len(rows)), asks, rows=rows, reference=reference)

    def ratio(self, name, above, below, asks, *, rows=None, reference="") -> Figure:
        """Return sum(above) / sum(below), with one value of each per row; 0 if the denominator is 0.

        `Figure.n` counts the rows with a denominator other than 0."""
        rows, above, below = self._rows(rows), np.asarray(above, float), np.asarray(below, float)
        if not below.sum():
            return Figure(name, 0.0, None, None, 0, asks, reference)
        low, high = F.ratio_interval(above, below, self._docs(rows), n=self.bootstrap, seed=self.seed)
        value = float(above.sum() / below.sum())
        return Figure(name, value, low, high, int(np.count_nonzero(below)), asks, reference)

    def _rows(self, rows) -> np.ndarray:
        return np.arange(len(self)) if rows is None else np.asarray(rows, int)

    def _docs(self, rows) -> list[str]:
        return [self.columns["doc_id"][i] for i in rows]


def _read_once(known: dict, read: Callable, texts: Sequence[str], label: str) -> np.ndarray:
    """Return [len(texts), D] from the cache `known`, after calling `read` on the texts that it lacks."""
    if new := sorted(set(texts) - known.keys()):
        known.update(zip(new, read(new, label), strict=True))
    return np.stack([known[t] for t in texts])


def rows_of_other_documents(docs) -> np.ndarray:
    """Return for each row the index [N] of a row of another document.

    Each row is used once, unless one document has more than half of the rows. With a single document, the
    index is that of another row of it."""
    _, first_N, doc_N = np.unique(np.asarray(docs), return_index=True, return_inverse=True)
    doc_N = first_N[doc_N]  # number documents by their first row, so that their names do not matter
    n, sizes = len(doc_N), np.bincount(doc_N)
    by_doc, biggest = np.argsort(doc_N, kind="stable"), int(sizes.argmax())
    pick = np.empty(n, int)
    if 2 * sizes[biggest] <= n or sizes[biggest] == n:
        # Sorted by document, the row n / 2 places further is always of another document.
        pick[by_doc] = np.roll(by_doc, -(n // 2))
    else:
        inside, outside = np.flatnonzero(doc_N == biggest), np.flatnonzero(doc_N != biggest)
        pick[inside] = np.resize(outside, len(inside))
        pick[outside] = inside[: len(outside)]
    return pick


def evenly_spaced(rows, n: int) -> list[int]:
    """Return at most n of the rows, evenly spaced from the first to the last."""
    pick = np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)
    return [int(rows[i]) for i in pick]
