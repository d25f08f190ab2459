"""Splits are by document and a pure function of it: the same in any process and any order."""

import collections
import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence

from nla_jax.data.corpora import Document
from nla_jax.errors import UserError

SPLITS = ("warm", "rl", "heldout", "ood")


def keyed_hash(*parts: object) -> int:
    """64 bits that depend only on the `str` of `parts`: behind every random choice about data."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_of(doc: Document, warm: float = 0.75) -> str:
    """The one split that `doc` belongs to: "warm", "rl", "heldout" or "ood".

    Held-out and out-of-domain documents stay what their corpus says. A training document goes to
    the warm start with probability `warm`, else to RL, by a hash of its doc_id: raising `warm` only
    moves documents from RL to the warm start.

    Raises:
        UserError: `warm` outside [0, 1].
    """
    if not 0.0 <= warm <= 1.0:
        raise UserError(f"the warm-start share of documents is {warm}: give a number from 0 to 1")
    if doc.split != "train":
        return doc.split
    return "warm" if keyed_hash("split", doc.doc_id) < warm * 2.0**64 else "rl"


def by_split(docs: Iterable[Document], warm: float = 0.75) -> dict[str, list[Document]]:
    """All documents by split, in their given order; every name of `SPLITS` is a key."""
    out: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for doc in docs:
        out[split_of(doc, warm)].append(doc)
    return out


class Sample:
    """n documents of a stream of any length, of which no more than these are held.

    The choice is keyed on (seed, doc_id): it does not depend on the order, and a smaller n gives a part of
    it. With `characters` the documents are fewer where they would hold more than that together.
    """

    def __init__(self, n: int, seed: int, characters: int = 0):
        self.n, self.seed, self.characters = n, seed, characters
        self._heap: list[tuple[int, int, Document]] = []
        self._seen = self._held = 0
        self._full = 2**64  # the least rank that found no room: nothing from there on is let in again

    def add(self, doc: Document) -> None:
        """The next document of the stream."""
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
        """Those chosen so far, in the order of the stream."""
        return [doc for _, _, doc in sorted(self._heap, key=lambda item: -item[1])]


def check_disjoint(
    doc_ids: Mapping[str, Iterable[str]] | Sequence[tuple[str, Iterable[str]]],
) -> dict[str, int]:
    """Number of documents by split, after making sure that no document is in two.

    Args:
        doc_ids: the documents' ids (repeats allowed) by split, as a mapping or as pairs when one
            split comes from several stores.

    Raises:
        UserError: naming a document found in two splits.
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
