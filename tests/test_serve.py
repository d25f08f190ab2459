"""The explorer: it says what the library says, streamed or not, and nothing that it is sent harms it."""

import asyncio
import functools
import json
import re
import socket
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import world
from starlette.testclient import TestClient

from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.lm import model, params
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.view import engine as engine_lib
from nla_jax.view import line as line_lib
from nla_jax.view import server
from nla_jax.view import sides as sides_lib

TEXT = "an old town by the sea"
NASTY = "</script><img src=x onerror=alert(1)>\u2028\x00 'é' \U0001f600"


@pytest.fixture(scope="module")
def engine(finished, quick):
    run = finished / "run"
    sides = sides_lib.open_sides(run / "bundle", run / "bundle_warm")
    return engine_lib.Engine(sides, max_tokens=64)


@pytest.fixture
def client(engine):
    with TestClient(server.app(engine), base_url="http://localhost") as c:
        yield c


def last(events) -> dict:
    *_, event = events
    return event["done"]


def post(client, what, **fields):
    return client.post(f"/api/{what}", json=fields)


def values(answer) -> list[dict]:
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(x) for x in answer.text.splitlines()]


# --- what it says ---------------------------------------------------------------------------------


def test_streamed_words_are_those_of_the_one_shot_sampler(engine, nla):
    """Samples and the greedy answer, their scores included; and they grow as they are written."""
    h = nla.capture(TEXT)[3]
    at_once = nla.verbalize(np.repeat(h[None], 9, 0), key=jax.random.key(sides_lib.SEED))
    at_once[0] = nla.verbalize(h[None], temperature=0.0)[0]
    found = [list(engine.explain(TEXT, 3, sample=i)) for i in range(9)]
    assert [last(f)["words"] for f in found] == at_once and any(at_once) and "" in at_once
    for events in found:
        written = [e["written"] for e in events[:-1]]
        for a, b in zip(written, written[1:], strict=False):
            assert b.startswith(a.rstrip("\n"))
        if words := last(events)["words"]:
            assert written[-1].strip() == words


