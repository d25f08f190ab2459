"""`nla data explain` as it is typed: who is asked, what is said before, kills, files of answers."""

import collections
import io
import json
import os
import signal
import time

import pytest

from nla_jax import cli
from nla_jax.data import corpora, explanations
from nla_jax.providers import consent, journal, scheduler, target_model
from tests.helpers import toys
from tests.helpers.http_models import KEY, adds_up, document
from tests.helpers.llm_server import Server

# A shell that starts the tests in the background has Ctrl-C ignored; this process hears it.
RUN = (
    "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from nla_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document(i, 80).text}) + "\n" for i in range(120)), "utf-8")
    return f"file:{path}"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("NLA_TEST_KEY", KEY)


def arguments(server, corpus, out, *more, n=20, provider="openai") -> list[str]:
    url = server.url if provider == "openai" else server.root
    size = ["--n", n, "--min-words", 8, "--max-words", 14]
    where = ["--model", "tiny", "--base-url", url, "--key-env", "NLA_TEST_KEY", "--backoff", 0.01]
    who = ["--provider", provider, *where, "--corpus", corpus, "--out", out]
    return list(map(str, ["data", "explain", *who, *size, *more]))


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- before anything is sent ----------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_is_sent_without_a_yes(tmp_path, corpus, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    with Server() as server:
        command = arguments(server, corpus, out, "--price", "3,15")
        assert cli.main(command) == 2
        told = capsys.readouterr().err
        assert f"20 prompts go to {server.url} (model tiny): about " in told
        assert "at most 8,000 to write; about $0." in told and "give --yes" in told
        for said in ("", "n\n", "nothing\n"):
            monkeypatch.setattr("sys.stdin", Terminal(said))
            monkeypatch.setattr("sys.stderr", Terminal())
            assert cli.main(command) == 2
        assert not server.bodies and not out.exists()
        monkeypatch.setattr("sys.stdin", Terminal("y\n"))
        assert cli.main(command) == 0 and len(server.bodies) == 20
        # All of it is here: there is nothing to ask about.
        monkeypatch.setattr("sys.stdin", Terminal(""))
        assert cli.main(command) == 0 and len(server.bodies) == 20


def test_the_estimate_is_of_what_is_new_and_the_sum_of_what_was_used(tmp_path, corpus, capsys):
    out = tmp_path / "out.jsonl"
    with Server() as server:
        assert cli.main(arguments(server, corpus, out, "--yes", "--price", "3,15", n=5)) == 0
        assert json.loads(capsys.readouterr().out)["dollars"] == pytest.approx(5 * (100 * 3 + 20 * 15) / 1e6)
        assert cli.main(arguments(server, corpus, out, "--yes", n=8)) == 0
        told = capsys.readouterr()
        assert "3 prompts go to" in told.err and "cost not known without --price" in told.err
        report = json.loads(told.out)
        assert (report["cached"], report["asked"], report["dollars"]) == (5, 3, None)


def test_an_estimate():
    from nla_jax.providers.clients import Endpoint

    e = Endpoint("openai", "tiny", "http://h/v1", max_tokens=100)
    said = consent.estimate(e, scheduler.Settings(price=(2.0, 10.0)), 1000, 2_000_000)
    assert said == ("1,000 prompts go to http://h/v1 (model tiny): about 500,000 tokens to read, at most "
                    "100,000 to write; about $2.00 at most")


@pytest.mark.parametrize(
    "more,message",
    [
        (["--model", ""], "no model: name one"),
        (["--key-env", "NLA_NO_SUCH"], "set the environment variable NLA_NO_SUCH"),
        (["--base-url", "http://127.0.0.1:1/v1", "--retries", "1"], "no connection to http://127.0.0.1:1"),
    ],
)
def test_settings_that_cannot_be(tmp_path, corpus, capsys, more, message):
    with Server() as server:
        assert cli.main(arguments(server, corpus, tmp_path / "out.jsonl", "--yes", *more)) == 2
        assert message in capsys.readouterr().err and not server.bodies
    assert not any(p.stat().st_size for p in tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "more,message",
    [
        ("--price=3", "--price 3: must be 2 numbers, as in 3,15"),
        ("--price=3,-1", "--price -1: must be at least 0"),
        ("--price=3,nan", "--price nan: must be a finite number"),
        ("--retry=x", "--retry x: must be of failed"),
        ("--concurrency=0", "--concurrency 0: must be at least 1"),
        ("--n=0", "--n 0: must be at least 1"),
        ("--timeout=0", "--timeout 0: must be above 0"),
        ("--poll=-1", "--poll -1: must be at least 0"),
    ],
)
def test_values_that_cannot_be_read(capsys, more, message):
    with pytest.raises(SystemExit):
        cli.main(["data", "explain", "--out", "o", more])
    assert message in capsys.readouterr().err


def test_the_target_is_who_explains_by_default(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(target_model, "run", lambda *args, **how: calls.append((args, how)) or {"texts": 1})
    assert cli.main(["data", "explain", "--out", "o", "--target", "default", "--max-new", "9"]) == 0
    assert cli.main(["data", "explain", "--out", "o", "--target", "gguf:x", "--temperature", "0"]) == 0
    from nla_jax.lm.weights import DEFAULT_TARGET

    usual = dict(n=100, batch=16, max_new=160, temperature=0.7, words=(50, 95), seed=0)
    assert calls == [((DEFAULT_TARGET, "news", "o"), usual | {"max_new": 9}),
                     (("gguf:x", "news", "o"), usual | {"temperature": 0.0})]
    assert cli.main(["data", "explain", "--out", "o", "--model", "m"]) == 2
    assert "its model is the --target" in capsys.readouterr().err


# --- kills ----------------------------------------------------------------------------------------


def until(condition, process) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[0])


def test_killed_and_started_again_every_row_is_answered_and_paid_once(tmp_path, corpus):
    out, at_a_time, n = tmp_path / "out" / "mine.jsonl", 8, 600
    diary = tmp_path / "out" / "mine.jsonl.journal"
    told = []

    def plan(text, k):
        kind = ("ok", "echo", "refused", "500", "429", "400", "ok", "reset")[sum(text.encode()) % 8]
        return "echo" if k and kind in ("500", "429", "reset") else kind

    with Server(plan) as server:
        command = arguments(server, corpus, out, "--yes", "--concurrency", at_a_time, n=n)

        def start():
            return toys.python(RUN, command, tmp_path / "cache")

        def kill(process, sign=signal.SIGKILL):
            os.kill(process.pid, sign)
            told.append(process.communicate()[0])
            return process.returncode

        # The server falls silent: what it has answered, and been paid for, is in the journal; then kill -9.
        server.answers_left = 60
        process = start()
        until(lambda: server.answers_left <= -at_a_time, process)
        until(lambda: lines(diary) == sum(server.charged.values()) + failed(diary), process)
        assert kill(process) == -signal.SIGKILL
        assert set(server.charged.values()) == {1}
        with open(diary, "ab") as f:
            f.write(b'{"key": "00ff')  # it died in the middle of a line
        paid = server.charged.copy()
        server.release()
        # Killed with answers on their way: of these alone some may be paid for twice.
        process = start()
        until(lambda: lines(diary) >= 120, process)
        assert kill(process) == -signal.SIGKILL
        known = [json.loads(x)["key"] for x in diary.read_bytes().splitlines(True) if x.endswith(b"\n")]
        assert len(set(known)) == len(known)
        # Ctrl-C: what is under way, and not answered yet, is waited for.
        server.released.clear()
        server.answers_left, server.late = 80, True
        process = start()
        until(lambda: server.answers_left <= -at_a_time, process)
        # The answers come once it has heard, however long that takes.
        os.kill(process.pid, signal.SIGINT)
        heard = ""
        while "nla: stopping" not in heard:
            line = process.stdout.readline()
            assert line, heard
            heard += line
        server.release()
        told.append(heard + process.communicate()[0])
        assert process.returncode == 130
        assert "run the same command again to continue" in told[-1]
        told.append(toys.finish(start()))
        last = json.loads("{" + told[-1].partition("{")[2])
    assert adds_up(last) and last["texts"] == n and not last["left"]
    twice = {t: c for t, c in server.charged.items() if c > 1}
    assert set(twice.values()) <= {2} and len(twice) <= at_a_time and not twice.keys() & paid.keys()
    assert not {journal.key_of(explanations.instruction(t), "tiny") for t in twice} & set(known)
    journaled = [json.loads(line) for line in diary.read_text("utf-8").splitlines()]
    assert len(journaled) == len({j["key"] for j in journaled}) == n
    assert last["failed"] == {"HTTP 400 invalid_request_error": failed(diary)}
    # No row is lost, and they stand in their order, as if nothing had happened.
    texts = target_model.choose_texts(corpora.open_corpus(corpus), n, (8, 14), 0)
    kinds = collections.Counter(plan(d.text[a:b], 0) for d, a, b in texts)
    assert last["dropped"] == {"refused": kinds["refused"]}
    assert last["kept"] == n - kinds["refused"] - kinds["400"]
    order = {(d.doc_id, a): i for i, (d, a, _) in enumerate(texts)}
    places = [order[r.doc_id, r.start] for r in explanations.read(out)]
    assert places == sorted(set(places)) and len(places) == last["kept"]
    # The key, which the server repeats in answers and errors, is nowhere.
    assert "[key]" in out.read_text("utf-8") and any("[key]" in str(j.get("detail")) for j in journaled)
    for said in (*told, *(p.read_text("utf-8") for p in out.parent.iterdir())):
        assert KEY not in said and "Traceback" not in said


def failed(diary) -> int:
    return diary.read_bytes().count(b'"answer": null') if diary.exists() else 0


def test_batches_under_way_are_not_asked_for_one_by_one(tmp_path, corpus, capsys):
    with journal.Journal(tmp_path / "out.jsonl.journal") as j:
        j.record_submission(["0" * 32], "tiny", None)
    with Server() as server:
        command = arguments(server, corpus, tmp_path / "out.jsonl", "--yes", provider="anthropic")
        assert cli.main(command) == 2 and not server.bodies
        assert "has 1 batches whose answers were not collected" in capsys.readouterr().err
        command[3] = "anthropic-batch"
        assert cli.main([*command, "--poll", "0.01"]) == 0 and len(server.batches) == 1


# --- a file of answers ----------------------------------------------------------------------------


def test_requests_go_out_to_a_file_and_answers_come_back_from_one(tmp_path, corpus, capsys):
    requests, answers, out = (tmp_path / f"{name}.jsonl" for name in ("requests", "answers", "out"))
    command = ["data", "explain", "--provider", "file", "--corpus", corpus, "--out", str(out), "--n", "6",
               "--min-words", "8", "--max-words", "14"]
    assert cli.main([*command, "--requests", str(requests)]) == 0
    rows = [json.loads(line) for line in requests.read_text("utf-8").splitlines()]
    assert len(rows) == 6 and all("<explanation>" in r["prompt"] for r in rows)
    said = ["<explanation>\n1. One thing.\n2. Another.\n</explanation>", "One thing."]
    with open(answers, "w", encoding="utf-8") as f:
        for i, row in enumerate(rows[:4]):
            row.pop("prompt")
            row |= [{"answer": said[0]}, {"answer": said[1]}, {"explanation": "One.\nTwo."},
                    {"answer": said[0], "sha256": "0" * 12}][i]
            f.write(json.dumps(row) + "\n")
    assert cli.main([*command, "--answers", str(answers)]) == 0
    report = json.loads(capsys.readouterr().out.partition("}")[2])
    assert report == {"texts": 6, "kept": 2, "dropped": {"no opening tag": 1}, "left": 0,
                      "failed": {"about another text": 1, "not in answers.jsonl": 2}}
    assert [r.explanation for r in explanations.read(out)] == ["One thing.\nAnother.", "One.\nTwo."]
    assert cli.main([*command, "--requests", str(requests)]) == 2  # it is there
    again = tmp_path / "again.jsonl"
    assert cli.main([*command, "--requests", str(again)]) == 0 and lines(again) == 4
    answers.write_text('{"doc_id": "x", "start": 0, "end": 5}\n', "utf-8")
    capsys.readouterr()
    assert cli.main([*command, "--answers", str(answers)]) == 2
    assert "answers.jsonl:1: a line needs doc_id" in capsys.readouterr().err
    answers.write_bytes(b'{"answer": "\xe9"}\n')
    assert cli.main([*command, "--answers", str(answers)]) == 2
    assert "answers.jsonl:1: not UTF-8 text (byte 12 of the line): convert it" in capsys.readouterr().err
    assert cli.main(command) == 2 and "needs either --requests FILE" in capsys.readouterr().err
