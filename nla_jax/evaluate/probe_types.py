"""What every probe measures on, and the figures that it returns."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import RoundTrip, Runner


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table.

    `low`, `high`: 95 % bootstrap interval over documents. `n`: activations it is about. `reference`:
    what others measured (published figures, on other models), "" where nothing is known.
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
    """Held-out rows, what the NLA wrote about them, and AR to read other words with.

    Args:
      columns: of a store split: "h" [N, D], "doc_id", "text", "next_text", "explanation" ("" where there
        is none: not every data set has its texts).
      trip: the round trip of these rows. mean_D: `fve.mean_direction` of training activations.
      bootstrap: resamples of an interval. seed: of resamples, random edits and further samples.
      temperature, max_new: of further samples.
      warm: AV and AR before they were trained together. train: columns of training rows. readers:
        directory that keeps the readers which some probes train. A probe without what it needs
        returns no figure.
      settings: the config that the NLA was trained with, as a plain dict.
      paraphraser: texts -> the same in other words, of an LLM that is neither target nor AV; None for a
        text that it could not do.
      left_out: a line for each figure or probe that could not be had, and what it would need.
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
    left_out: list[str] = dataclasses.field(default_factory=list)
    _read: dict = dataclasses.field(default_factory=dict, init=False, repr=False)
    _frozen: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.columns["h"])

    def has_texts(self, *, train: bool = False) -> bool:
        """Whether every row comes with the text that it was read from; with `train`, training rows too."""
        known = all(self.columns["text"])
        return known and (not train or (self.train is not None and all(self.train["text"])))

    def reconstruct(self, texts: Sequence[str], label: str = "") -> np.ndarray:
        """AR on any texts: [len(texts), D]. Each different text is read once, whoever asks."""
        return _read_once(self._read, self.runner.reconstruct, texts, label)

    def read_frozen(self, texts: Sequence[str], label: str = "") -> np.ndarray:
        """The frozen target on any texts, bare (`Runner.read_frozen`): [len(texts), D], each read once."""
        return _read_once(self._frozen, self.runner.read_frozen, texts, label)

    def errors(self, h_hat_ND, ok_N=None) -> np.ndarray:
        """Squared distance [N] of each row's h from `h_hat_ND`; failed rows are charged 2 D."""
        return F.errors(h_hat_ND, self.columns["h"], ok_N)

    def fve(self, name, error_N, asks, *, rows=None, meannorm=False, reference="") -> Figure:
        """FVE of errors over all rows, or of `rows` (errors still [N])."""
        rows = self._rows(rows)
        error, variance = error_N[rows], F.variances(self.columns["h"], meannorm)[rows]
        low, high = F.interval(error, variance, self._docs(rows), n=self.bootstrap, seed=self.seed)
        return Figure(name, F.fve(error, variance), low, high, len(rows), asks, reference)

    def lost(self, name, error_N, than_N, asks, *, rows=None, reference="") -> Figure:
        """How much lower FVE is with `error_N` than with `than_N` on the same rows; a paired interval."""
        rows = self._rows(rows)
        return self.ratio(name, (error_N - than_N)[rows], F.variances(self.columns["h"])[rows], asks,
                          rows=rows, reference=reference)

    def mean(self, name, values, asks, *, rows=None, reference="") -> Figure:
        """Mean of one value a row ([N], or [len(rows)] with `rows`)."""
        rows = self._rows(rows)
        return self.ratio(name, values, np.ones(len(rows)), asks, rows=rows, reference=reference)

    def ratio(self, name, above, below, asks, *, rows=None, reference="") -> Figure:
        """Sum of `above` over sum of `below`, one of each a row, about the rows that have something below;
        0 where none has."""
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
    """`read` on those texts that are not in `known` yet; all of them, from there: [len(texts), D]."""
    if new := sorted(set(texts) - known.keys()):
        known.update(zip(new, read(new, label), strict=True))
    return np.stack([known[t] for t in texts])


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


def spread(rows, n: int) -> list[int]:
    """At most n of the rows, evenly from the first to the last."""
    pick = np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)
    return [int(rows[i]) for i in pick]
