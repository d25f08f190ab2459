"""Text files that are not UTF-8: one line with the file, the byte and what to do."""

import codecs
from collections.abc import Iterable

from nla_jax.errors import UserError
from nla_jax.util import paths

CONVERT = "convert it first, as with `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`"


def read_text(where) -> str:
    """Read a whole text file. Raises UserError if it is not UTF-8."""
    try:
        return paths.path(where).read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text (byte {e.start}): {CONVERT}") from None


def first_bad_byte(chunks: Iterable[bytes]) -> int | None:
    """Return the offset of the first byte that is not UTF-8 in the joined chunks; None if there is none."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in chunks:
        held = len(decoder.getstate()[0])  # the beginning of a character that the last chunk cut
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as e:
            return at - held + e.start
        at += len(chunk)
    held = len(decoder.getstate()[0])
    return at - held if held else None


def check(text, what: str = "the text") -> None:
    """Raise UserError unless `text` is a string that UTF-8 can encode.

    Python reads arguments and file names whose bytes are not UTF-8 as halves of surrogate pairs.
    """
    if not isinstance(text, str):
        raise UserError(f"{what} must be a string; got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"{what} is not valid Unicode (character {e.start}): its bytes are not UTF-8, or half of a "
            "surrogate pair is missing; decode it with its own encoding first"
        ) from None
