"""The choice of documents to extract from a corpus of any size, in one pass.

Memory holds only the chosen documents.
"""

import collections
from collections.abc import Collection
from typing import NamedTuple

from nla_jax.data import corpora, near_duplicates
from nla_jax.data.corpora import Document
from nla_jax.data.splits import SPLITS, Sample, split_of

# Maximum numbers of held-out documents, and of their characters, that training documents are compared with.
# They include documents without rows, because later evaluations may use them.
HELD_OUT = 10_000
HELD_OUT_CHARACTERS = 100_000_000


class Selection(NamedTuple):
    """The chosen documents in the order of the corpus: `home` by split, and `named` with an explanation.

    `dropped` are the ids of near duplicates. `counts` has "documents" of the corpus by split, "left out" by
    reason, and "near duplicates" by split.
    """

    home: dict[str, list[Document]]
    named: list[Document]
    dropped: frozenset[str]
    counts: dict


def select(
    data, seed: int, tok, named: Collection[str], fresh: tuple[str, int] | None = None
) -> Selection:
    """Choose the documents from which a config draws rows.

    Args:
      data: the `data` part of a config. seed: of the choice. tok: the target's tokenizer.
      named: ids of documents with an explanation; all of them are kept.
      fresh: (split, seed of the choice of its documents), for one split with another seed.

    Raises:
      UserError: as `corpora.documents`.
    """
    # Choose more than needed, because near duplicates are dropped below.
    spare = lambda n: n + bool(data.near_duplicates) * (n // 4 + 16) if n else 0
    sizes = {"warm": spare(data.warm_windows), "rl": spare(data.rl_windows)}
    sizes |= {"heldout": max(data.heldout_rows, 1), "ood": 0}
    samples = {split: Sample(n, seed) for split, n in sizes.items()}
    if fresh:
        samples[fresh[0]] = Sample(sizes[fresh[0]], fresh[1])
    unused = Sample(HELD_OUT, seed, HELD_OUT_CHARACTERS)
    left_out: dict[str, int] = {}
    counts: collections.Counter = collections.Counter()
    explained = []
    for doc in corpora.documents(data.corpus, tok=tok, limit=data.documents, drops=left_out):
        split = split_of(doc, data.warm_fraction)
        counts[split] += 1
        samples[split].add(doc)
        if split == "heldout":
            unused.add(doc)
        if doc.doc_id in named:
            explained.append(doc)
    if data.ood:
        samples["ood"] = Sample(spare(-(-data.ood_rows // data.ood_positions)), seed)
        for doc in corpora.documents(data.ood, tok=tok, drops=left_out):
            counts["ood"] += 1
            samples["ood"].add(doc)
    home = {split: samples[split].documents() for split in SPLITS}
    near = _near(home, explained + unused.documents(), data) if data.near_duplicates else {}
    dropped = frozenset(doc_id for found in near.values() for doc_id in found)
    about = {
        "documents": {s: counts[s] for s in SPLITS if counts[s]},
        "left out": dict(sorted(left_out.items())),
        "near duplicates": {s: len(found) for s, found in near.items() if found},
    }
    home = {split: [d for d in docs if d.doc_id not in dropped] for split, docs in home.items()}
    return Selection(home, [d for d in explained if d.doc_id not in dropped], dropped, about)


def _near(home, more, data) -> dict[str, dict]:
    groups = []
    # Documents of earlier groups are kept, so a held-out document is never dropped.
    for split in ("heldout", "ood", "warm", "rl"):
        texts = {d.doc_id: _words(d) for d in home[split]}
        if split != "rl":
            texts |= {d.doc_id: _words(d) for d in more if split_of(d, data.warm_fraction) == split}
        groups.append((split, texts))
    return near_duplicates.find_near_duplicates(groups, data.near_duplicates)


def _words(doc: Document) -> str:
    """Return the text; of a conversation only the turns, without the chat template's own text."""
    return " ".join(doc.text[a:b] for a, b in doc.spans) if doc.spans else doc.text


def log_line(counts: dict) -> str:
    """Return one line for the log about a corpus, from `Selection.counts`."""
    listed = corpora.list_counts
    return (
        f"corpus: documents {listed(counts['documents'])}; left out: {listed(counts['left out'])}; near "
        f"duplicates of other splits dropped: {listed(counts['near duplicates'])}"
    )
