"""README, CONTRIBUTING and docs: lines of prose are short, and numbers begin a line only in lists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WIDTH = 110
# `nla results` writes most pages of docs/results, with samples of any length.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "results")]
NUMBER = re.compile(r"(\d+)[.)]\s")


def prose(text: str) -> list[tuple[int, str]]:
    """The numbered lines of a Markdown page that are not code, tables or pictures."""
    out, fenced = [], False
    for i, line in enumerate(text.split("\n"), 1):
        bare = line.lstrip()
        if bare.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    ") and not bare.startswith(("|", "![")):
            out.append((i, line))
    return out


def too_long(text: str) -> list[int]:
    """Lines of prose over WIDTH; the address of a link does not count."""
    return [i for i, line in prose(text) if len(re.sub(r"\]\([^)\s]*\)", "]", line)) > WIDTH]


def stray_numbers(text: str) -> list[int]:
    """Lines that begin with a number and a dot, and are no item of a list: 1 after an empty line, then on."""
    out, last, before = [], 0, ""
    for i, line in prose(text):
        if found := NUMBER.match(line):
            number = int(found[1])
            if number == (last + 1 if last or not before.strip() else -1):
                last = number
            else:
                out.append(i)
        elif line.strip() and not line.startswith(" "):
            last = 0
        before = line
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_lines_of_prose_are_short(page):
    text = page.read_text("utf-8")
    assert (too_long(text), stray_numbers(text)) == ([], [])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_what_counts_as_a_long_line():
    long = "a " * 60
    assert too_long(f"{long}\n\n- {long}") == [1, 3]
    assert too_long(f"```\n{long}\n```\n\n    {long}\n| {long} |\n![{long}](x.png)") == []
    assert too_long(f"[here](https://{'x' * 120})") == []


def test_what_counts_as_a_stray_number():
    assert stray_numbers("One\n\n1. a\n   more\n2. b\n\n    code\n\n3. c") == []
    assert stray_numbers("It took until\n1954. Then") == [2]
    assert stray_numbers("It took about\n1. Then") == [2]
