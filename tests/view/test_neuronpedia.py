"""Neuronpedia's endpoints on `nla serve`: what they answer and refuse, and that nothing breaks them."""

import asyncio
import json
import os

import jax
import jsonschema_rs
import numpy as np
import pytest
from starlette.testclient import TestClient

from nla_jax.evaluate import fve as F
from nla_jax.view.explorer import neuronpedia_http, neuronpedia_schema, openapi, server
from tests.helpers import api_fuzz
from tests.helpers.explorers import TEXT

FUZZED = int(os.environ.get("NLA_FUZZED_NEURONPEDIA", 200))
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who is by the sea"}]


@pytest.fixture
def client(engine):
    with TestClient(server.app(engine), base_url="http://localhost") as c:
        yield c


def ask(client, name: str, **fields):
    """The answer to a request, which is as described."""
    answer = client.post(f"/{name}", json=fields)
    assert answer.status_code == 200, answer.text
    jsonschema_rs.validate(neuronpedia_schema.REQUESTS[name].answer, answer.json())
    return answer.json()


def frames(answer) -> list:
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = [p.removeprefix("data: ") for p in answer.text.split("\n\n") if p and not p.startswith(":")]
    assert parts[-1] == "[DONE]"
    return [json.loads(p) for p in parts[:-1]]


def test_a_text_is_explained_as_its_activations_are(client, engine):
    """/extract and /describe give what /explain gives, and /score its scores."""
    nla = engine.sides["a"].nla
    tokens = ask(client, "extract", text=TEXT)
    h_TD = nla.capture(TEXT)
    np.testing.assert_array_equal([t["activation"] for t in tokens["tokens"]], h_TD)
    assert [t["token"] for t in tokens["tokens"]] == nla.tokens(TEXT)
    assert tokens["layer_index"] == nla.spec.layer
    explained = ask(client, "explain", text=TEXT, temperature=0)["results"]
    assert [r["position"] for r in explained] == [*range(len(h_TD))][::-1]
    greedy = nla.runner.explain(h_TD[::-1], jax.random.key(0), temperature=0,
                                max_new=nla.meta["max_new_tokens"])
    assert [r["description"] for r in explained] == greedy
    two = [h_TD[3].tolist(), h_TD[5].tolist()]
    described = ask(client, "describe", activations=two, temperature=0)["results"]
    for found, i in zip(described, (3, 5), strict=True):
        same = explained[len(h_TD) - 1 - i]
        assert found["description"] == same["description"]
        assert found["mse"] == pytest.approx(same["mse"], abs=1e-6)
        assert same["l2_norm"] == pytest.approx(np.linalg.norm(h_TD[i]), rel=1e-6)
    sampled = ask(client, "explain", text=TEXT, temperature=1)["results"]
    readable = next(r for r in sampled if r["description"])
    h_D = h_TD[readable["position"]]
    score = ask(client, "score", description=readable["description"], activation=h_D.tolist())
    assert score["mse"] == pytest.approx(readable["mse"], abs=1e-5)
    error = F.errors(nla.reconstruct([readable["description"]]), h_D[None])[0] / len(h_D)
    assert score["mse"] == pytest.approx(error, abs=1e-5)
    assert ask(client, "score", description="", activation=h_D.tolist()) == {"mse": 2, "cosine_similarity": 0}


def test_positions_samples_and_the_length_of_an_answer(client, engine):
    asked = dict(text=TEXT, positions=[-1, 2, 2], temperature=1.0)
    ordered = ask(client, "explain", **asked, reverse=False)["results"]
    n = len(engine.tokens(TEXT))
    assert [r["position"] for r in ordered] == [n - 1, 2, 2]
    assert ask(client, "explain", **asked)["results"][::-1][0]["position"] == n - 1
    again = ask(client, "explain", **asked, reverse=False)["results"]
    assert again == ordered  # the same request, the same words
    h = engine.sides["a"].nla.capture(TEXT)[[4]].tolist()
    short = ask(client, "describe", activations=h * 9, temperature=0, max_new_tokens=1)["results"]
    assert [r["description"] for r in short] == [""] * 9 and short[0]["mse"] == 2
    most = ask(client, "describe", activations=h, temperature=0, max_new_tokens=4096)
    assert most == ask(client, "describe", activations=h, temperature=0)


def test_compare_describes_the_difference(client, engine):
    h_TD = engine.sides["a"].nla.capture(TEXT).astype(np.float64)
    fields = dict(activation_a=h_TD[2].tolist(), activation_b=h_TD[5].tolist(), temperature=0)
    found = ask(client, "compare", **fields)
    difference = h_TD[2] - h_TD[5]
    assert found["diff_norm"] == pytest.approx(np.linalg.norm(difference))
    (alone,) = ask(client, "describe", activations=[difference.tolist()], temperature=0)["results"]
    assert {k: found[k] for k in alone} == alone
    huge = {k: [1e30 * x for x in v] if isinstance(v, list) else v for k, v in fields.items()}
    assert ask(client, "compare", **huge)["description"] == found["description"]


