"""Models behind HTTP: a real server on 127.0.0.1 that misbehaves, and what is made of it."""

import asyncio
import collections
import datetime
import json

import pytest

from nla_jax.data import explanations
from nla_jax.errors import UserError
from nla_jax.providers import answer_files, clients, http_explain, journal, retry_header, scheduler
from tests.helpers import http_models
from tests.helpers.http_models import KEY
from tests.helpers.llm_server import KEPT, SLOW, Server, fate, mixed


@pytest.mark.parametrize("kind,n", [("openai", 1000), ("anthropic", 100)])
def test_rows_with_faults_at_random_are_each_answered_and_paid_once(tmp_path, kind, n):
    texts = http_models.texts_of(n)
    fates = {d.text: fate(d.text) for d, _, _ in texts}
    with Server(mixed) as server:
        report = http_models.explain(server, texts, out := tmp_path / "out.jsonl", kind, timeout=3.0)
        again = http_models.explain(server, texts, out, kind)
    finals = collections.Counter(end for _, end in fates.values())
    lasting = finals.pop("400")
    assert all(server.charged[text] == (end != "400") for text, (_, end) in fates.items())
    assert all(server.asked[text] == len(faults) + 1 for text, (faults, _) in fates.items())
    assert report["kept"] == sum(finals[k] for k in KEPT)
    dropped = {k: v for k, v in finals.items() if k not in KEPT}
    dropped["refused"] += dropped.pop("filtered")
    assert report["dropped"] == dropped and report["failed"] == {"HTTP 400 invalid_request_error": lasting}
    assert sum(report["repeated"].values()) >= sum(len(faults) for faults, _ in fates.values())
    # A drip is one too: its bytes keep coming, and its time is over.
    slow = sum(fault in SLOW for faults, _ in fates.values() for fault in faults)
    assert report["repeated"].get("time-out", 0) == slow
    assert http_models.adds_up(report) and report["asked"] == n and not report["left"]
    assert report["tokens read"] == 100 * (n - lasting) and report["tokens written"] == 20 * (n - lasting)
    assert server.most_under_way <= 16
    # In the order of the texts, as training reads them.
    records, order = list(explanations.read(out)), {d.doc_id: i for i, (d, _, _) in enumerate(texts)}
    assert [r.id for r in records] == list(range(report["kept"]))
    assert [order[r.doc_id] for r in records] == sorted(order[r.doc_id] for r in records)
    for r in records:
        text = http_models.document(order[r.doc_id]).text
        assert r.explanation.split("\n")[0].removesuffix(".").removesuffix(" ?").endswith(text.split()[0])
    beside = list(map(json.loads, (tmp_path / "out.jsonl.dropped").read_text("utf-8").splitlines()))
    assert collections.Counter(r["reason"] for r in beside) == dropped
    # Once more: nothing is asked, and nothing changes.
    assert again["asked"] == 0 and again["cached"] == n and again["tokens read"] == 0
    assert {k: again[k] for k in ("texts", "kept", "dropped", "failed")} == {
        k: report[k] for k in ("texts", "kept", "dropped", "failed")}
    assert len(list(explanations.read(out))) == report["kept"]


def test_no_more_rows_are_taken_than_are_under_way(tmp_path):
    taken, ended = [0], [0]

    def rows():
        for doc, a, b in http_models.texts_of(200):
            assert taken[0] - ended[0] < 5
            taken[0] += 1
            prompt = explanations.instruction(doc.text[a:b])
            yield journal.key_of(prompt, "tiny"), prompt

    def told():
        ended[0] += 1

    async def ask_all(j):
        a = scheduler.Scheduler(j, scheduler.Settings(concurrency=5, backoff=0.001), "tiny", told)
        async with clients.open_asker(http_models.endpoint(server, timeout=3.0)) as ask:
            await a.ask_all(rows(), ask)
        return a.tally

    with Server(mixed) as server, journal.Journal(tmp_path / "j") as j:
        tally = asyncio.run(ask_all(j))
        assert taken == ended == [200] and len(j) == 200
    assert tally.most_under_way <= 5 and server.most_under_way <= 5 and not tally.under_way


