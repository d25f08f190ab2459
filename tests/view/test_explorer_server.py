"""The explorer's server: how it is asked, and that nothing that it is sent harms it or the next request."""

import asyncio
import functools
import json
import re
import socket
import threading
import time
import types

import pytest
from starlette.testclient import TestClient

from nla_jax.view.explorer import api_schema, job_queue, server
from tests.helpers import world
from tests.helpers.explorers import NASTY, TEXT, Fake, last, post, values


@pytest.fixture
def client(engine):
    with TestClient(server.app(engine), base_url="http://localhost") as c:
        yield c


# --- how it is asked ------------------------------------------------------------------------------


def test_questions_and_answers(client, engine):
    answer = post(client, "explain", text=TEXT, token=3, sample=2)
    first, second, *events = filter(None, values(answer))  # {} says nothing: it ends a long silence
    assert (answer.status_code, first, second) == (200, {"place": 1}, {"place": 0})
    assert events == json.loads(json.dumps([e for e in engine.explain(TEXT, 3, sample=2) if e]))
    assert values(post(client, "read", text=NASTY))[-1]["done"]["tokens"] == engine.tokens(NASTY)
    done = values(post(client, "edit", text=TEXT, token=1, words=NASTY))[-1]["done"]
    assert done["words"] == NASTY and done["ok"]
    tokens = values(post(client, "compare", text=TEXT, tokens=[0, 1], words=["a", ""]))[-1]["done"]
    assert [s["ok"] for s in tokens["own"]] == [True, False]
    asked = dict(text=TEXT, token=2, words="ab", before="cd", strength=1)
    assert len(values(post(client, "steer", **asked))[-1]["done"]["goes_on"]) == 2
    asked = dict(text=TEXT, token=2, words="ab\n… cd")
    assert values(post(client, "predict", **asked))[-1] == {"done": last(engine.predict(**asked))}
    assert "no words to read" in values(post(client, "predict", **asked | {"words": ""}))[-1]["error"]
    assert "outside the text" in values(post(client, "explain", text=TEXT, token=64))[-1]["error"]
    assert values(post(client, "explain", text=TEXT, token=0))[-1]["done"]


