"""Anthropic's Message Batches against a server that accepts without saying so, and answers in pieces."""

import collections
import json

import pytest

from nla_jax.data import explanations
from nla_jax.errors import UserError
from nla_jax.providers import http_explain, journal
from tests.helpers.http_models import KEY, adds_up, explain, texts_of
from tests.helpers.llm_server import Server


class Killed(BaseException):
    """Nothing after this is run, as after kill -9."""


def in_batches(server, texts, out, size=25, concurrency=2, **how) -> dict:
    ask = http_explain.in_batches(size, 0.01)
    return explain(server, texts, out, "anthropic", ask, concurrency=concurrency, **how)


def dies(monkeypatch, name: str, at: int = 0):
    """`Journal.NAME` does its work `at` times, and then the process is gone before it is called."""
    real, calls = getattr(journal.Journal, name), []

    def fatal(self, *args):
        calls.append(name)
        if len(calls) > at:
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(journal.Journal, name, fatal)


def paid_once(server, texts) -> bool:
    return all(server.charged[d.text] == 1 for d, _, _ in texts)


def test_batches_are_collected_and_what_they_leave_is_handed_in_again(tmp_path):
    texts, out = texts_of(60), tmp_path / "out.jsonl"
    kinds = 10 * ["expired", "500", "ok", "ok", "ok", "ok"]
    first = dict(zip((d.text for d, _, _ in texts), kinds, strict=True))
    last = {texts[2][0].text: "refused", texts[3][0].text: "400"}
    with Server(lambda text, n: last.get(text) or ("ok" if n else first[text])) as server:
        report = in_batches(server, texts, out)
        assert all(server.charged[t] == (last.get(t) != "400") for t in first)
        assert report["kept"] == 58 and report["dropped"] == {"refused": 1} and adds_up(report)
        assert report["failed"] == {"invalid_request_error": 1}
        assert report["repeated"]["expired"] == report["repeated"]["api_error"] == 10
        assert (report["asked"], report["tokens read"]) == (60, 5900)
        # 25, 25 and 10, and one more of each for what they left.
        assert sorted(len(b["requests"]) for b in server.batches.values()) == [2, 9, 9, 10, 25, 25]
        made = len(server.batches)
        assert in_batches(server, texts, out)["asked"] == 0 and len(server.batches) == made
    assert len(list(explanations.read(out))) == 58
    assert all(KEY not in p.read_text("utf-8") for p in tmp_path.iterdir())
    params = next(iter(server.batches.values()))["requests"][0]["params"]
    assert params.keys() == {"model", "messages", "max_tokens"}


@pytest.mark.parametrize("fault", ["reset", "500"])
def test_a_batch_whose_acceptance_was_not_heard_is_not_handed_in_twice(tmp_path, fault):
    texts = texts_of(10)
    with Server() as server:
        server.create_fault = fault
        report = in_batches(server, texts, tmp_path / "out.jsonl", concurrency=1)
    assert report["kept"] == 10 and len(server.batches) == 1 and paid_once(server, texts)


@pytest.mark.parametrize(
    "name,at,made",
    [
        ("record_submission", 0, 0),  # before it was handed in
        ("record_id", 0, 1),  # accepted, and nobody knows its number
        ("add", 0, 1),  # its number is known
        ("add", 7, 1),  # in the middle of its results
        ("record_done", 0, 1),  # all of them are here
    ],
)
def test_killed_at_any_point_nothing_is_paid_for_twice(tmp_path, monkeypatch, name, at, made):
    texts, out = texts_of(20), tmp_path / "out.jsonl"
    with Server() as server:
        # Another batch of this size, of somebody else, came between.
        with monkeypatch.context() as m:
            dies(m, name, at)
            with pytest.raises(Killed):
                in_batches(server, texts, out, concurrency=1)
        assert len(server.batches) == made
        if made:
            other = [{"custom_id": f"other{i}", "params": server.batches["batch_0"]["requests"][0]["params"]}
                     for i in range(20)]
            server.batches["batch_of_others"] = {"requests": other, "looks": 9, "faults": [], "counted": True}
        report = in_batches(server, texts, out, concurrency=1)
        assert report["kept"] == 20 and adds_up(report) and paid_once(server, texts)
        assert sum(b != "batch_of_others" for b in server.batches) == 1
        with journal.Journal(f"{out}.journal") as j:
            assert not j.batches and len(j) == 20
    assert [r.id for r in explanations.read(out)] == list(range(20))


def test_a_batch_of_another_key_and_results_elsewhere(tmp_path, monkeypatch):
    texts, out = texts_of(5), tmp_path / "out.jsonl"
    with Server() as server, Server() as elsewhere:
        with monkeypatch.context() as m:
            dies(m, "add")
            with pytest.raises(Killed):
                in_batches(server, texts, out)
        kept = server.batches.copy()
        server.batches.clear()
        with pytest.raises(UserError, match="has no batch batch_0 for this key: give the key that"):
            in_batches(server, texts, out)
        server.batches.update(kept)
        server.results_root = elsewhere.root
        with pytest.raises(UserError, match="batch_0: its results are not at .* no key is sent elsewhere"):
            in_batches(server, texts, out)
        assert not elsewhere.headers
        server.results_root = ""
        assert in_batches(server, texts, out)["kept"] == 5
    assert paid_once(server, texts) and len(kept) == 1


def test_odd_news_and_batches_that_are_archived(tmp_path, monkeypatch):
    texts, out = texts_of(5), tmp_path / "out.jsonl"
    with Server() as server:
        server.odd = [[], {}, None, {"data": 3}, {"data": [3]}]
        with monkeypatch.context() as m:
            dies(m, "add")
            with pytest.raises(Killed):
                in_batches(server, texts, out)
        server.batches["batch_0"]["archived"] = True  # its results are no longer there
        server.odd = [[], {"processing_status": 3}]
        report = in_batches(server, texts, out)
        assert report["kept"] == 5 and adds_up(report) and len(server.batches) == 2
        assert report["repeated"] == {"an answer that is no batch": 2, "an answer that is not JSON": 1,
                                      "broken connection": 1}


def test_batches_in_which_everything_fails(tmp_path):
    texts, out = texts_of(40), tmp_path / "out.jsonl"
    with Server(lambda text, n: "400") as server:
        with pytest.raises(UserError, match=r"rows all failed, at the end with 'invalid_req\w+' \('no'\)"):
            in_batches(server, texts, out, concurrency=1)
        assert len(server.batches) == 1
        server.plan = lambda text, n: "ok"
        report = in_batches(server, texts, out, concurrency=1, retry=("failed",))
    assert report["kept"] == 40 and paid_once(server, texts)
    lines = map(json.loads, (tmp_path / "out.jsonl.journal").read_text("utf-8").splitlines())
    assert collections.Counter("batch" in line for line in lines)[True] == 9