def test_the_same_prompt_is_sent_once(tmp_path):
    doc, other = http_models.document(1), http_models.document(2)
    twin = type(doc)("doc:twin", doc.text, "train")
    texts = [(d, 0, len(d.text)) for d in (doc, twin, other)]
    with Server() as server:
        report = http_models.explain(server, texts, tmp_path / "out.jsonl")
    assert set(server.charged.values()) == {1} and (report["kept"], report["asked"]) == (3, 2)
    assert {r.doc_id for r in explanations.read(tmp_path / "out.jsonl")} == {"doc:1", "doc:twin", "doc:2"}


# --- waiting --------------------------------------------------------------------------------------

NOW = datetime.datetime(2026, 11, 26, 10, 0, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    "headers,seconds",
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "Thu, 26 Nov 2026 10:01:30 GMT"}, 90.0),
        ({"retry-after": "Thu, 26 Nov 2026 11:00:30 +0100"}, 30.0),
        ({"retry-after": "Thu, 26 Nov 2026 09:00:00 GMT"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "tomorrow"}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert retry_header.retry_after(headers, NOW) == seconds


def test_tries_are_spaced_and_what_one_row_is_told_holds_for_all(tmp_path, monkeypatch):
    pauses = []

    async def pause(self, seconds):
        pauses.append(seconds)

    async def two(a):
        tries = {"x": [clients.Retry("busy", 30.0), clients.Retry("busy"), clients.Retry("busy")], "y": []}

        async def ask(name):
            if tries[name]:
                raise tries[name].pop(0)
            return name

        assert await a.patient(lambda: ask("x")) == "x"
        own = pauses[:]
        assert await a.patient(lambda: ask("y")) == "y"
        return own, pauses[len(own) :]

    monkeypatch.setattr(scheduler.Scheduler, "pause", pause)
    monkeypatch.setattr(scheduler.random, "uniform", lambda low, high: high)
    with journal.Journal(tmp_path / "j") as j:
        own, others = asyncio.run(two(scheduler.Scheduler(j, scheduler.Settings(backoff=1.0), "tiny")))
    # Nobody really slept: before each further try of x, and before y's first, the gate was still shut.
    assert own[0] == 30.0 and own[2] == 2.0 and own[4] == 4.0
    assert all(29.0 < gate <= 31.0 for gate in (own[1], own[3], own[5], *others)) and len(others) == 1


def test_a_row_is_given_up_after_its_tries_and_asked_again_on_demand(tmp_path):
    texts, out = http_models.texts_of(6), tmp_path / "out.jsonl"
    ill = {texts[1][0].text: "500", texts[3][0].text: "403", texts[4][0].text: "cut at the token limit"}
    with Server(lambda text, n: ill.get(text, "ok")) as server:
        report = http_models.explain(server, texts, out, retries=2)
        assert report["failed"] == {"HTTP 500 invalid_request_error": 1, "HTTP 403 invalid_request_error": 1}
        assert server.asked[texts[1][0].text] == 3 and server.asked[texts[3][0].text] == 1
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl.journal").read_text().splitlines()]
        failed = [line for line in lines if line["answer"] is None]
        assert len(lines) == 6 and {f["detail"] for f in failed} >= {"tried 3 times"}
        ill.clear()
        before = server.asked.copy()
        assert (
            http_models.explain(server, texts, out)["failed"] == report["failed"] and server.asked == before
        )
        report = http_models.explain(server, texts, out, retry=("failed",))
        assert (report["asked"], report["cached"], report["failed"]) == (2, 4, {})
        assert report["dropped"] == {"cut at the token limit": 1}
        report = http_models.explain(server, texts, out, retry=("cut",))
        assert (report["asked"], report["kept"], report["dropped"]) == (1, 6, {})
    assert [r.doc_id for r in explanations.read(out)] == [f"doc:{i}" for i in (0, 2, 5, 1, 3, 4)]


# --- what ends a run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what,message",
    [
        ("401", "HTTP 401 from .*: it does not accept the key in NLA_TEST_KEY"),
        ("402", "no credit left"),
        ("quota", "HTTP 429 .* no credit left"),
        ("404", "no model 'tiny', or no such address"),
        ("307", "redirects; give the new address with --base-url"),
        ("long wait", "asks to wait 7200 seconds"),
    ],
)
def test_what_is_wrong_for_every_row_ends_the_run_and_costs_nothing(tmp_path, what, message, capsys):
    texts, out = http_models.texts_of(40), tmp_path / "out.jsonl"
    with Server(lambda text, n: what) as server:
        with pytest.raises(UserError, match=message) as caught:
            http_models.explain(server, texts, out)
        assert KEY not in str(caught.value) and "\x1b" not in str(caught.value)
        assert sum(server.asked.values()) <= 16  # those under way
        report = json.loads(capsys.readouterr().out)
        assert http_models.adds_up(report) and report["left"] == 40 and not report["failed"]
        server.plan = lambda text, n: "ok"
        assert http_models.explain(server, texts, out)["kept"] == 40


