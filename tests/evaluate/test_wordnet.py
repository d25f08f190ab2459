"""Words by WordNet, from the real files; which forms a substitute takes, and what an edit leaves alone."""

import pytest

from nla_jax.evaluate.words import edits, wordnet

TEXT = """A report on a big city of London; the hot weather is a surprise to 3,000 people.
Ends on "the large car", so it needs "a quick answer" from Paris in 2016."""


@pytest.fixture(scope="module")
def wn():
    return wordnet.wordnet()


def test_tables_are_read_once_and_the_most_frequent_sense_is_first(wn):
    assert wordnet.wordnet() is wn
    assert wordnet.synonyms(wn, "a", "big") == ["large"]
    assert "auto" in wordnet.synonyms(wn, "n", "car") and "carriage" not in wordnet.synonyms(wn, "n", "car")
    assert wordnet.synonyms(wn, "n", "nosuchword") == []
    assert wordnet.antonyms(wn, "a", "big")[0] == ["little"]
    assert wordnet.antonyms(wn, "a", "large") == (["small"], ["big"])
    assert wordnet.antonyms(wn, "v", "buy")[0] == ["sell"] and wordnet.antonyms(wn, "n", "city")[0] == []


@pytest.mark.parametrize(
    "word,before,expected",
    [
        ("cities", "", ("n", "city", "s")),
        ("boxes", "", ("n", "box", "s")),
        ("men", "", ("n", "man", "s")),
        ("wolves", "", ("n", "wolf", "s")),
        ("stopped", "", ("v", "stop", "ed")),
        ("said", "", ("v", "say", "ed")),
        ("making", "", ("v", "make", "ing")),
        ("needs", "it", ("v", "need", "s")),
        ("bigger", "", ("a", "big", "er")),
        ("ends", "^", ("v", "end", "s")),
        ("ends", "two", ("n", "end", "s")),
        ("slowly", "", ("r", "slowly", "")),
        ("report", "the", ("n", "report", "")),
        ("report", "to", ("v", "report", "")),
    ],
)
def test_readings(wn, word, before, expected):
    assert wordnet.readings(wn, word, before)[0] == expected


@pytest.mark.parametrize(
    "kind,lemma,ending,expected",
    [
        ("n", "city", "s", "cities"),
        ("n", "box", "s", None),
        ("n", "boss", "s", "bosses"),
        ("n", "wolf", "s", "wolves"),
        ("n", "hero", "s", "heroes"),
        ("n", "photo", "s", None),
        ("v", "stop", "ing", "stopping"),
        ("v", "plan", "ed", "planned"),
        ("v", "visit", "ed", "visited"),
        ("v", "use", "ing", "using"),
        ("v", "agree", "ing", "agreeing"),
        ("v", "lie", "ing", "lying"),
        ("v", "carry", "ed", "carried"),
        ("v", "go", "s", "goes"),
        ("v", "buy", "ed", "bought"),
        ("v", "take", "ed", None),  # took or taken
        ("v", "put", "ed", None),
        ("v", "come", "ed", None),
        ("a", "big", "er", "bigger"),
        ("a", "happy", "est", "happiest"),
        ("a", "nice", "er", "nicer"),
        ("a", "important", "er", None),
    ],
)
def test_inflected(wn, kind, lemma, ending, expected):
    assert wordnet.inflect(wn, kind, lemma, ending) == expected


def test_paraphrase_keeps_places_quotes_names_and_case():
    edited = wordnet.paraphrase(TEXT)
    assert "a large metropolis of London" in edited and '"the big' in edited and "in 2016." in edited
    assert len(edited.split()) == len(TEXT.split()) and edited.count("\n") == 1
    kept = wordnet.paraphrase(TEXT, keep_quotes=True)
    assert edits.quoted_spans(kept) == edits.quoted_spans(TEXT) != edits.quoted_spans(edited)
    assert "a large metropolis of London" in kept and "Stops on" in kept
    assert wordnet.paraphrase("Big cities. The CARS of Big Ben").startswith("Large ")
    assert wordnet.paraphrase("Big cities. The CARS of Big Ben").endswith("The CARS of Big Ben")
    assert wordnet.paraphrase("") == "" and wordnet.paraphrase("xyzzy of the") == "xyzzy of the"
    # The article follows the word.
    assert wordnet.replace_spans("an hour, a big dog", [(11, 14, "enormous")]) == "an hour, an enormous dog"
    assert wordnet.replace_spans('An "old" dog', [(4, 7, "new")]) == 'A "new" dog'


