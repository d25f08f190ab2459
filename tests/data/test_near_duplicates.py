"""Near duplicates across splits are found, counted and dropped, and never a held-out document."""

import collections
import json
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_jax import configs
from nla_jax.data import corpora, document_choice, near_duplicates, split_requests
from nla_jax.data.corpora import Document, open_corpus
from nla_jax.data.splits import by_split, split_of
from nla_jax.errors import UserError
from nla_jax.pipeline import config_checks
from tests.helpers import tiny

SYSTEM = " ".join(f"rule{i}" for i in range(40))


def runs(text: str, n: int = near_duplicates.RUN) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def share(a: str, b: str) -> float:
    """The same, from the words themselves."""
    return len(runs(a) & runs(b)) / min(len(runs(a)), len(runs(b)))


# Texts of a few long phrases, so that many share some of them.
PHRASE = st.integers(0, 5).map(lambda i: " ".join(f"{'abcdef'[i]}{j}" for j in range(9 + i)))
TEXT = st.lists(PHRASE, min_size=1, max_size=4).map(" ".join)
GROUPS = st.lists(st.lists(TEXT, max_size=5), min_size=2, max_size=4)


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_what_stays_shares_little_with_earlier_groups(groups, limit):
    named = [(f"g{i}", {f"{i}.{j}": t for j, t in enumerate(g)}) for i, g in enumerate(groups)]
    found = near_duplicates.find_near_duplicates(named, limit)
    assert not found["g0"]
    kept = [{k: t for k, t in texts.items() if k not in found[name]} for name, texts in named]
    earlier: dict[str, str] = {}
    for (name, texts), left in zip(named, kept, strict=True):
        for text in left.values():
            assert all(share(text, other) < limit for other in earlier.values())
        for doc_id, (other, measured) in found[name].items():
            assert measured == pytest.approx(share(texts[doc_id], earlier[other])) and measured >= limit
        earlier |= left


def test_runs_of_short_texts_and_of_text_without_spaces():
    index = near_duplicates.Index()
    assert len(index.runs("one two")) == 1 and len(index.runs(" ".join("abcdefghi"))) == 2
    assert (index.runs("one two") != index.runs("two one")).all()
    chinese = "".join(chr(0x4E00 + i) for i in range(100))
    index.add(["zh"], [index.runs(chinese)])
    assert index.nearest(index.runs(chinese[:50])) == ("zh", 1.0)
    assert index.nearest(index.runs("nothing of this")) == ("", 0.0)
    assert near_duplicates.Index().nearest(index.runs("empty index")) == ("", 0.0)


@pytest.fixture(scope="module")
def news():
    return open_corpus("news")


def data(**changes):
    return types.SimpleNamespace(**{
        "corpus": "news", "documents": 0, "near_duplicates": 0.2, "warm_fraction": 0.75, "warm_windows": 3000,
        "rl_windows": 3000, "heldout_rows": 200, "ood": "", "ood_rows": 0, "ood_positions": 1, **changes,
    })


def test_no_news_of_training_repeats_a_held_out_article(news, monkeypatch):
    monkeypatch.setattr(document_choice.corpora, "documents", lambda uri, **_: iter(news))
    before = by_split(news)
    found = document_choice.select(data(), 0, None, frozenset())
    assert len(before["heldout"]) == 370
    # Also those that are not evaluated now are kept apart.
    assert len(found.home["heldout"]) == 200 and set(found.home["heldout"]) <= set(before["heldout"])

    def leaks(training):
        """Held-out articles of which one of these has a fifth of the runs of eight words."""
        sets = {d.doc_id: runs(d.text) for d in before["heldout"]}
        owners: dict = {}
        for doc_id, s in sets.items():
            for run in s:
                owners.setdefault(run, []).append(doc_id)
        leaked = set()
        for doc in training:
            hits = collections.Counter(o for run in runs(doc.text) for o in owners.get(run, ()))
            leaked |= {o for o, n in hits.items() if n >= 0.2 * len(sets[o])}
        return len(leaked)

    assert leaks(before["warm"] + before["rl"]) == 17
    assert leaks(found.home["warm"] + found.home["rl"]) == 0
    assert found.counts["near duplicates"] == {"warm": 26, "rl": 34}
    assert len(found.dropped) == 60
    off = document_choice.select(data(near_duplicates=0.0), 0, None, frozenset())
    assert off.home["warm"] == before["warm"] and off.counts["near duplicates"] == {}