@pytest.mark.parametrize(
    "what,body,status,message",
    [
        ("explain", b"", 400, "not JSON"),
        ("explain", b"\xff\xfe", 400, "not JSON"),
        ("explain", b"[" * 50000, 400, "not JSON"),
        ("explain", b"[]", 400, "must be a JSON object"),
        ("explain", {"token": 1}, 400, "text must be a text of 1 to 8000 characters"),
        ("explain", {"text": "", "token": 1}, 400, "text must be"),
        ("explain", {"text": "a" * 8001, "token": 1}, 400, "text must be"),
        ("explain", {"text": "\ud800", "token": 1}, 400, "text must be"),
        ("explain", {"text": 3, "token": 1}, 400, "text must be"),
        ("explain", {"text": "a"}, 400, "token must be"),
        ("explain", {"text": "a", "token": True}, 400, "token must be"),
        ("explain", {"text": "a", "token": -1}, 400, "token must be"),
        ("explain", {"text": "a", "token": 1.5}, 400, "token must be"),
        ("explain", {"text": "a", "token": 0, "sample": 64}, 400, "sample must be"),
        ("explain", {"text": "a", "token": 0, "side": "c"}, 400, "side must be"),
        ("explain", {"text": "a", "token": 0, "max_new": 10**9}, 400, "unknown field 'max_new'"),
        ("edit", {"text": "a", "token": 0, "words": "w" * 4001}, 400, "words must be"),
        ("predict", {"text": "a", "token": 0}, 400, "words must be"),
        ("compare", {"text": "a", "tokens": [0], "words": ["a", "b"]}, 400, "tokens must be"),
        ("compare", {"text": "a", "tokens": [0, "1"], "words": ["a", "b"]}, 400, "tokens must be"),
        ("compare", {"text": "a", "tokens": [0, 0], "words": ["a", "\udfff"]}, 400, "words must be"),
        ("steer", {"text": "a", "token": 0, "words": "", "before": "", "strength": 9}, 400, "strength must"),
        ("steer", {"text": "a", "token": 0, "words": "", "before": "", "strength": ""}, 400, "strength must"),
        ("chat", {"messages": []}, 400, "messages must be a list of 1 to 64, each role (system or user or"),
        ("chat", {"messages": [{"role": "tool", "content": ""}]}, 400, "messages must be"),
        ("chat", {"messages": [{"role": "user"}]}, 400, "messages must be"),
        ("chat", {"messages": [{"role": "user", "content": "", "x": 1}]}, 400, "messages must be"),
        ("chat", {"messages": [{"role": "user", "content": ""}], "opens": 1}, 400, "opens must be true or"),
        ("explain", b"x" * (api_schema.MOST_BYTES + 1), 413, "at most 65536 bytes"),
        ("about_", {}, 404, "no such question"),
        ("__init__", {}, 404, "no such question"),
    ],
)
def test_bad_questions(what, body, status, message):
    with TestClient(server.app(Fake()), base_url="http://localhost", raise_server_exceptions=True) as client:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = client.post(f"/api/{what}", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == status and message in answer.json()["error"]
        assert len(answer.text) < 300
        assert values(post(client, "read", text="a"))[-1] == {"done": "a"}


def test_only_json_is_read():
    """A form on a page elsewhere can be sent without asking; JSON cannot."""
    with TestClient(server.app(Fake()), base_url="http://localhost") as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = client.post("/api/read", content=b'{"text": "a"}', headers={"content-type": kind})
            assert answer.status_code == 415
        assert client.get("/api/read").status_code == 405


def test_pages_and_their_policy():
    with TestClient(server.app(Fake()), base_url="http://localhost") as client:
        page = client.get("/")
        names = [f"/{n}" for n in re.findall(r'(?:src|href)="([^"#]*)"', page.text)]
        names += [f"/static/{n}" for n in re.findall(r'from "\./(.*?)"', client.get("/static/app.js").text)]
        assert len(names) == 8 and all(client.get(n).status_code == 200 for n in names)
        every = [page, *(client.get(f"/static/{n}") for n in server.FILES), client.get("/static/x"),
                 client.get("/nowhere.html"), client.post("/api/read"), client.get("/api/about")]
        for answer in every:
            parts = answer.headers["content-security-policy"].split(";")
            policy = dict(p.strip().split(" ", 1) for p in parts)
            assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|https?:", page.text)
        for name in [n for n in server.FILES if n.endswith(".js")]:
            code = client.get(f"/static/{name}").text
            assert not re.search(r"[a-z]HTML\b|insertAdjacent|document\.write|\beval\b|new Function", code)
            assert re.findall(r"https?://[^\"]*", code) in ([], ["http://www.w3.org/2000/svg"])
        for name in ("report.html", "..%2fserver.py", "%2e%2e/server.py", "../server.py"):
            assert client.get(f"/static/{name}").status_code == 404


def test_names_and_tokens():
    secret = "a-token-of-some-length"
    made = server.app(Fake(), token=secret, hosts=("localhost", "::1"))
    with TestClient(made, base_url="http://localhost:8420", follow_redirects=False) as client:
        for path in ("/", "/static/app.js", "/api/about", "/?token=wrong", "/?token=%C3%A9"):
            assert client.get(path).status_code == 401
        assert post(client, "read", text="a").status_code == 401
        for given in ("Bearer wrong", secret + "x", ""):
            assert client.get("/api/about", headers={"authorization": given}).status_code == 401
        assert client.get("/api/about", headers={"authorization": f"Bearer {secret}"}).status_code == 200
        answer = client.get(f"/?token={secret}")
        assert answer.status_code == 200 and "begin.js" in answer.text
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/").status_code == 200  # the cookie came along
        for host in ("LOCALHOST", "localhost:1", "[::1]:8420", "[::1]"):
            assert client.get("/", headers={"host": host}).status_code == 200
        for host in ("evil.test", "localhost.evil.test", "localhost:1.evil.test"):
            assert client.get("/", headers={"host": host}).status_code == 421


# --- the line -------------------------------------------------------------------------------------


def until(check):
    end = time.monotonic() + 600  # where it would hang
    while not check():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_line_says_when_to_come_back():
    fake = Fake()
    fake.go.clear()
    with TestClient(server.app(fake, most_waiting=2, at_once=1), base_url="http://localhost") as client:
        answers = {}

        def ask(name):
            answers[name] = post(client, "read", text=name)

        threads = []
        for n, name in enumerate("xyz"):
            threads.append(threading.Thread(target=ask, args=(name,)))
            threads[-1].start()
            until(lambda n=n: fake.began and len(client.app.state.line._waiting) == n)
        refused = post(client, "read", text="w")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "try again in" in refused.json()["error"]
        fake.go.set()
        for t in threads:
            t.join(30)
        assert values(answers["x"])[:2] == [{"place": 1}, {"place": 0}]
        assert values(answers["z"])[:3] == [{"place": 2}, {"place": 1}, {"place": 0}]
        assert [values(answers[n])[-1] for n in "xyz"] == [{"done": n} for n in "xyz"]
        assert fake.began == ["x", "y", "z"]
        assert values(post(client, "read", text="w"))[-1] == {"done": "w"}


def test_what_goes_wrong_for_one_is_no_matter_to_the_next(caplog):
    with TestClient(server.app(Fake()), base_url="http://localhost") as client:
        (*_, event) = values(post(client, "read", text="crash"))
        assert "the server failed to answer" in event["error"] and "secret" not in event["error"]
        assert "a secret path" in caplog.text
        assert values(post(client, "read", text="a"))[-1] == {"done": "a"}


def test_who_leaves_makes_room():
    """While it is under way, and while it waits."""
    fake = Fake()
    fake.go.clear()

    async def main():
        line = job_queue.JobQueue(most=1, at_once=1)
        first = line.join(functools.partial(fake.read, "first"))
        while (await first.events.get()) != {"written": "first"}:
            pass
        second = line.join(functools.partial(fake.read, "second"))
        with pytest.raises(job_queue.QueueFull):
            line.join(functools.partial(fake.read, "third"))
        second.leave()
        third = line.join(functools.partial(fake.read, "third"))
        first.leave()
        fake.go.set()
        events = []
        while (event := await third.events.get()) is not None:
            events.append(event)
        await asyncio.to_thread(line.close)
        return events

    events = asyncio.run(asyncio.wait_for(main(), 30))
    assert events[-1] == {"done": "third"}
    assert fake.began == ["first", "third"] and fake.closed == ["first", "third"]


def test_jobs_take_turns():
    """A request that waits does not stop the requests that have begun. Nor does one that fails."""
    fake = Fake()
    fake.go.clear()

    async def main():
        line = job_queue.JobQueue(most=1, at_once=3)
        jobs = [line.join(functools.partial(fake.read, "slow"))]
        while (await jobs[0].events.get()) != {"written": "slow"}:
            pass
        jobs += [line.join(functools.partial(fake.read, "crash"))]
        while (await jobs[1].events.get()) is not None:
            pass
        jobs.append(line.join(functools.partial(fake.read, "second")))
        while (await jobs[2].events.get()) != {"written": "second"}:
            pass
        assert await jobs[0].events.get() == {"written": "slow"}
        fake.go.set()
        for job, text in ((jobs[0], "slow"), (jobs[2], "second")):
            while "done" not in (event := await job.events.get()):
                pass
            assert event == {"done": text} and await job.events.get() is None
        await asyncio.to_thread(line.close)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert fake.began == ["slow", "crash", "second"] and sorted(fake.closed) == ["second", "slow"]


def test_a_closed_connection_stops_the_work():
    """As the server's protocol says it: http.disconnect while the answer is under way."""
    fake = Fake()
    fake.go.clear()
    made = server.app(fake)

    async def main():
        sent, left = [], asyncio.Event()
        asked = [{"type": "http.request", "body": b'{"text": "a"}', "more_body": False}]

        async def receive():
            if asked:
                return asked.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if b"written" in message.get("body", b""):
                left.set()

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
                 "path": "/api/read", "raw_path": b"/api/read", "query_string": b"", "root_path": "",
                 "scheme": "http", "http_version": "1.1", "server": ("localhost", 80), "client": ("::1", 9),
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}
        await made(scope, receive, send)
        await asyncio.to_thread(until, lambda: fake.closed == ["a"])

    asyncio.run(asyncio.wait_for(main(), 30))
    assert fake.began == fake.closed == ["a"]
    made.state.line.close()


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch, finished, quick):
    """A function that runs `nla serve` and returns (exit status, what uvicorn was given or None)."""
    import uvicorn

    from nla_jax import cli

    monkeypatch.setattr(cli, "_use_cache", lambda: None)

    def run(*argv):
        given = []
        started = lambda app, **kw: given.append(types.SimpleNamespace(app=app, **kw))
        monkeypatch.setattr(uvicorn, "run", started)
        status = world.nla("serve", "--bundle", finished / "run" / "bundle", *argv)
        for g in given:
            g.app.state.line.close()
        return status, given[0] if given else None

    return run