def test_streams(client):
    """Every final frame is that of the whole answer; frames before it have no description, as there."""
    fields = dict(text=TEXT, positions=[1, -1], temperature=0)
    whole = ask(client, "explain", **fields)
    first, *rest = frames(client.post("/explain", json={**fields, "stream": True}))
    n = len(ask(client, "tokenize", text=TEXT)["tokens"])
    assert first == {"layer_index": whole["layer_index"], "total": 2, "prompt_length": n}
    assert [f for f in rest if "description" in f] == whole["results"]
    partial = [f for f in rest if "description" not in f]
    assert all(f.keys() == {"position", "text", "done"} and f["done"] is False for f in partial)
    for result in whole["results"]:
        last = [f["text"] for f in partial if f["position"] == result["position"]][-1:]
        assert not result["description"] or result["description"].startswith(last[0].strip())
    activations = [t["activation"] for t in ask(client, "extract", text="ab")["tokens"]]
    said = ask(client, "describe", activations=activations, temperature=0)["results"]
    asked = {"activations": activations, "temperature": 0, "stream": True}
    events = frames(client.post("/describe", json=asked))
    final = [f for f in events if "description" in f]
    assert final == [{"index": i, **r} for i, r in enumerate(said)]


def test_a_chat_has_its_messages(client, engine):
    found = ask(client, "tokenize", messages=CHAT)
    words = {}
    for t in found["tokens"]:
        words.setdefault((t["message_index"], t["role"], t["section"]), []).append(t["token"])
    assert "".join(words[0, "system", "content"]) == "be brief"
    assert "".join(words[1, "user", "content"]) == "who is by the sea"
    assert "<|im_start|>" in words[1, "user", "header"] and "<|im_end|>" in words[1, "user", "footer"]
    assert "<|im_start|>" in words[None, "assistant", "header"]
    held = ask(client, "tokenize", messages=CHAT, continue_final_message=True)
    assert held["text"].endswith("by the sea") and found["text"].startswith(held["text"])
    closed = ask(client, "tokenize", messages=CHAT, add_generation_prompt=False)
    assert found["text"].startswith(closed["text"]) and "assistant" not in closed["text"]
    (last,) = ask(client, "explain", messages=CHAT, positions=[-1])["results"]
    assert (last["role"], last["section"], last["message_index"]) == ("assistant", "header", None)
    # Rendered by the client, it is the same.
    assert ask(client, "tokenize", text=found["text"])["prompt_length"] == found["prompt_length"]


def test_one_character_of_several_tokens(client):
    tokens = ask(client, "tokenize", text="a\U0001f600b")["tokens"]
    assert [t["token"] for t in tokens] == ["a", *["\U0001f600"] * 4, "b"]
    assert [(t["fragment_index"], t["fragment_count"]) for t in tokens] == [
        (0, 1), (0, 4), (1, 4), (2, 4), (3, 4), (0, 1)]