def test_a_run_in_which_everything_fails_ends_early(tmp_path):
    texts, out = http_models.texts_of(200), tmp_path / "out.jsonl"
    with Server(lambda text, n: "400") as server:
        with pytest.raises(UserError, match=r"the last 36 rows all failed, .*HTTP 400.*--retry failed"):
            http_models.explain(server, texts, out)
        assert sum(server.asked.values()) <= 36 + 16
        server.plan = lambda text, n: "ok"
        assert http_models.explain(server, texts, out, retry=("failed",))["kept"] == 200


# --- where keys go --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url,message",
    [
        ("ftp://host/v1", "not an address such as"),
        ("127.0.0.1:8000", "not an address such as"),
        ("http://host:port/v1", "not an address such as"),
        ("http://me:sesame@host/v1", "the base URL of host holds more than an address"),
        ("http://host/v1?key=sesame", "the base URL of host holds more than an address"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(UserError, match=message) as caught:
        clients.endpoint("openai", "tiny", url)
    assert "sesame" not in str(caught.value)


def test_a_key_goes_where_it_belongs(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert clients.endpoint("openai", "tiny").key == KEY
    assert clients.endpoint("openai", "tiny", "http://127.0.0.1:1/v1").key == ""
    assert clients.endpoint("openai", "tiny", "http://127.0.0.1:1/v1", "OPENAI_API_KEY").key == KEY
    assert KEY not in repr(clients.endpoint("openai", "tiny"))
    with pytest.raises(UserError, match="needs a key: set the environment variable ANTHROPIC_API_KEY"):
        clients.endpoint("anthropic", "tiny")
    with pytest.raises(UserError, match="no model: name one"):
        clients.endpoint("openai", "")
    for bad in (f"{KEY}\nX: y", f"{KEY} é"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(UserError, match="the environment variable OPENAI_API_KEY holds no key") as caught:
            clients.endpoint("openai", "tiny")
        assert KEY not in str(caught.value)


def test_openai_itself_is_asked_in_its_own_words():
    e = clients.Endpoint("openai", "tiny", clients.PROVIDERS["openai"].home, temperature=0.5)
    body = clients.request(e, "?")
    assert body == {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "temperature": 0.5,
                    "max_completion_tokens": 400}


def test_what_is_sent_to_a_stranger(tmp_path, monkeypatch):
    openai = ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY")
    for name in (*openai, "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, f"sk-not-for-strangers-{name}")
    texts = http_models.texts_of(1)
    for kind in ("openai", "anthropic"):
        with Server() as server, journal.Journal(tmp_path / kind) as j:
            e = clients.endpoint(kind, "tiny", server.url if kind == "openai" else server.root)
            http_explain.run(texts, tmp_path / f"{kind}.jsonl", j, e, scheduler.Settings(),
                             http_explain.one_by_one, lambda what: None)
        (headers,), (body,) = server.headers, server.bodies
        assert "not-for-strangers" not in str(headers)
        assert body.keys() == {"model", "messages", "max_tokens"} and body["max_tokens"] == 400
        assert body["messages"][0]["content"] == explanations.instruction(texts[0][0].text)


@pytest.mark.parametrize("message, want", [
    ({"content": "the answer", "reasoning_content": "a draft", "reasoning": "a draft"}, ("the answer", "")),
    ({"content": None, "reasoning_content": "a draft"}, ("", "empty answer")),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a draft"}]},
                  {"type": "text", "text": "the answer"}]}, ("the answer", "")),
])
def test_a_draft_in_a_field_of_its_own_is_no_answer(message, want):
    e = clients.Endpoint("openai", "tiny", "http://127.0.0.1")
    assert clients.openai_answer(e, {"choices": [{"message": message, "finish_reason": "stop"}]})[:2] == want
    blocks = [{"type": "thinking", "thinking": "a draft"}, {"type": "text", "text": want[0]}]
    assert clients.anthropic_answer(e, {"content": blocks, "stop_reason": "end_turn"})[:2] == want


@pytest.mark.parametrize("mark", ["</think>", "[/THINK]", "<|end|><|channel|>final<|message|>"])
def test_a_draft_of_any_kind_of_model_is_no_explanation(tmp_path, mark):
    ((doc, start, end),) = texts = http_models.texts_of(1)
    said, out = "<explanation>\nOn a {0}.\nTo b {0}.\n</explanation>", tmp_path / "out.jsonl"
    row = {"doc_id": doc.doc_id, "start": start, "end": end, "answer": said.format(1) + mark + said.format(2)}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row), "utf-8")  # without a newline
    answer_files.Output(texts, out, answer_files.AnswerFile(tmp_path / "answers.jsonl")).advance()
    assert [r.explanation for r in explanations.read(out)] == ["On a 2.\nTo b 2."]