def test_scores_are_those_of_the_round_trip(engine, nla):
    reports = nla.round_trip(TEXT, temperature=0.0)
    heat = [h for e in engine.heat(TEXT) for h in e.get("heat", ())]
    assert [h["token"] for h in heat] == list(range(len(nla.tokens(TEXT))))
    assert [h["words"] for h in heat] == [r.explanation for r in reports]
    np.testing.assert_allclose([h["fve"] for h in heat], [r.fve for r in reports], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([h["cos"] for h in heat], [r.cos for r in reports], atol=1e-5)
    assert [h["ok"] for h in heat] == [r.ok for r in reports]
    rest = [h for e in engine.heat(TEXT, start=10) for h in e.get("heat", ())]
    assert [(h["token"], h["words"]) for h in rest] == [(h["token"], h["words"]) for h in heat[10:]]
    for t in (0, 3):
        one = last(engine.explain(TEXT, t))
        assert one["fve"] == pytest.approx(reports[t].fve, rel=1e-4, abs=1e-4) and one["ok"] == reports[t].ok


def fve_of(nla, h_D, h_hat_D) -> float:
    """By the formula."""
    unit = lambda a: a * np.sqrt(len(a)) / np.linalg.norm(a)  # noqa: E731
    return 1 - np.sum((unit(h_D) - unit(h_hat_D)) ** 2) / np.sum((unit(h_D) - nla.mean_direction) ** 2)


def test_edits_claims_and_controls(engine, nla):
    h = nla.capture(TEXT)[2].astype(np.float64)
    words, before = "first claim\nsecond one", "other words"
    done = last(engine.edit(TEXT, 2, words, before))
    parts = ["first claim\nsecond one", "second one", "first claim", "other words"]
    whole, no_first, no_second, old = nla.reconstruct(parts).astype(np.float64)
    assert done["fve"] == pytest.approx(fve_of(nla, h, whole), rel=1e-4)
    assert [c["words"] for c in done["claims"]] == ["first claim", "second one"]
    wanted = [fve_of(nla, h, whole) - fve_of(nla, h, part) for part in (no_first, no_second)]
    assert [c["adds"] for c in done["claims"]] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    cos = whole @ old / np.linalg.norm(whole) / np.linalg.norm(old)
    assert done["cos_before"] == pytest.approx(cos, abs=1e-5)
    assert last(engine.edit(TEXT, 2, words, words))["cos_before"] == pytest.approx(1, abs=1e-6)
    side = engine.sides["a"]
    assert done["controls"]["mean"] == pytest.approx(fve_of(nla, h, nla.mean_direction), rel=1e-4)
    variance = np.sum((F.normalised(h[None])[0] - nla.mean_direction) ** 2)
    others = [fve_of(nla, h, x) if ok else 1 - 2 * len(h) / variance
              for x, ok in zip(side.others_ND, side.others_ok, strict=True)]  # fmt: skip
    assert done["controls"]["shuffled"] == pytest.approx(np.mean(others), rel=1e-4)
    (alone,) = last(engine.edit(TEXT, 2, "only one"))["claims"]
    only, bare = nla.reconstruct(["only one", ""]).astype(np.float64)
    assert alone["adds"] == pytest.approx(fve_of(nla, h, only) - fve_of(nla, h, bare), rel=1e-3, abs=1e-4)


def test_two_tokens(engine, nla):
    h = nla.capture(TEXT)[[1, 4]].astype(np.float64)
    done = last(engine.compare(TEXT, (1, 4), ("ab cd", "ef")))
    h_hat = nla.reconstruct(["ab cd", "ef"]).astype(np.float64)
    cos = lambda a: a[0] @ a[1] / np.linalg.norm(a[0]) / np.linalg.norm(a[1])  # noqa: E731
    assert (done["cos_h"], done["cos_words"]) == pytest.approx((cos(h), cos(h_hat)), abs=1e-5)
    for name, other in (("own", 0), ("crossed", 1)):  # crossed: the other token's words
        wanted = [fve_of(nla, h[i], h_hat[i ^ other]) for i in (0, 1)]
        assert [s["fve"] for s in done[name]] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@functools.partial(jax.jit, static_argnames="spec")
def next_id(base, ids_T, n, at, add_D, spec):
    """The likeliest token after the first n, by a whole forward pass with `add_D` · |h| added at block K."""
    lm, K = spec.lm, spec.layer
    upper = {**base, "blocks": jax.tree.map(lambda a: a[K + 1 :], base["blocks"])}
    valid = jnp.arange(len(ids_T))[None] < n
    x, _ = model.forward(params.truncate(base, K + 1), lm, model.embed(base, lm, ids_T[None]), valid)
    x = x.at[:, at].add(jnp.linalg.norm(x[0, at]) * add_D)
    x, _ = model.forward(upper, lm.of_blocks(K + 1, lm.n_blocks), x, valid)
    return model.unembed(base, lm, x[:, n - 1]).argmax()


def greedy(nla, ids, add_D, n):
    """n tokens after `ids`, the direction added at the last of these."""
    out, at = np.zeros(len(ids) + n, np.int32), len(ids) - 1
    out[: at + 1] = ids
    for i in range(at + 1, len(out)):
        out[i] = next_id(nla.base, out, i, at, add_D, nla.spec)
    return out[at + 1 :].tolist()


def test_steering_is_the_forward_pass_with_another_h(engine, nla):
    token, strength, n = 6, 3.0, 6
    events = list(engine.steer(TEXT, token, "ab cd", "the sea", strength))
    new, old = (a / np.linalg.norm(a) for a in nla.reconstruct(["ab cd", "the sea"]))
    ids = tok_lib.plain_ids(nla.tokenizer, TEXT)[: token + 1]
    for said, add_D in zip(last(events)["goes_on"], (0 * new, strength * (new - old)), strict=True):
        ids_N = greedy(nla, ids, add_D, n)
        ends = [i for i, t in enumerate(ids_N) if t in nla.spec.av.eos]
        wanted = nla.tokenizer.decode(ids_N[: (ends or [n])[0]], skip_special_tokens=True)
        assert said.startswith(wanted) and (not ends or said == wanted)
    plain = last(engine.steer(TEXT, token, "ab cd", "the sea", 0.0))["goes_on"]
    assert plain[0] == plain[1] == last(events)["goes_on"][0]


def test_warm_start_beside_it(engine, finished):
    import nla_jax

    warm = nla_jax.load(finished / "run" / "bundle_warm", batch=8)
    h = warm.capture(TEXT)[5]
    wanted = warm.verbalize(np.repeat(h[None], 4, 0), key=jax.random.key(sides_lib.SEED))
    assert [last(engine.explain(TEXT, 5, "b", i))["words"] for i in (1, 2, 3)] == wanted[1:]
    assert engine.sides["b"].nla.base is engine.sides["a"].nla.base  # the target is held once
    facts = engine.about()["sides"]
    assert facts["a"]["stage"] == "rl" != facts["b"]["stage"]
    summary = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    assert facts["a"]["figures"]["fve"][0] == summary["fve_rl"]
    assert facts["b"]["figures"]["fve"][0] == summary["fve_warm_start"]


@pytest.mark.parametrize(
    "response,words",
    [("", ""), ("\nan ol", "an ol"), ("\na\n</expl", "a"), ("\na <", "a "), ("\na\n</explanation>x", "a"),
     ("\na < b", "a < b"), ("\na\ufffd", "a")],
)  # fmt: skip
def test_an_answer_under_way(response, words):
    assert sides_lib.unfinished("<explanation>" + response) == words
    assert sides_lib.unfinished("<expl") == "" == sides_lib.unfinished("words" + response)


def test_what_the_engine_refuses(engine, finished, tmp_path):
    for work, message in [
        (lambda: engine.explain("a" * 65, 0), "65 tokens; at most 64"),
        (lambda: engine.explain(TEXT, 99), "token 99 is outside the text"),
        (lambda: engine.read(""), "the text is empty"),
        (lambda: engine.heat("a" * 65), "65 tokens; at most 64"),
        (lambda: engine.explain(TEXT, 0, "c"), "no bundle 'c'"),
    ]:
        with pytest.raises(UserError, match=message):
            list(work())
    with pytest.raises(UserError, match="not an NLA bundle"):
        sides_lib.open_sides(finished / "run" / "bundle", tmp_path)


# --- how it is asked ------------------------------------------------------------------------------


def test_questions_and_answers(client, engine):
    answer = post(client, "explain", text=TEXT, token=3, sample=2)
    first, second, *events = values(answer)
    assert (answer.status_code, first, second) == (200, {"place": 1}, {"place": 0})
    assert events == json.loads(json.dumps([e for e in engine.explain(TEXT, 3, sample=2) if e]))
    assert values(post(client, "read", text=NASTY))[-1]["done"]["tokens"] == engine.tokens(NASTY)
    done = values(post(client, "edit", text=TEXT, token=1, words=NASTY))[-1]["done"]
    assert done["words"] == NASTY and done["ok"]
    tokens = values(post(client, "compare", text=TEXT, tokens=[0, 1], words=["a", ""]))[-1]["done"]
    assert [s["ok"] for s in tokens["own"]] == [True, False]
    asked = dict(text=TEXT, token=2, words="ab", before="cd", strength=1)
    assert len(values(post(client, "steer", **asked))[-1]["done"]["goes_on"]) == 2
    assert "outside the text" in values(post(client, "explain", text=TEXT, token=64))[-1]["error"]
    assert values(post(client, "explain", text=TEXT, token=0))[-1]["done"]


@pytest.mark.parametrize(
    "what,body,status,message",
    [
        ("explain", b"", 400, "not JSON"),
        ("explain", b"\xff\xfe", 400, "not JSON"),
        ("explain", b"[" * 50000, 400, "not JSON"),
        ("explain", b"[]", 400, "fields by name"),
        ("explain", {"token": 1}, 400, "text must be a text of 1 to 8000 characters"),
        ("explain", {"text": "", "token": 1}, 400, "text must be"),
        ("explain", {"text": "a" * 8001, "token": 1}, 400, "text must be"),
        ("explain", {"text": "\ud800", "token": 1}, 400, "text must be"),
        ("explain", {"text": 3, "token": 1}, 400, "text must be"),
        ("explain", {"text": "a"}, 400, "token must be"),
        ("explain", {"text": "a", "token": True}, 400, "token must be"),
        ("explain", {"text": "a", "token": -1}, 400, "token must be"),
        ("explain", {"text": "a", "token": 1.0}, 400, "token must be"),
        ("explain", {"text": "a", "token": 0, "sample": 64}, 400, "sample must be"),
        ("explain", {"text": "a", "token": 0, "side": "c"}, 400, "side must be"),
        ("explain", {"text": "a", "token": 0, "max_new": 10**9}, 400, "unknown field 'max_new'"),
        ("edit", {"text": "a", "token": 0, "words": "w" * 4001}, 400, "words must be"),
        ("compare", {"text": "a", "tokens": [0], "words": ["a", "b"]}, 400, "tokens must be"),
        ("compare", {"text": "a", "tokens": [0, "1"], "words": ["a", "b"]}, 400, "tokens must be"),
        ("compare", {"text": "a", "tokens": [0, 0], "words": ["a", "\udfff"]}, 400, "words must be"),
        ("steer", {"text": "a", "token": 0, "words": "", "before": "", "strength": 9}, 400, "strength must"),
        ("steer", {"text": "a", "token": 0, "words": "", "before": "", "strength": ""}, 400, "strength must"),
        ("explain", b"x" * (server.MOST_BYTES + 1), 413, "at most 65536 bytes"),
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
        names = re.findall(r'(?:src|href)="(/[^"]*)"', page.text)
        names += [f"/static/{n}" for n in re.findall(r'from "\./(.*?)"', client.get("/static/app.js").text)]
        assert len(names) == 6 and all(client.get(n).status_code == 200 for n in names)
        every = [page, *(client.get(f"/static/{n}") for n in server.FILES), client.get("/static/x"),
                 client.get("/nowhere"), client.post("/api/read"), client.get("/api/about")]  # fmt: skip
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
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/").status_code == 200  # the cookie came along
        for host in ("LOCALHOST", "localhost:1", "[::1]:8420", "[::1]"):
            assert client.get("/", headers={"host": host}).status_code == 200
        for host in ("evil.test", "localhost.evil.test", "localhost:1.evil.test"):
            assert client.get("/", headers={"host": host}).status_code == 421


# --- the line -------------------------------------------------------------------------------------


class Fake:
    """An engine that waits when it is told to."""

    def __init__(self):
        self.sides, self.go, self.began, self.closed = {"a": None}, threading.Event(), [], []
        self.go.set()

    def about(self):
        return {}

    def read(self, text):
        self.began.append(text)
        if text == "crash":
            raise RuntimeError("a secret path")
        try:
            while not self.go.wait(0.01):
                yield {"written": text}
            yield {"done": text}
        finally:
            self.closed.append(text)


def until(check):
    end = time.monotonic() + 30
    while not check():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_line_says_when_to_come_back():
    fake = Fake()
    fake.go.clear()
    with TestClient(server.app(fake, most_waiting=2), base_url="http://localhost") as client:
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
        assert "something went wrong" in event["error"] and "secret" not in event["error"]
        assert "a secret path" in caplog.text
        assert values(post(client, "read", text="a"))[-1] == {"done": "a"}


def test_who_leaves_makes_room():
    """While it is under way, and while it waits."""
    fake = Fake()
    fake.go.clear()

    async def main():
        line = line_lib.Line(most=1)
        first = line.join(functools.partial(fake.read, "first"))
        while (await first.events.get()) != {"written": "first"}:
            pass
        second = line.join(functools.partial(fake.read, "second"))
        with pytest.raises(line_lib.Full):
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
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}  # fmt: skip
        await made(scope, receive, send)
        await asyncio.to_thread(until, lambda: fake.closed == ["a"])

    asyncio.run(asyncio.wait_for(main(), 30))
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
        started = lambda app, **kw: given.append(types.SimpleNamespace(app=app, **kw))  # noqa: E731
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
    refusals = {("--port", 0): "--port lies between", ("--token", "short"): "--token: at least 16"}
    for argv, message in refusals.items():
        status, given = served(*argv)
        assert (status, given) == (2, None) and message in capsys.readouterr().err
