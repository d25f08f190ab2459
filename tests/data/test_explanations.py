import dataclasses
import json

import pytest

from nla_jax import prompts
from nla_jax.data import explanations, lessons
from nla_jax.data.corpora import Document
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import tiny, vocabularies

TWO = 'The text is a report about ships and storms.\nIt ends on "the captain", then "said".'


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (f"<think>I write <explanation>{TWO}</explanation>", "unfinished thinking"),
        (f"analysisI write <explanation>{TWO}</explanation>", "unfinished thinking"),
        (f"<think>I write <explanation>{TWO}</explanation></think>Done.", "no opening tag"),
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
    said = "A recall of 193,611 vehicles (in all) by BMW: defective airbags, 18:30 today\nb\n… x, y"
    assert explanations.lines(said, "headline") == "A recall of 193,611 vehicles"
    assert explanations.lines("Recall at 18:30, with more", "headline") == "Recall at 18:30"
    assert explanations.lines("No mark here", "headline") == "No mark here"
    with pytest.raises(UserError, match='lines=\'middle\': use "all", "headline", "first"'):
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


def line_of(record, **more) -> bytes:
    return json.dumps(dataclasses.asdict(record) | more).encode()


def test_a_whole_last_line_without_newline_is_read_and_stays(tmp_path):
    doc, path = Document("d", "words of a document", "train"), tmp_path / "e.jsonl"
    one, two, three = (explanations.record_of(i, doc, 0, 5 + i, "a\nb") for i in range(3))
    path.write_bytes(line_of(one) + b"\n" + line_of(two))
    assert list(explanations.read(path)) == [one, two]
    explanations.append(path, [three])
    assert path.read_bytes() == line_of(one) + b"\n" + line_of(two) + b"\n" + line_of(three) + b"\n"
    # A line longer than a block of the search for its beginning.
    long = dataclasses.replace(one, explanation="word " * 40_000)
    path.write_bytes(line_of(two) + b"\n" + line_of(long))
    explanations.append(path, [three])
    assert list(explanations.read(path)) == [two, long, three]


@pytest.mark.parametrize("torn", [b'{"doc_id": "d", "star', b"a note of mine", b'[{"id": 0}'])
def test_nobody_elses_last_line_is_cut(tmp_path, torn):
    doc, path = Document("d", "words of a document", "train"), tmp_path / "e.jsonl"
    one = explanations.record_of(0, doc, 0, 5, "a\nb")
    path.write_bytes(line_of(one) + b"\n" + torn)
    with pytest.raises(UserError, match=r"e\.jsonl: its last line is not complete: correct or remove it"):
        explanations.append(path, [one])
    assert path.read_bytes() == line_of(one) + b"\n" + torn