@pytest.mark.parametrize("name, fields, status, words", [
    ("explain", {}, 400, "give text or messages"),
    ("explain", {"text": "a", "positions": [1]}, 400, "position 1 is out of range (0..0)"),
    ("explain", {"text": "a", "positions": [0.5]}, 422, "must be a whole number"),
    ("explain", {"text": "a " * 65}, 400, "at most 64 are read here"),
    ("explain", {"text": "a", "stream": True, "positions": [9]}, 400, "out of range"),
    ("explain", {"text": "a" * 65537}, 422, "text must be"),
    ("explain", {"text": "a", "temperature": 5.5}, 422, "temperature must be a number from 0 to 5"),
    ("explain", {"messages": [{"role": "tool,x", "content": "a"}]}, 400, "comma"),
    ("explain", {"messages": [{"content": "a"}]}, 422, "role is missing"),
    ("explain", {"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "special token"),
    ("describe", {"activations": []}, 422, "a list of 1 to 128"),
    ("describe", {"activations": [[0.5]]}, 400, "activation 0 has 1 numbers; d_model is 32"),
    ("describe", {"activations": [[0] * 32]}, 400, "no direction"),
    ("describe", {"activations": [["1"] * 32]}, 422, "finite in float32"),
    ("describe", {"activations": [[10**400] * 32]}, 422, "finite in float32"),
    ("describe", {"activations": [[1e39] * 32]}, 422, "finite in float32"),
    ("score", {"activation": [1] * 32}, 422, "description is missing"),
    ("score", {"activation": [1] * 32, "description": "\ud800"}, 422, "description must be"),
    ("score", {"activation": [1] * 31, "description": "a"}, 400, "activation has 31 numbers"),
    ("compare", {"activation_a": [1] * 32, "activation_b": [1] * 32}, 400, "are equal"),
    ("compare", {"activation_a": [1] * 32, "activation_b": [1]}, 400, "activation_b has 1 numbers"),
    ("extract", {"text": ""}, 400, "give text or messages"),
])
def test_refusals(client, name, fields, status, words):
    content, kind = json.dumps(fields), {"content-type": "application/json"}
    answer = client.post(f"/{name}", content=content, headers=kind)
    assert answer.status_code == status
    said = answer.json()["detail"]
    assert words in (said[0]["msg"] if isinstance(said, list) else said)


def test_the_secret_and_the_health_check(engine):
    secret = "a-secret-of-some-length"
    with TestClient(server.app(engine, token=secret), base_url="http://localhost") as client:
        assert client.post("/tokenize", json={"text": "a"}).status_code == 401
        wrong = client.post("/tokenize", json={"text": "a"}, headers={"x-secret-key": "wrong"})
        assert wrong.status_code == 403 and "detail" in wrong.json()
        known = {"x-secret-key": secret}
        assert client.post("/tokenize", json={"text": "a"}, headers=known).status_code == 200
        said = client.get("/", headers={**known, "accept": "application/json"}).json()
        assert said["d_model"] == 32 and said["limits"]["max_positions_per_request"] == 512
        assert "<html" in client.get("/", headers={**known, "accept": "text/html"}).text


def test_a_proxy_and_the_description(client):
    assert client.post("/nla/explorer/tokenize", json={"text": "a"}).status_code == 200
    assert "<html" in client.get("/nla/score").text  # the path of a proxy, not a request
    paths = client.get("/openapi.json").json()["paths"]
    assert {f"/{name}" for name in neuronpedia_schema.REQUESTS} <= paths.keys()
    assert openapi.description("1")["paths"] == paths


def test_many_clients_and_the_queue(engine, monkeypatch):
    """Beyond the queue they get 429 and when to come back; who goes away is dropped."""
    gate, begun, closed = asyncio.Event(), [], []

    def work(engine, name, fields):
        begun.append(fields["text"])
        try:
            while not gate.is_set():
                yield {}
            yield {"result": {"text": fields["text"]}}
        finally:
            closed.append(fields["text"])

    monkeypatch.setattr(neuronpedia_http.neuronpedia, "answer", work)
    made = server.app(engine, most_waiting=2, at_once=1)

    async def call(text: str, leave: asyncio.Event) -> list:
        sent, asked = [], [{"type": "http.request", "body": json.dumps({"text": text}).encode()}]

        async def receive():
            if asked:
                return asked.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
                 "path": "/extract", "raw_path": b"/extract", "query_string": b"", "root_path": "",
                 "scheme": "http", "http_version": "1.1", "server": ("localhost", 80), "client": ("::1", 9),
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}
        await made(scope, receive, send)
        return sent

    async def main():
        async def until(check):
            while not check():
                await asyncio.sleep(0.005)

        never, leaves = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(call("first", leaves))
        await until(lambda: begun == ["first"])
        waiting = [asyncio.create_task(call(text, gone))
                   for text, gone in (("second", leaves), ("third", never))]
        await until(lambda: len(made.state.line._waiting) == 2)
        start, body = await call("fourth", never)
        assert start["status"] == 429 and b"try again in" in body["body"]
        assert int(dict(start["headers"])[b"retry-after"]) >= 1
        leaves.set()  # the first, which is under way, and the second, which waits, go away
        assert await first == [] and await waiting[0] == []
        gate.set()
        start, body = await waiting[1]
        assert start["status"] == 200 and json.loads(body["body"]) == {"text": "third"}

    asyncio.run(asyncio.wait_for(main(), 60))
    made.state.line.close()
    assert begun == closed == ["first", "third"]


def test_a_crash_is_told_and_not_shown(engine, monkeypatch, caplog):
    def work(engine, name, fields):
        yield {}
        raise RuntimeError("a secret path")

    monkeypatch.setattr(neuronpedia_http.neuronpedia, "answer", work)
    with TestClient(server.app(engine), base_url="http://localhost") as client:
        answer = client.post("/extract", json={"text": "a"})
        assert answer.status_code == 500 and "secret" not in answer.text and "a secret path" in caplog.text
        streamed = client.post("/explain", json={"text": "a", "stream": True})
        assert "the server failed" in streamed.text and "[DONE]" not in streamed.text


def test_no_request_breaks_it(client, engine):
    """NLA_FUZZED_NEURONPEDIA=2000 sends more of them."""
    width = engine.sides["a"].facts["width"]
    statuses, _, _ = api_fuzz.fuzz(client, 1, FUZZED, width)
    assert {200, 400, 422} <= statuses.keys() and max(statuses) < 500
    assert statuses[200] > FUZZED / 10
    same = [[r["content"] for r in api_fuzz.requests(7, 20, width)] for _ in range(2)]
    assert same[0] == same[1]