def corpus(tmp_path, n=40, copies=12):
    """Documents of random words; some training documents hold half of a held-out one."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 9999, 40)) for _ in range(n)]
    docs = [Document(f"d{i}", t, "heldout" if i % 3 == 0 else "train") for i, t in enumerate(texts)]
    copied = [d.text for d in docs if d.split == "heldout"][:copies]
    return docs + [
        Document(f"copy{i}", t[: len(t) // 2] + f" and more of copy {i}", "train")
        for i, t in enumerate(copied)
    ]


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 3), st.integers(0, 30))
def test_the_choice_does_not_depend_on_order(rng, seed, wanted):
    docs = corpus(None)
    mixed = docs[:]
    rng.shuffle(mixed)
    with pytest.MonkeyPatch.context() as patch:
        outs = []
        for stream in (docs, mixed):
            patch.setattr(document_choice.corpora, "documents", lambda uri, stream=stream, **_: iter(stream))
            d = data(warm_windows=wanted, rl_windows=wanted)
            outs.append(document_choice.select(d, seed, None, frozenset({"copy0", "d0"})))
    one, two = outs
    assert {s: set(g) for s, g in one.home.items()} == {s: set(g) for s, g in two.home.items()}
    assert one.counts == two.counts and set(one.named) == set(two.named) and one.dropped == two.dropped
    if split_of(next(d for d in docs if d.doc_id == "copy0")) == "warm":
        assert "copy0" in one.dropped
    assert [d.doc_id for d in one.named] == ["d0"] or "copy0" not in one.dropped
    texts = {s: [d.text for d in g] for s, g in one.home.items()}
    for a, b in [("heldout", "warm"), ("heldout", "rl"), ("warm", "rl")]:
        assert all(share(x, y) < 0.2 for x in texts[a] for y in texts[b])


def test_others_take_the_places_of_those_dropped(tmp_path, monkeypatch):
    docs = corpus(None)
    monkeypatch.setattr(document_choice.corpora, "documents", lambda uri, **_: iter(docs))
    settings = dict(
        explanations="", warm_windows=10, rl_windows=4, window_tokens=48, positions=2, min_position=8,
        heldout_rows=6, cuts_per_text=1, explained_rows=0,
    )
    tok = tiny.tokenizer()
    out, drops, about = split_requests.requests(data(**settings), 0, tok)
    assert {s: len(r) for s, r in out.items()} == {"warm": 10, "rl": 4, "heldout": 6}
    assert drops == {} and sum(about["near duplicates"].values()) > 3
    ids = {r.doc_id for s in ("warm", "rl") for r in out[s]}
    assert any(i.startswith("copy") for i in {d.doc_id for d in docs} - ids)
    assert not any(i.startswith("copy") for i in ids)
    line = document_choice.log_line(about)
    assert "near duplicates of other splits dropped: " in line and " warm" in line and "\n" not in line


@pytest.mark.parametrize("changes, message", [
    ({}, "has no document for split 'warm'"),
    ({"warm_windows": 0, "rl_windows": 0}, "has no held-out document"),
])
def test_conversations_that_the_template_refuses_are_not_too_short(tmp_path, changes, message):
    tok, talk = tiny.tokenizer(), [{"role": "user", "content": "of the text"}]
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "c.jsonl").write_text((json.dumps({"conversation": talk}) + "\n") * 3, "utf-8")
    settings = dict(corpus=f"chat:file:{tmp_path}/c.jsonl", explanations="", window_tokens=48, min_position=8)
    with pytest.raises(UserError, match=message + r" \(left out: 3 refused by the chat template\): "):
        split_requests.requests(data(**settings | changes), 0, tok)


def test_conversations_all_the_way_to_requests(tmp_path):
    """What is compared is what was said: a system prompt that all have in common is no resemblance."""
    rng = np.random.default_rng(1)
    talks = [[" ".join(f"w{w}" for w in rng.integers(0, 9999, 30)) for _ in range(2)] for _ in range(60)]
    held_out = lambda talk: corpora.is_heldout("\x1f".join([SYSTEM, *talk]))
    first = next(talk for talk in talks if held_out(talk))
    more = ([*first, f"and {i} more"] for i in range(99))
    talks.append(next(talk for talk in more if not held_out(talk)))
    lines = [
        json.dumps({"conversation": [{"role": "system", "content": SYSTEM}] + [
            {"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(talk)]})
        for talk in talks
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    settings = dict(
        corpus=f"chat:file:{tmp_path}/c.jsonl", explanations="", window_tokens=96, positions=3,
        min_position=8, warm_windows=20, rl_windows=5, heldout_rows=2, cuts_per_text=1, explained_rows=0,
    )
    tok = tiny.tokenizer()
    out, _, about = split_requests.requests(data(**settings), 0, tok)
    assert about["near duplicates"] in ({"warm": 1}, {"rl": 1})
    assert {s: len(r) for s, r in out.items()} == {"warm": 20, "rl": 5, "heldout": 2}
    whole = {d.doc_id: d for d in corpora.open_corpus(settings["corpus"], tok=tok)}
    assert "file:c.jsonl:60" not in {r.doc_id for s in ("warm", "rl") for r in out[s]}
    for request in (r for group in out.values() for r in group):
        doc = whole[request.doc_id]
        for text, following in zip(request.texts, request.next_texts, strict=True):
            end = doc.text.index(text + following) + len(text) - 1
            assert any(a <= end < b for a, b in doc.spans)


def test_impossible_settings():
    c = configs.default()
    c.lessons_av.steps = c.lessons_ar.steps = 1
    for key, value, said in [
        ("near_duplicates", 1.5, "must be 0 .off., or from"), ("documents", -1, "must be 0 .all., or from 1"),
        ("corpus", "nwes", "unknown corpus"), ("ood", "hf:a:b", "hf:REPO:CONFIG:SPLIT"),
    ]:
        changed = configs.default()
        changed.data[key] = value
        with pytest.raises(UserError, match=said):
            config_checks.validate(changed)
    config_checks.validate(c)
