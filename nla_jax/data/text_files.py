"""Records of files: .txt, .jsonl and .parquet; the first two may be compressed (.gz, .zst)."""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nla_jax.errors import UserError
from nla_jax.util import paths, utf8

BOM = "\ufeff"  # files that were joined have one inside
PACKED = (".gz", ".zst")
ENCODING = "utf-8-sig"  # a byte order mark is no part of the text
ENDINGS = (".txt", ".jsonl", ".parquet")
_BATCH = 256  # rows of a parquet file in memory at once


def read(
    pattern: str, columns: Callable[[list[str]], list[str]]
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (name, location for messages, fields) of every record in the matching files, sorted by path.

    The name is that of the file. In .jsonl and .parquet files, :NUMBER of the record follows it.

    Args:
      columns: selects the columns to read from those of a parquet file.

    Raises UserError if no file matches, or if one is damaged, of another kind or not UTF-8.
    """
    found = sorted(matching_files(pattern))
    if not found:
        raise UserError(f"no file matches {pattern!r}: check the path, and quote the pattern in a shell")
    for path in found:
        if not _plain(path).endswith(ENDINGS) or (path.endswith(PACKED) and ".parquet" in path):
            raise UserError(
                f"{path}: neither .txt nor .jsonl (maybe with .gz or .zst) nor .parquet; narrow the pattern "
                "of the corpus"
            )
    for path in found:
        yield from _parquet(path, columns) if path.endswith(".parquet") else _text(path)


def matching_files(pattern: str) -> list[str]:
    """Return the files that match a pattern; files in object storage are copied to the cache.

    The file or directory that the pattern's beginning names exactly is meant, even if its name has [ ] or *.
    """
    if not paths.is_remote(pattern):
        found = glob.glob(_escape_existing(os.path.expanduser(pattern)), recursive=True)
        return [p for p in found if os.path.isfile(p)]
    root = paths.path(pattern.split("://")[0] + "://" + pattern.split("://")[1].split("/")[0])
    inside = pattern.split("://")[1].partition("/")[2]
    if "**" in inside:
        raise UserError(f"{pattern}: in object storage ** is not supported; write every level, with *")
    exact = [root / inside] if glob.has_magic(inside) and (root / inside).is_file() else []
    return [str(paths.local_copy(p)) for p in exact or root.glob(inside) if not p.is_dir()]


def directory_of(place: str) -> str:
    """Return the local directory of a data set at DIR[:...], or "" if the place is no directory."""
    if paths.is_remote(place):
        return ""
    parts = (place, place.rpartition(":")[0], place.split(":")[0])
    return next((n for n in parts if n and paths.path(n).is_dir()), "")


def files_of_directory(place: str) -> list[str]:
    """Return all files in `directory_of(place)`."""
    directory = directory_of(place)
    return [str(p) for p in paths.files(paths.path(directory)).values()] if directory else []


def _escape_existing(pattern: str) -> str:
    """Return the pattern with its longest beginning that exists escaped, in whole parts."""
    parts = pattern.split("/")
    for n in range(len(parts), 0, -1):
        start = "/".join(parts[:n])
        if os.path.lexists(start):
            return "/".join([glob.escape(start), *parts[n:]])
    return pattern


def _plain(path: str) -> str:
    """Return the path without .gz or .zst."""
    return os.path.splitext(path)[0] if path.endswith(PACKED) else path


def _open(path: str) -> io.TextIOBase:
    if path.endswith(".zst"):
        import pyarrow as pa

        return io.TextIOWrapper(pa.CompressedInputStream(pa.OSFile(path), "zstd"), ENCODING)
    return gzip.open(path, "rt", encoding=ENCODING) if path.endswith(".gz") else open(path, encoding=ENCODING)


def _text(path: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    base, line_no = os.path.basename(path), 0
    try:
        with _open(path) as f:
            if _plain(path).endswith(".txt"):
                yield base, path, {"text": f.read()}
                return
            for line_no, line in enumerate(f, 1):
                if line.strip():
                    where = f"{path}:{line_no}"
                    yield f"{base}:{line_no - 1}", where, _object(line.removeprefix(BOM), where)
    except UnicodeDecodeError:
        with _open(path) as f:
            at = utf8.first_bad_byte(iter(lambda: f.buffer.read(8192), b""))
        where = f"byte {at}, near line {line_no + 1}"
        raise UserError(f"{path}: not UTF-8 text ({where}): {utf8.CONVERT}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as e:
        raise UserError(
            f"{path}: cannot be read after line {line_no} ({' '.join(str(e).split())[:150]}): copy it again"
        ) from None


def _object(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        reason = getattr(e, "msg", "nested too deeply")
        raise UserError(f"{where}: not valid JSON ({reason}): one object a line is expected") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: no string under "text": one {{"text": ...}} object a line is expected')
    return record


def _parquet(path: str, columns) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    base, row = os.path.basename(path), 0
    try:
        with pq.ParquetFile(path) as f:
            names = f.schema_arrow.names
            wanted = columns(names)
            if not wanted:
                there = ", ".join(names)[:200]
                raise UserError(f'{path}: no column "text" (columns: {there}); name one with ?field=NAME')
            for batch in f.iter_batches(batch_size=_BATCH, columns=wanted):
                for fields in batch.to_pylist():
                    yield f"{base}:{row}", f"{path}, row {row}", fields
                    row += 1
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text (row {row} or after it): convert it first") from None
    except (pa.ArrowException, OSError) as e:
        raise UserError(
            f"{path}: damaged, or not a parquet file ({' '.join(str(e).split())[:150]}): copy it again"
        ) from None
