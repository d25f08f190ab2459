"""Text for logs and terminals."""

import re


def short(text: str, n: int = 160) -> str:
    """One line of at most n characters, for logs."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= n else text[: n - 1] + "…"


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters (escape sequences begin with one),
    marks that turn the direction of writing, halves of characters. A model may have written it."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
