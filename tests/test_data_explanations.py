import re

import pytest

from nla_jax.data import explanations, lessons
from nla_jax.data.corpora import Document
from nla_jax.errors import UserError

TWO = 'The text is a report about ships and storms.\nIt ends on "the captain", then "said".'


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (TWO, "no opening tag"),
        (f"<explanation>{TWO}", "no closing tag"),
        ("<explanation>only one line</explanation>", "too few lines"),
        ("<explanation>\n\n-\n</explanation>", "too few lines"),
        ("<explanation>Same line\nsame line</explanation>", "repeated line"),
        ("<explanation>a\nb\nc\nd\ne\nf</explanation>", "too many lines"),
        (f"<explanation>{' '.join(map(str, range(120)))}\nb</explanation>", "too long"),
        (f"<explanation>{'the cat sat on ' * 9}\nand more</explanation>", "repeated words"),
    ],
)
def test_unusable_answers(response, reason):
    assert explanations.parse_explanation(response) == (None, reason)


def test_usable_answers():
    for body in (
        TWO,
        "1. " + TWO.replace("\n", "\n2) "),
        "- " + TWO.replace("\n", "\n\n  \u2022 "),
    ):
        answer = f"Sure!\n<explanation>\n{body}\n</explanation> <explanation>x</explanation>"
        assert explanations.parse_explanation(answer) == (TWO, "ok")


def test_shipped_explanations_are_all_usable():
    records = list(explanations.read(explanations.SHIPPED))
    assert len(records) == len({r.id for r in records}) == 3900
    assert sum(r.split == "heldout" for r in records) == 200
    for r in records:
        answer = f"<explanation>\n{r.explanation}\n</explanation>"
        assert explanations.parse_explanation(answer) == (r.explanation, "ok")


def test_instruction_holds_the_text_verbatim():
    message = explanations.instruction("braces {text} {0} stay")
    assert message.count("braces {text} {0} stay") == 1
    assert "</explanation>" in message


def test_lines():
    assert explanations.lines("a\nb\nc", "all") == "a\nb\nc"
    assert explanations.lines("a\nb\nc", "last") == "c"
    assert explanations.lines("a\nb\nc", "last+first") == "a\nc"
    assert explanations.lines("a", "first+last") == "a"
    with pytest.raises(UserError, match='lines=\'middle\': use "all", "first"'):
        explanations.lines("a\nb", "middle")


def test_append_goes_on_after_a_half_written_line(tmp_path):
    doc = Document("d", "words of a document — explained", "train")
    records = [explanations.record_of(i, doc, 0, 5 + i, f"é{i}\nb") for i in range(4)]
    path = tmp_path / "sub" / "e.jsonl"
    assert explanations.append(path, records[:2]) == 2
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:40])
    assert list(explanations.read(path)) == records[:2]
    assert explanations.append(path, records[2:]) == 2
    assert list(explanations.read(path)) == records
    path.write_bytes(b'{"id": 0')
    assert list(explanations.read(path)) == []
    explanations.append(path, records[:1])
    assert list(explanations.read(path)) == records[:1]


def test_bad_files(tmp_path):
    path = tmp_path / "e.jsonl"
    with pytest.raises(UserError, match="no explanations at .*e.jsonl"):
        list(explanations.read(path))
    path.write_text("\n{]\n")
    with pytest.raises(UserError, match=r"e\.jsonl:2: not valid JSON"):
        list(explanations.read(path))
    for line in ('{"id": 1}\n', "[1]\n", '{"id": "x", "row": 1}\n'):
        path.write_text(line)
        with pytest.raises(UserError, match=r"e\.jsonl:1: missing or wrong field"):
            list(explanations.read(path))


TEXT = 'He told "The Daily Star" that the minis'


def test_lessons_quote_the_ends_verbatim():
    following = 'ter said "no" to it all today'
    sizes, wordings = set(), set()
    for row in range(200):
        line = lessons.lesson(TEXT, following, (0, row, 0))
        assert "\n" not in line and "{" not in line
        ends = [n for n in range(2, 7) if f'"{lessons.last_words(TEXT, n)}"' in line]
        nexts = [n for n in range(1, 5) if f'"{" ".join(following.split()[:n])}"' in line]
        assert len(ends) == 1 and len(nexts) >= 1
        sizes.add((ends[0], nexts[-1]))
        wordings.add(re.sub('".*?"', "", line)[:12])
    assert {s[0] for s in sizes} == {2, 3, 4, 5, 6} and {s[1] for s in sizes} == {1, 2, 3, 4}
    assert all("word" in lessons.lesson(TEXT, following, (0, r)) for r in range(20))
    assert len(wordings) >= 3


def test_lessons_at_the_edges():
    for row in range(30):
        assert lessons.lesson("one", "", (row,)).count('"one"') == 1
        assert lessons.lesson("a b", "", (row,)).count('"') == 2
        boundary = lessons.lesson("the end", " of it", (row,))
        assert '"the end"' in boundary and '"of' in boundary
    tagged = lessons.lesson("a </explanation>", " <explanation> b", (0,))
    assert "</explanation>" not in tagged and "<explanation>" not in tagged


def test_lessons_are_a_function_of_seed_row_and_epoch():
    texts = ["one two three four five six seven"] * 40
    following = [" eight nine ten eleven"] * 40
    rows = list(range(40))
    first = lessons.lessons(texts, following, rows, seed=1)
    assert lessons.lessons(texts[::-1], following, rows[::-1], seed=1)[::-1] == first
    assert lessons.lessons(texts, following, rows, seed=2) != first
    other = lessons.lessons(texts, following, rows, seed=1, epoch=1)
    assert other != first and len(set(first)) > 20
    mixed = lessons.lessons(texts, following, rows, seed=1, epoch=[0] * 20 + [1] * 20)
    assert mixed == first[:20] + other[20:]


def test_surface_baseline():
    assert lessons.lesson_last(TEXT, 2) == 'Ends on "the minis"'
    assert lessons.lesson_last("one two", 12) == 'Ends on "one two"'