def test_a_file_of_another_system_reads_the_same(tmp_path):
    """With a byte order mark and carriage returns, between the lines and within the words."""
    doc, path = Document("d", "words of a document", "train"), tmp_path / "e.jsonl"
    records = [explanations.record_of(i, doc, 0, 5 + i, "a\nb") for i in range(3)]
    lines = [line_of(r, explanation=e) for r, e in zip(records, ["a\r\nb", "a\rb", "a\nb"], strict=True)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert list(explanations.read(path)) == records
    explanations.append(path, records)
    assert list(explanations.read(path)) == records * 2


def test_bad_files(tmp_path):
    path = tmp_path / "e.jsonl"
    with pytest.raises(UserError, match="no explanations at .*e.jsonl"):
        list(explanations.read(path))
    path.write_text("\n{]\n")
    with pytest.raises(UserError, match=r"e\.jsonl:2: not valid JSON"):
        list(explanations.read(path))
    path.write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(UserError, match=r"e\.jsonl:1: not UTF-8 text \(byte 8 of the line\): convert it"):
        list(explanations.read(path))
    for line in ('{"id": 1}\n', "[1]\n", '{"id": "x", "row": 1}\n'):
        path.write_text(line)
        with pytest.raises(UserError, match=r"e\.jsonl:1: missing or wrong field"):
            list(explanations.read(path))


TEXT = 'He told "The Daily Star" that the minis'


@pytest.fixture(scope="module")
def tok():
    """Byte-level: " the" and " of" are one token each; another word has one for each byte and its space."""
    return tiny.tokenizer()


def test_the_ending_line_quotes_the_last_words_bare():
    assert lessons.quote_words(TEXT, 2) == "… the minis"
    assert lessons.quote_words("one  two\nthree", 12) == "… one two three"
    assert lessons.quote_words(" \n", 3) == lessons.quote_words("", 3) == ""
    assert lessons.quote_words("a <explanation> b </explanation>", 4) == (
        "… a < explanation> b < /explanation>")
    assert explanations.parse_explanation(f"{prompts.OPEN}a\nb\n{lessons.quote_words('x </explanation>', 2)}"
                                          f"{prompts.CLOSE}")[1] == "ok"


@pytest.mark.parametrize(
    "most,words", [(1, 1), (2, 2), (6, 2), (7, 3), (8, 3), (9, 4), (11, 4), (12, 5), (99, 5)])
def test_as_many_last_words_as_the_tokens_allow(tok, most, words):
    """From the end: " the" and " of" have one token each, " some" five, " a" two, " is" three."""
    line = "… " + " ".join("is a some of the".split()[-words:])
    assert lessons.quote_ends(tok, ["is a some of the", "is a\tsome of  the"], most) == [line, line]


def test_ending_lines_at_the_edges(tok):
    def ends(*texts, most=3):
        return lessons.quote_ends(tok, texts, most)

    assert ends() == [] and ends("", " \n ", "of") == ["", "", "… of"]
    # At least a word's end, where even the last word has more tokens.
    assert ends("of abcdefgh") == ["… fgh"] and ends("日本語") == ["… 語"]
    assert ends("x </explanation>", most=40) == ["… x < /explanation>"]
    many = [TEXT[:n] for n in range(len(TEXT))]
    assert ends(*many) == [ends(text)[0] for text in many]


@pytest.mark.parametrize("kind", list(vocabularies.KINDS))
def test_words_cost_what_they_cost_inside_an_explanation(kind):
    """Llama 2's tokenizer puts a space before a text: it is not counted."""
    tok = vocabularies.reference(kind)
    text = "the report says that the senator of the city has been seen"
    for most in (3, 6, 12):
        (line,) = lessons.quote_ends(tok, [text], most)
        n = len(line.split()) - 1
        spent = len(tok_lib.inner_ids(tok, line)) - len(tok_lib.inner_ids(tok, lessons.MARK))
        longer = tok_lib.inner_ids(tok, lessons.quote_words(text, n + 1))
        assert line == lessons.quote_words(text, n) and spent <= most
        assert len(longer) - len(tok_lib.inner_ids(tok, lessons.MARK)) > most


def test_description_and_ending_line_come_apart_and_together():
    said = "A report.\nIt goes on.\n… of the end"
    assert lessons.split_end(said) == ("A report.\nIt goes on.", "of the end")
    assert lessons.split_end("… of the end") == ("", "of the end")
    assert lessons.split_end(TWO) == (TWO, "") and lessons.split_end("") == ("", "")
    # A line with the mark that is not the last one is a line like any other.
    assert lessons.split_end("… a\nb") == ("… a\nb", "")
    assert lessons.join_end(TWO, "… x y") == f"{TWO}\n… x y"
    assert lessons.join_end(said, "… x y") == "A report.\nIt goes on.\n… x y"
    assert lessons.join_end(said, "") == said
    assert lessons.join_end("", "… x") == "… x" and lessons.join_end("… x", "… y") == "… y"


def test_a_writer_may_give_an_ending_line_or_none():
    """It is no line of the description: neither counted nor chosen."""
    for given, kept in (
        ("… the captain", "\n… the captain"), ("... the captain", "\n… the captain"), ("…the", "\n… the"),
        ("…", ""), ("...", ""), ("", ""),
    ):
        assert explanations.parse_explanation(f"<explanation>{TWO}\n{given}\n</explanation>") == (
            TWO + kept, "ok")
    five = "a\nb\nc\nd\ne"
    assert explanations.parse_explanation(f"<explanation>{five}\n… x</explanation>")[1] == "ok"
    short = "<explanation>one line\n… x y</explanation>"
    assert explanations.parse_explanation(short) == (None, "too few lines")
    long = "<explanation>a\nb\n… " + " ".join(map(str, range(118))) + "</explanation>"
    assert explanations.parse_explanation(long) == (None, "too long")
    assert explanations.lines("a\nb\nc\n… x", "first") == "a"
    assert explanations.lines("a\nb\nc\n… x", "last") == "c"
    assert explanations.lines("a\nb\nc\n… x", "first+last") == "a\nc"
    assert explanations.lines("a\nb\nc\n… x", "all") == "a\nb\nc\n… x"
    assert explanations.lines("… x", "first") == ""


def test_the_instruction_asks_for_what_is_parsed():
    order = ["First line: what the text is", "Then: what has just happened", "guesses of the next words",
             f'"{lessons.MARK} " and the exact last few words']
    message = " ".join(explanations.INSTRUCTION.split())
    at = [message.index(part) for part in order]
    assert at == sorted(at)
