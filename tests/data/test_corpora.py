import hashlib
import json

import pytest

from nla_jax.data.corpora import Document, is_heldout, open_corpus
from nla_jax.data.splits import by_split, check_disjoint, keyed_hash, split_of
from nla_jax.data.wikitext import prose
from nla_jax.errors import UserError


@pytest.fixture(scope="module")
def news():
    return open_corpus("news")


def test_news_counts_and_heldout_rule(news):
    assert len(news) == 3477
    assert len({d.doc_id for d in news}) == len({d.text for d in news}) == 3477
    heldout = [d for d in news if d.split == "heldout"]
    assert len(heldout) == 370
    for doc in news:
        first = hashlib.sha256(doc.text.encode("utf-8")).digest()[0]
        assert doc.split == ("heldout" if first < 26 else "train")
    assert all(d.text == " ".join(d.text.split()) for d in news)


def test_news_splits_are_a_partition_and_grow_monotonically(news):
    groups = by_split(news, warm=0.75)
    counts = check_disjoint({name: [d.doc_id for d in docs] for name, docs in groups.items()})
    assert sum(counts.values()) == 3477 and counts["heldout"] == 370 and "ood" not in counts
    assert 0.70 < counts["warm"] / (counts["warm"] + counts["rl"]) < 0.80
    fewer = {d.doc_id for d in by_split(news, warm=0.5)["warm"]}
    assert fewer < {d.doc_id for d in groups["warm"]}
    assert not by_split(news, warm=1.0)["rl"] and not by_split(news, warm=0.0)["warm"]


def test_wikipedia_is_prose_and_out_of_domain():
    docs = open_corpus("wikipedia")
    assert len(docs) > 80 and len({d.doc_id for d in docs}) == len(docs)
    assert {split_of(d) for d in docs} == {"ood"}
    for doc in docs:
        assert not any(mark in doc.text for mark in ("[[", "]]", "{{", "}}", "'''", "<ref", "</"))


def test_prose_of_markup():
    filler = (
        "and so it goes on in plain words for a while, until the paragraph is long enough, " * 2
    )
    markup = (
        "{{Infobox|a={{nested|b}}}}\n'''Albedo''' is a [[ratio|dimensionless ratio]] of "
        "{{convert|12|km|mi}} <ref name=x>{{cite}}</ref>in [[Physics]]<ref name=y/>, "
        + filler
        + "the end.\n== Heading ==\n* a list item\n[[File:x.jpg|thumb|A [[nested]] caption.]]\n"
        "{| class=wikitable\n| cell {| inner |}\n|}\nToo short a paragraph."
    )
    text = prose(markup)
    assert text.startswith("Albedo is a dimensionless ratio of 12 km in Physics, and so it goes")
    assert text.endswith("the end.")


def test_files(tmp_path):
    (tmp_path / "b.txt").write_text("one  two\nthree", "utf-8")
    lines = [{"text": "first doc"}, {"text": "second doc", "id": "x7"}, {"text": "one two three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    docs = open_corpus(f"file:{tmp_path}/*")
    assert [(d.doc_id, d.text) for d in docs] == [
        ("file:a.jsonl:0", "first doc"),
        ("file:a.jsonl:x7", "second doc"),
        ("file:a.jsonl:2", "one two three"),
    ]  # b.txt repeats the last one
    assert all((d.split == "heldout") == is_heldout(d.text) for d in docs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "ok"}\n{"text": \n', r"x\.jsonl:2: not valid JSON"),
        ("x.jsonl", b'{"body": "ok"}\n', r'x\.jsonl:1: no string under "text"'),
        (
            "x.jsonl",
            b'{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n',
            r"x\.jsonl:2: document id",
        ),
        ("x.csv", b"a,b", r"x\.csv: neither \.txt nor \.jsonl"),
        ("x.txt", b"\xff\xfe", r"x\.txt: not UTF-8"),
        ("x.txt", b" \n", "has no usable document"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_corpus(f"file:{tmp_path}/*")


def test_repeated_ids_are_refused_left_out_or_numbered(tmp_path):
    lines = [("a", "one"), ("b", "two"), ("a", "three"), ("a#2", "four"), ("a", "five"), ("b", "two"),
             ("a", "six")]
    text = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in lines)
    (tmp_path / "x.jsonl").write_text(text, "utf-8")
    uri = f"file:{tmp_path}/x.jsonl"
    with pytest.raises(UserError, match=r"x\.jsonl:3: .* already used.*\?repeated=first .*\?repeated=number"):
        open_corpus(uri)
    drops = {}
    first = open_corpus(f"{uri}?repeated=first", drops=drops)
    assert [(d.doc_id.rpartition(":")[2], d.text) for d in first] == [
        ("a", "one"), ("b", "two"), ("a#2", "four")]
    assert drops == {"repeated id": 4}
    # "a#2" is the number of the third record, so the record that has this id is numbered too.
    drops = {}
    found = open_corpus(f"{uri}?repeated=number", drops=drops)
    assert [(d.doc_id.rpartition(":")[2], d.text) for d in found] == [
        ("a", "one"), ("b", "two"), ("a#2", "three"), ("a#2#2", "four"), ("a#3", "five"), ("a#4", "six")]
    assert drops == {"exact duplicate": 1}
    # The option is of one corpus of a mixture.
    (tmp_path / "y.jsonl").write_text(text.replace(': "', ': "other '), "utf-8")
    with pytest.raises(UserError, match=r"y\.jsonl:3: .* was already used"):
        open_corpus(f"mix:0.5*{uri}?repeated=number,0.5*file:{tmp_path}/y.jsonl")
    with pytest.raises(UserError, match="repeated=last: must be first or number"):
        open_corpus(f"{uri}?repeated=last")


def test_unknown_corpus_and_no_match(tmp_path):
    with pytest.raises(UserError, match="unknown corpus 'nwes': use news, wikipedia, file:GLOB"):
        open_corpus("nwes")
    with pytest.raises(UserError, match="no file matches"):
        open_corpus(f"file:{tmp_path}/*.txt")


def test_split_errors():
    doc = Document("d", "text", "train")
    with pytest.raises(UserError, match=r"is 1\.5: give a number from 0 to 1"):
        split_of(doc, 1.5)
    with pytest.raises(UserError, match="document 'b' is in split 'warm' and in split 'rl'"):
        check_disjoint([("warm", ["a", "b"]), ("rl", ["b", "c"])])
    assert check_disjoint([("warm", ["a"]), ("warm", ["a", "b"])]) == {"warm": 2}


def test_keyed_hash_is_pinned_and_separates_its_parts():
    assert keyed_hash("a", "bc") != keyed_hash("ab", "c")
    assert keyed_hash("split", "news:0") == 12440280170764241387  # splits on disk depend on it
