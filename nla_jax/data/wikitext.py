"""Extraction of prose from Wikipedia's markup. It is no complete renderer."""

import html
import re

MIN_PARAGRAPH_WORDS = 30

_COMMENT = re.compile(r"<!--.*?-->", re.S)
_DROPPED = "ref|math|gallery|timeline|table|source|syntaxhighlight|pre|code|imagemap|score|chem"
_ELEMENT = re.compile(rf"<({_DROPPED})\b[^<>]*?(?:/>|>.*?</\1\s*>)", re.S | re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]")
_HEADING = re.compile(r"^=+.*?=+\s*$", re.M)
_NAMESPACED = re.compile(r"\s*:?(?:file|image|category|media|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.I)
_DASH = {
    "mdash": "\u2014",
    "ndash": "\u2013",
    "snd": " \u2013 ",
    "spaced ndash": " \u2013 ",
    "nbsp": " ",
}


def _template(match: re.Match) -> str:
    """Return the words of the few templates that occur inside sentences, and "" for all others."""
    name, *args = (part.strip() for part in match[1].split("|"))
    args = [a for a in args if not re.match(r"[\w-]+\s*=", a)]
    name = name.lower()
    if name in _DASH:
        return _DASH[name]
    if name in ("convert", "cvt") and len(args) >= 2:
        return f"{args[0]} {args[1]}"
    if name in ("lang", "transl") and len(args) >= 2:
        return args[-1]
    if name in ("nowrap", "nobr", "small", "em", "'", '"', "sic") and args:
        return args[0]
    if name in ("circa", "c.") and args:
        return f"c. {args[0]}"
    if name == "as of" and args:
        return f"As of {args[0]}"
    return ""


def _link(match: re.Match) -> str:
    if _NAMESPACED.match(match[1]):
        return ""
    return match[1].rsplit("|", 1)[-1]


def _until_stable(pattern: re.Pattern, replacement, text: str) -> str:
    """Substitute until nothing matches, because nested constructs match from the inside out."""
    while True:
        text, n = pattern.subn(replacement, text)
        if not n:
            return text


def prose(markup: str) -> str:
    """Return the article's paragraphs of at least 30 words, joined to one line of text.

    Headings, lists, tables, notes, formulas and images are left out.
    """
    text = _COMMENT.sub("", markup)
    text = _ELEMENT.sub("", text)
    text = _until_stable(_TEMPLATE, _template, text)
    text = _until_stable(_TABLE, "", text)
    text = _until_stable(_LINK, _link, text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _HEADING.sub("\n", text)
    text = html.unescape(_TAG.sub("", text)).replace("'''", "").replace("''", "")
    text = re.sub(r"\(\s*[,;:]?\s*\)", "", text)
    text = re.sub(r"\(\s*[,;:]\s*", "(", text)
    text = re.sub(r"[ \t\u00a0]+([,.;:)])", r"\1", text)
    kept = []
    for line in text.split("\n"):
        words = line.split()
        if (
            len(words) >= MIN_PARAGRAPH_WORDS
            and not re.search(r"\{\{|\}\}|\[\[|\]\]|</", line)  # markup that did not close
            and line[0] not in "*#:;|!{}=<"
            and line.rstrip()[-1] in ".!?\"'"
        ):
            kept.append(" ".join(words))
    return " ".join(kept)