# --- the journal ----------------------------------------------------------------------------------


def outcome(i: int, **more) -> journal.Outcome:
    return journal.Outcome(journal.key_of(str(i), "tiny"), "tiny", **dict(answer=f"say {i} — é") | more)


def test_a_torn_last_line_is_cut_off_and_the_rest_is_there(tmp_path):
    with journal.Journal(tmp_path / "j") as j:
        for i in range(3):
            j.add(outcome(i))
    whole = (tmp_path / "j").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last + 1, len(whole) - 1):
        (tmp_path / "j").write_bytes(whole[:cut])
        with journal.Journal(tmp_path / "j") as j:
            assert len(j) == 2 and j.get(outcome(2).key) is None and j.get(outcome(1).key) == outcome(1)
            j.add(outcome(2))
        assert (tmp_path / "j").read_bytes() == whole


def test_a_whole_last_line_without_newline_is_not_paid_for_again(tmp_path):
    with journal.Journal(tmp_path / "j") as j:
        for i in range(2):
            j.add(outcome(i))
    whole = (tmp_path / "j").read_bytes()
    for edited in (whole[:-1], b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n").removesuffix(b"\n")):
        (tmp_path / "j").write_bytes(edited)
        with journal.Journal(tmp_path / "j") as j:
            assert [j.get(outcome(i).key) for i in range(2)] == [outcome(0), outcome(1)]
            j.add(outcome(2))
        assert (tmp_path / "j").read_bytes().startswith(edited + b"\n")
        with journal.Journal(tmp_path / "j") as j:
            assert [j.get(outcome(i).key) for i in range(3)] == [outcome(i) for i in range(3)]


@pytest.mark.parametrize("content", ["a text", "a text\n", "[1]\n", '{"key": "xyz", "answer": ""}\n', "{}\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    (tmp_path / "j").write_text(content)
    with pytest.raises(UserError, match=r"j:1: not a line of a journal"):
        journal.Journal(tmp_path / "j")
    assert (tmp_path / "j").read_text() == content


def test_a_journal_has_one_writer_and_a_full_disk_loses_no_line(tmp_path, monkeypatch):
    with journal.Journal(tmp_path / "j") as j:
        j.add(outcome(0))
        with pytest.raises(UserError, match="in use by another process"):
            journal.Journal(tmp_path / "j")

        def full(fd):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as m:
            m.setattr(journal.os, "fsync", full)
            with pytest.raises(UserError, match=r"No space left on device\): make room, and run the"):
                j.add(outcome(1))
        assert outcome(1).key not in j
        j.add(outcome(2, answer=None, reason="HTTP 500"))
    with journal.Journal(tmp_path / "j") as j:
        assert len(j) == 2 and j.get(outcome(2).key).reason == "HTTP 500"
        assert j.forget(["cut"]) == 0 and j.forget(["failed"]) == 1 and outcome(2).key not in j
