"""Splits. A document's split is a pure function of the document, so it is the same in every process."""

import collections
import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence

from nla_jax.data.corpora import Document
from nla_jax.errors import UserError

SPLITS = ("warm", "rl", "heldout", "ood")


def keyed_hash(*parts: object) -> int:
    """Return 64 bits that depend only on the `str` of `parts`. Every random choice of data uses them."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_of(doc: Document, warm: float = 0.75) -> str:
    """Return the split of `doc`: "warm", "rl", "heldout" or "ood".

    Held-out and out-of-domain documents keep the split of their corpus. A hash of the doc_id puts a training
    document into "warm" with probability `warm`, else into "rl". Raising `warm` therefore only moves
    documents from RL to the warm start.

    Raises:
        UserError: `warm` is outside [0, 1].
    """
    if not 0.0 <= warm <= 1.0:
        raise UserError(f"the warm-start share of documents is {warm}: give a number from 0 to 1")
    if doc.split != "train":
        return doc.split
    return "warm" if keyed_hash("split", doc.doc_id) < warm * 2.0**64 else "rl"


def by_split(docs: Iterable[Document], warm: float = 0.75) -> dict[str, list[Document]]:
    """Group documents by split, in their given order; every name of `SPLITS` is a key."""
    out: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for doc in docs:
        out[split_of(doc, warm)].append(doc)
    return out


class Sample:
    """A keyed random sample of n documents from a stream; only the sample is in memory.

    The choice is keyed by (seed, doc_id), so it does not depend on the order, and a smaller n gives a subset.
    `characters` > 0 limits the total length of the documents, which may then be fewer than n.
    """

    def __init__(self, n: int, seed: int, characters: int = 0):
        self.n, self.seed, self.characters = n, seed, characters
        self._heap: list[tuple[int, int, Document]] = []
        self._seen = self._held = 0
        self._full = 2**64  # the smallest removed rank; documents from this rank on are rejected

    def add(self, doc: Document) -> None:
        """Add the next document of the stream."""
        self._seen += 1
        rank = keyed_hash("doc", self.seed, doc.doc_id)
        if rank >= self._full:
            return
        heapq.heappush(self._heap, (-rank, -self._seen, doc))
        self._held += len(doc.text)
        while len(self._heap) > self.n or 0 < self.characters < self._held:
            rank, _, gone = heapq.heappop(self._heap)
            self._held -= len(gone.text)
            self._full = -rank

    def documents(self) -> list[Document]:
        """Return the sample so far, in the order of the stream."""
        return [doc for _, _, doc in sorted(self._heap, key=lambda item: -item[1])]


def check_disjoint(
    doc_ids: Mapping[str, Iterable[str]] | Sequence[tuple[str, Iterable[str]]],
) -> dict[str, int]:
    """Check that no document is in two splits, and return the number of documents by split.

    Args:
        doc_ids: the documents' ids (repeats allowed) by split, as a mapping, or as pairs if one
            split comes from several stores.

    Raises:
        UserError: a document is in two splits; the message gives its id.
    """
    home: dict[str, str] = {}
    for name, ids in doc_ids.items() if isinstance(doc_ids, Mapping) else doc_ids:
        for doc_id in set(ids):
            other = home.setdefault(doc_id, name)
            if other != name:
                raise UserError(
                    f"document {doc_id!r} is in split {other!r} and in split {name!r}: splits must "
                    "not share documents; extract both again with the same corpus and warm share"
                )
    return dict(collections.Counter(home.values()))
