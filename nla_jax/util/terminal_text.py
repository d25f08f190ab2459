"""Format text for logs and terminals."""

import os
import re
import sys


def console():
    """Return a rich Console for stdout. A file or pipe has no width, so there no cell is cut or wrapped."""
    from rich.console import Console

    known = sys.stdout.isatty() or os.environ.get("COLUMNS")
    return Console() if known else Console(width=10_000)


def shorten(text: str, n: int = 160) -> str:
    """Collapse white space and cut the text to one line of at most n characters."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= n else text[: n - 1] + "…"


def replace_unprintable(text: str) -> str:
    """Replace every non-printable character by U+FFFD, because a model may have written `text`.

    A terminal would otherwise execute escape sequences, and obey marks of writing direction."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
