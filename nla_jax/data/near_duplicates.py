"""Near duplicates: the exact number of runs of eight words that two documents share.

The count is exact. MinHash would estimate the Jaccard index, which is small if one text is part of a longer
one. Articles typically repeat each other in this way. Only chosen documents are compared, so the size of the
index depends on the extracted documents, not on the corpus.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

RUN = 8  # words

_FACTORS = np.random.default_rng(0).integers(1, 2**63, RUN, np.uint64) * np.uint64(2) + np.uint64(1)


class Index:
    """An index of the runs of words of some documents, to find the one that another document resembles."""

    def __init__(self):
        self._words: dict[str, int] = {}
        self._runs, self._owners = np.empty(0, np.uint64), np.empty(0, np.int32)
        self._sizes: list[int] = []
        self._ids: list[str] = []

    def runs(self, text: str) -> np.ndarray:
        """Return the distinct runs of eight words of a text, as sorted uint64 hashes.

        A shorter text gives one run of all its words. In a text without spaces between words, each character
        counts as a word.
        """
        words: Sequence[str] = text.split()
        if len(text) > 20 * len(words):
            words = "".join(words)
        if len(self._words) > 1_000_000:
            self._words.clear()
        hashes = np.array([self._words.get(w) or self._hash(w) for w in words], np.uint64)
        n = max(len(hashes) - RUN + 1, 1)
        out = np.zeros(n, np.uint64)
        for i, factor in enumerate(_FACTORS):
            part = hashes[i : i + n]
            out[: len(part)] += part * factor  # modulo 2**64
        return np.unique(out)

    def _hash(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
        self._words[word] = int.from_bytes(digest, "little")
        return self._words[word]

    def add(self, ids: Sequence[str], runs: Sequence[np.ndarray]) -> None:
        """Add documents with their `runs`."""
        if not ids:
            return
        first = len(self._ids)
        self._ids += ids
        self._sizes += [len(r) for r in runs]
        owners = np.repeat(np.arange(first, len(self._ids), dtype=np.int32), self._sizes[first:])
        both = np.concatenate([self._runs, *runs]), np.concatenate([self._owners, owners])
        order = np.argsort(both[0], kind="stable")
        self._runs, self._owners = both[0][order], both[1][order]

    def nearest(self, runs: np.ndarray) -> tuple[str, float]:
        """Return (id, share) of the most similar document; the first one added wins a tie.

        The share is the number of shared runs, divided by the runs of the shorter document. Returns
        ("", 0.0) if no run is shared.
        """
        low, high = (np.searchsorted(self._runs, runs, side) for side in ("left", "right"))
        counts = high - low
        if not counts.sum():
            return "", 0.0
        at = np.repeat(high - np.cumsum(counts), counts) + np.arange(counts.sum())
        owners, shared = np.unique(self._owners[at], return_counts=True)
        shares = shared / np.minimum([self._sizes[i] for i in owners], len(runs))
        best = int(np.argmax(shares))
        return self._ids[owners[best]], float(shares[best])


def find_near_duplicates(
    groups: Iterable[tuple[str, Mapping[str, str]]], share: float
) -> dict[str, dict[str, tuple[str, float]]]:
    """Find the documents that resemble one of an earlier group.

    Args:
        groups: (name, {doc_id: text}) in order of priority: near duplicates of earlier groups are found.
            Documents of one group are not compared with each other, and a found document is not compared with
            later ones.
        share: the minimum share of the shorter document's runs, in [0, 1].

    Returns:
        By group, {doc_id: (the document that it resembles, share)}; every group is a key.
    """
    index, out = Index(), {}
    for name, texts in groups:
        runs = {doc_id: index.runs(text) for doc_id, text in texts.items()}
        near = {doc_id: index.nearest(r) for doc_id, r in runs.items()}
        out[name] = {doc_id: found for doc_id, found in near.items() if found[1] >= share}
        kept = [doc_id for doc_id in texts if doc_id not in out[name]]
        index.add(kept, [runs[doc_id] for doc_id in kept])
    return out