def test_the_command(served, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, given = served("--port", port)
        assert (status, given) == (2, None)
        assert f"--host 127.0.0.1 --port {port}: " in capsys.readouterr().err
    status, given = served("--port", port)
    assert (status, given.host, given.port) == (0, "127.0.0.1", port)
    assert capsys.readouterr().out.strip() == f"http://127.0.0.1:{port}/"
    status, given = served("--host", "0.0.0.0", "--port", port)
    address = capsys.readouterr().out.strip()
    token = re.fullmatch(rf"http://0\.0\.0\.0:{port}/\?token=(\S{{32}})", address)[1]
    with TestClient(given.app, base_url="http://anyname") as client:
        assert client.get("/api/about").status_code == 401
        assert client.get("/api/about", headers={"authorization": f"Bearer {token}"}).status_code == 200
    status, given = served("--port", port, "--allow-host", "nla.example.org", "other", "--allow-host", "x")
    assert status == 0 and "no --token: the proxy must check" in capsys.readouterr().err
    for host in ("nla.example.org", "other:8443", "x", "localhost"):
        with TestClient(given.app, base_url=f"http://{host}") as client:
            assert client.get("/api/about").status_code == 200
    with TestClient(given.app, base_url="http://evil.test") as client:
        assert client.get("/api/about").status_code == 421
    refusals = {("--port", 0): "--port 0: must be between 1 and 65535",
                ("--token", "short"): "--token: must be at least 16",
                ("--allow-host", "https://nla.example.org"): "give a host's name alone"}
    for argv, message in refusals.items():
        status, given = served(*argv)
        assert (status, given) == (2, None) and message in capsys.readouterr().err
