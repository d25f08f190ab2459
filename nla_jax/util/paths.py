"""Paths in a file system or in object storage (gs://bucket/dir), by etils.epath.

`path` returns either kind. Both have the methods of pathlib that this package uses. For libraries that need
a local file, `local_copy` downloads a copy to read, and `upload_after` uploads what was written. `~` at the
beginning is the home directory everywhere.
"""

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from nla_jax.errors import UserError


def is_remote(where) -> bool:
    """Return whether a path or string is in object storage (has a "://")."""
    return "://" in str(where)


def expand(where) -> str:
    """Return a path or URI as a string, with the home directory for `~` at its beginning. Raises UserError if
    there is no home directory."""
    found = os.path.expanduser(str(where))
    if found == "~" or found.startswith("~/"):
        raise UserError(f"{where}: {_NO_HOME}, or write the whole path (NLA_CACHE for the cache)")
    return found


def path(where) -> Path:
    """Return a `Path`, or an `epath.Path` in object storage.

    Raises UserError when the scheme is not gs or s3, or when its package is not installed.
    """
    if not is_remote(where):
        return Path(expand(where))
    from etils import epath

    _check_backend(str(where).split("://")[0])
    return epath.Path(str(where))


@functools.cache
def _check_backend(scheme: str) -> None:
    """Check that etils.epath has a backend: TensorFlow if it is installed, else fsspec's packages."""
    if scheme not in ("gs", "s3"):
        raise UserError(f"{scheme}:// is not supported: give a directory, or gs://BUCKET/PATH")
    if importlib.util.find_spec("tensorflow"):
        return
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as e:
        raise UserError(
            f"{scheme}:// cannot be reached ({' '.join(str(e).split())[:200]}); for gs:// pip install "
            "'nla_jax[gcs]', or mount the bucket as a directory"
        ) from e


def absolute(where) -> Path:
    """Return `path(where)` as an absolute path."""
    return path(where) if is_remote(where) else path(where).absolute()


def same_place(a: str, b: str, begins_at: str = "") -> bool:
    """Return whether two spellings name one place. `a` is relative to `begins_at`, `b` to this directory."""

    def place(where, start):
        return where if is_remote(where) else os.path.realpath(os.path.join(start, path(where)))

    return a == b or (bool(a and b) and place(a, begins_at) == place(b, ""))


@contextlib.contextmanager
def whole(where: Path, mark: str = "") -> Iterator[Path]:
    """Yield a temporary path for a file; it replaces `where` when the block ends without an error.

    mark: a suffix for this writer, if several processes may write the same file at once.
    """
    if is_remote(where):  # objects appear whole
        with upload_after(where) as place:
            yield place
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    part = where.with_name(f"{where.name}{mark}.part")
    yield part
    os.replace(part, where)


