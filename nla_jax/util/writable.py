"""Check that files and directories can be written, before minutes of work."""

import os
import tempfile
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.util import paths


def check_directory(directory) -> None:
    """Raise UserError if a directory could not be made or written. Call this before minutes of work.

    Nothing is left behind, and missing directories are not made. Object storage is not checked.
    """
    if not paths.is_remote(directory):
        _try_to_write(paths.absolute(directory), directory)


def _try_to_write(place: Path, named) -> None:
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise UserError(
            f"cannot write {named} ({place}: {e.strerror or e}); choose another place, or change its "
            "permissions"
        ) from None


def check_output(file, makes_directory: bool = False) -> None:
    """Raise UserError if a file could not be written, as `check_directory`.

    makes_directory: whether the file's directory is made if it does not exist.
    """
    if paths.is_remote(file):
        return
    place = paths.absolute(file)
    if place.is_dir():
        raise UserError(f"{file} is a directory; name a file")
    if not makes_directory and not place.parent.is_dir():
        raise UserError(f"{file}: there is no directory {place.parent}; create it first")
    _try_to_write(place.parent, file)
    if place.exists() and not os.access(place, os.W_OK):
        raise UserError(f"cannot write {file}; choose another name, or change its permissions")


def check_outputs(*given) -> None:
    """Raise UserError if one of the files that a command was given could not be written.

    "" is none, and "-" is the standard output."""
    for file in given:
        if file and file != "-":
            check_output(file)
