"""Edits of explanations, as text."""

import pytest

from nla_jax.evaluate.words import edits

TEXT = """A report on "a vote, in parliament"; it passed. Then “cheers”.
Ends on "the committee has", so "voted" or "met"."""


def test_quotes_and_prose_share_the_text_between_them():
    assert edits.quoted_spans(TEXT) == [
        "a vote, in parliament",
        "cheers",
        "the committee has",
        "voted",
        "met",
    ]
    assert edits.keep_quotes(TEXT) == '"a vote, in parliament" “cheers”\n"the committee has" "voted" "met"'
    assert edits.remove_quotes(TEXT) == "A report on ; it passed. Then .\nEnds on , so or ."
    assert edits.keep_quotes("no quote here") == "" == edits.remove_quotes('"all of it"')
    # A quote that is never closed is prose; so is one that would run over a line's end.
    assert edits.quoted_spans('ends on "never closed\nand "so" on') == ["so"]


def test_an_ending_line_is_a_quotation():
    text = 'On "a vote"; it passed.\n… it passed. "The'
    assert edits.quoted_spans(text) == ["a vote", 'it passed. "The']
    assert edits.keep_quotes(text) == '"a vote"\n… it passed. "The'
    assert edits.remove_quotes(text) == "On ; it passed."
    assert edits.claims(text) == ['On "a vote";', "it passed.", '… it passed. "The']
    assert edits.count_verbatim(text, 'in a vote it passed. "The') == (2, 2)
    assert edits.keep_quotes("so … on") == "" == edits.remove_quotes("… on")


def test_words_shuffled_keeps_lines_and_words():
    edited = edits.shuffle_words(TEXT, 3)
    assert edited != TEXT and edited == edits.shuffle_words(TEXT, 3) != edits.shuffle_words(TEXT, 4)
    for a, b in zip(edited.splitlines(), TEXT.splitlines(), strict=True):
        assert sorted(a.split()) == sorted(b.split())


@pytest.mark.parametrize("n", [2, 3, 5])
def test_lines_never_stay_in_order(n):
    text = "\n".join("abcde"[:n])
    for seed in range(9):
        edited = edits.rotate_lines(text, seed)
        assert edited != text and sorted(edited) == sorted(text)
    assert edits.rotate_lines("one line") == "one line" and edits.rotate_lines("") == ""


def test_claims():
    assert edits.claims(TEXT) == [
        'A report on "a vote, in parliament";', "it passed.", "Then “cheers”.",
        'Ends on "the committee has", so "voted" or "met".',
    ]
    # Not inside quotes, not inside a number.
    assert edits.claims('He says "Stop. Go; now" at 3.5 a.m.') == ['He says "Stop. Go; now" at 3.5 a.m.']
    assert edits.claims("") == []
    assert edits.remove_claim("a; b. c", 0) == "b. c"
    assert edits.remove_claim("a; b. c", -1) == "a; b."
    assert edits.remove_claim("only one", 0) == "only one"


def test_verbatim():
    source = "On Monday the Committee's  vote, at last, has"
    assert edits.count_verbatim('"the committee\'s vote" and "at last has" but "itte" or ","', source) == (
        2,
        3,
    )
    assert edits.count_verbatim("nothing quoted", source) == (0, 0)