def test_rate_and_seed():
    whole = wordnet.paraphrase(TEXT)
    differ = [a != b for a, b in zip(TEXT.split(), whole.split(), strict=True)]
    for seed in range(4):
        half = wordnet.paraphrase(TEXT, 0.5, seed)
        changed = [a != b for a, b in zip(TEXT.split(), half.split(), strict=True)]
        assert sum(changed) == pytest.approx(sum(differ) / 2, abs=1.5)
        assert half == wordnet.paraphrase(TEXT, 0.5, seed)
    assert len({wordnet.paraphrase(TEXT, 0.5, seed) for seed in range(6)}) > 1
    assert wordnet.paraphrase(TEXT, 0.0) == TEXT


@pytest.mark.parametrize(
    "text,expected,control",
    [
        ("The big city.", "The little city.", "The large city."),
        ("It is a good thing", "It is a bad thing", "It is a great thing"),
        ("They BUY it, he buys it", "They BUY it, he sells it", "They BUY it, he purchases it"),
        ("It is a report", "It is not a report", "It is indeed a report"),
        ("It is not a report", "It is a report", "It is never a report"),
        ("He cannot see", "He can see", "He can never see"),
        ("He doesn't see", "He does see", "He does never see"),
        ("Needs a noun", "Does not need a noun", "Does indeed need a noun"),
        ("It has a gap", "It does not have a gap", "It does indeed have a gap"),
        ("It has needed one", "It has not needed one", "It has indeed needed one"),
        # Not inside a quotation, which mentions a claim and does not make it.
        ('Of "it is", which needs it', 'Of "it is", which does not need it',
         'Of "it is", which does indeed need it'),
        ("Nothing of the kind", "Nothing of the kind", "Nothing of the kind"),
        ("", "", ""),
        # Each line by itself.
        ("A big city\nIt is a report", "A little city\nIt is not a report",
         "A large city\nIt is indeed a report"),
    ],
)
def test_opposite_and_its_control(text, expected, control):
    edited, changes = wordnet.reverse_claims(text)
    assert (edited, wordnet.apply_neutral(text, changes)) == (expected, control)
    assert (edited, changes) == wordnet.reverse_claims(text) and bool(changes) == (text != expected)


def test_hot_is_not_cold():
    edited, changes = wordnet.reverse_claims("a hot day and a large house", 3)
    assert edited == "a cold day and a small house"
    assert [c.opposite for c in changes] == ["cold", "small"]


def test_swapped_entities():
    others = ["It is Berlin or Rome for 12 or 7.5 people.", "Then Oslo said so in 1999", "London again, 2016"]
    edited = wordnet.swap_entities(TEXT, others)
    assert edited == wordnet.swap_entities(TEXT, others)
    assert not any(w in edited for w in ("London", "Paris", "2016", "3,000"))
    plain = lambda t: [w for w in t.split() if w[0].islower()]
    assert plain(edited) == plain(TEXT) and edited.startswith("A report on a big city of ")
    assert len({wordnet.swap_entities(TEXT, others, seed) for seed in range(8)}) > 1
    # The same one by the same; nothing to take from, nothing changed.
    twice = wordnet.swap_entities("of Rome and of Rome", ["in Oslo, in Bonn"]).split()
    assert twice[1] == twice[4] in ("Oslo", "Bonn")
    assert wordnet.swap_entities(TEXT, ["no names here"]) == TEXT