def write(where: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    # Another process may write at the same time. Containers that share a disk may have the same process ids.
    with whole(where, f".{uuid.uuid4().hex[:12]}") as part:
        part.write_text(text, "utf-8")


def remove(where: Path) -> None:
    """Remove a directory tree if it exists."""
    if is_remote(where):
        where.rmtree(missing_ok=True)
    else:
        shutil.rmtree(where, ignore_errors=True)


def files(where: Path) -> dict[str, Path]:
    """Return every file under a directory as {relative POSIX path: path}, sorted."""
    found = {p.relative_to(where).as_posix(): p for p in _walk(where)}
    return dict(sorted(found.items()))


def _walk(where: Path) -> Iterator[Path]:
    for inside in where.iterdir() if where.is_dir() else ():
        if inside.is_dir():
            yield from _walk(inside)
        else:
            yield inside


def size(where: Path) -> int:
    """Return the size of a file in bytes."""
    found = where.stat()
    return found.length if is_remote(where) else found.st_size


WHOLE, BLOCK, BLOCKS = 64 << 20, 4096, 512


def digest(where: Path) -> str:
    """Return a SHA-256 of a local file's size and bytes.

    Of a file over WHOLE bytes it reads only blocks of BLOCK bytes: one per MiB, or BLOCKS of them if that is
    more than BLOCKS. A matrix of a model is larger than the distance of two blocks.
    """
    found = hashlib.sha256(str(size(where)).encode())
    step = max(1 << 20, size(where) // BLOCKS)
    with open(where, "rb") as f:
        if size(where) <= WHOLE:
            while part := f.read(1 << 20):
                found.update(part)
        else:
            for at in [*range(0, size(where), step), size(where) - BLOCK]:
                f.seek(at)
                found.update(f.read(BLOCK))
    return found.hexdigest()


def digest_all(where: Path) -> str:
    """Return a SHA-256 of a local file, or of the names and bytes of all files in a directory."""
    if not where.is_dir():
        return digest(where)
    listed = "".join(f"{name}:{digest(p)}\n" for name, p in files(where).items())
    return hashlib.sha256(listed.encode()).hexdigest()


@functools.cache
def _links() -> Path:
    made = tempfile.mkdtemp(prefix="nla_jax-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@functools.cache
def _link(directory: Path) -> Path:
    link = _links() / uuid.uuid4().hex[:8]
    link.symlink_to(directory, target_is_directory=True)
    return link


def plain(directory: Path) -> Path:
    """Return a path of the same directory that Orbax, TensorStore and TFDS can use: itself, or a link to it.

    They put paths into patterns and templates, take "\\" for "/", and /gs for a bucket. Processes of a pod
    may get different links.
    """
    if is_remote(directory):
        return directory
    directory = Path(os.path.realpath(directory)) if _is_odd(directory.absolute()) else directory.absolute()
    return _link(directory) if _is_odd(directory) else directory


def _is_odd(where: Path) -> bool:
    return bool(set(str(where)) & set("*?[]{}\\")) or where.parts[1:2] in [("gs",), ("s3",), ("az",), ("hf",)]


def shown(where) -> str:
    """Return a path for a message: that of the directory, if `where` is in a link of `plain`."""
    linked = _link.cache_info().currsize and str(where).startswith(str(_links()))
    return os.path.realpath(where) if linked else str(where)


def copy(source: Path, to: Path) -> None:
    """Copy a file or a directory tree; either end may be in object storage."""
    for name, found in (files(source) if source.is_dir() else {"": source}).items():
        place = to / name if name else to
        place.parent.mkdir(parents=True, exist_ok=True)
        with found.open("rb") as a, place.open("wb") as b:
            shutil.copyfileobj(a, b, 1 << 20)


def local_copy(where) -> Path:
    """Return a local path: `where` itself, or a copy in the cache of what is in object storage.

    The copy is updated: files of another size or time are downloaded, deleted files are deleted. Raises
    UserError when the object does not exist.
    """
    if not is_remote(where):
        return path(where)

    source, to = path(where), cache_dir() / "copies" / str(where).replace("://", "/")
    if not source.exists():
        raise UserError(f"{where} does not exist")
    wanted = {to / name: p for name, p in files(source).items()} if source.is_dir() else {to: source}
    for place, found in wanted.items():
        now = found.stat()
        if place.is_file() and (place.stat().st_size, int(place.stat().st_mtime)) == (now.length, now.mtime):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as scratch:
            copy(found, part := Path(scratch) / "file")
            os.utime(part, (now.mtime, now.mtime))
            os.replace(part, place)
    if to.is_dir():
        for old in [p for p in files(to).values() if p not in wanted and ".part-" not in str(p)]:
            old.unlink(missing_ok=True)
    return to


@contextlib.contextmanager
def upload_after(where) -> Iterator[Path]:
    """Yield the local path to write to, for a file or directory that belongs at `where`.

    If `where` is in object storage, this is a temporary path, uploaded when the block ends without error."""
    if not is_remote(where):
        yield path(where)
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / path(where).name
        yield place
        copy(place, path(where))


def cache_dir() -> Path:
    """Return the cache of downloads: $NLA_CACHE, else $XDG_CACHE_HOME/nla_jax, else ~/.cache/nla_jax.

    A bucket (gs://) in NLA_CACHE is used for compiled programs only (`programs_dir`), because the other
    files are memory-mapped. Raises UserError if it needs a home directory and there is none.
    """
    if (chosen := os.environ.get("NLA_CACHE")) and not is_remote(chosen):
        return path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return path(base) / "nla_jax"


def require_home(variable: str) -> None:
    """Raise UserError if a library needs a home directory, because `variable` is not set, and there is none.

    Libraries would make a directory that is called ~."""
    if not os.environ.get(variable) and os.path.expanduser("~").startswith("~"):
        raise UserError(f"{_NO_HOME}, or set {variable}")


_NO_HOME = (
    f"there is no home directory (HOME is not set, or user {os.getuid()} is unknown to the system): set HOME "
    "to a directory that you can write"
)


def programs_dir() -> str:
    """Return the directory of XLA's persistent compilation cache, which the hosts of a pod may share."""
    chosen = os.environ.get("NLA_CACHE", "")
    return str((path(chosen) if is_remote(chosen) else cache_dir()) / "xla")


def link_file(source: Path, to: Path) -> None:
    """Make a hard link, or a copy where the file system does not allow one."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, to)
    except OSError:
        copy(source, to)
