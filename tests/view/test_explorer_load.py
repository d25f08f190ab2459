"""The explorer over HTTP: requests that a fuzzer makes of its description, and many clients at once."""

import asyncio
import collections
import gc
import json
import os
import socket
import threading
import tracemalloc

import httpx2
import hypothesis
import jsonschema_rs
import pytest
import schemathesis

from nla_jax.view import browser
from nla_jax.view.explorer import api_schema, neuronpedia_schema, openapi, server
from nla_jax.view.explorer import engine as engine_lib
from nla_jax.view.explorer.job_queue import AT_ONCE
from tests.helpers.explorers import TEXT, even_trust, last

FUZZED = int(os.environ.get("NLA_FUZZED", 128))  # requests; what is slow about them is to make them up
CLIENTS, WAITING = 200, 16
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE


def fits(name: str, line: str) -> dict:
    """The value of a line of an answer, which is as described."""
    value = json.loads(line)
    jsonschema_rs.validate(openapi.line(api_schema.REQUESTS[name]), value)
    return value


def test_no_fuzzed_request_breaks_it(engine):
    """Valid ones are answered, invalid ones refused, all as described; no 500, no failure in a 200."""
    schema = schemathesis.openapi.from_dict(openapi.description("0"))
    operations = [found.ok() for found in schema.get_all_operations()]
    paths = {"/api/about", *(f"/api/{q}" for q in api_schema.REQUESTS)}
    foreign = {f"/{name}" for name in neuronpedia_schema.REQUESTS}  # tests/view/test_neuronpedia.py has these
    assert {o.path for o in operations} == paths | foreign
    operations = [o for o in operations if o.path in paths]
    statuses = collections.Counter()

    def fuzz(operation, mode, address):
        @hypothesis.settings(
            max_examples=-(-FUZZED // (2 * len(api_schema.REQUESTS))), phases=[hypothesis.Phase.generate],
            suppress_health_check=[*hypothesis.HealthCheck], derandomize=True, database=None, deadline=None,
        )
        @hypothesis.given(operation.as_strategy(mode))
        def ask(case):
            answer = case.call(base_url=address, timeout=600)  # a first one is compiled
            statuses[answer.status_code] += 1
            if answer.status_code == 413:  # not a status that schemathesis knows
                assert len(answer.request.body) > api_schema.MOST_BYTES
                return
            case.validate_response(answer)
            if answer.status_code == 200 and operation.path != "/api/about":
                events = [fits(operation.path.split("/")[-1], x) for x in answer.text.splitlines()]
                assert "the server failed to answer" not in events[-1].get("error", ""), case.body

        ask()

    with browser.serve_app(server.app(engine)) as address:
        assert httpx2.get(f"{address}/openapi.json").json()["paths"] == openapi.description("")["paths"]
        for operation in operations:
            fuzz(operation, POSITIVE, address)
            if operation.path != "/api/about":  # it has nothing to get wrong
                fuzz(operation, NEGATIVE, address)
    assert sum(statuses.values()) > 0.9 * FUZZED and {200, 400} <= statuses.keys()
    assert max(statuses) < 500


def test_what_it_says_is_as_described(engine, monkeypatch):
    about = json.loads(json.dumps(engine.about()))
    answers = openapi.description("")["paths"]["/api/about"]["get"]["responses"]["200"]
    jsonschema_rs.validate(answers["content"]["application/json"]["schema"], about)
    asked = {
        "read": {}, "heat": {}, "explain": {"token": 3}, "recur": {"token": 3, "words": "a sea\nof the"},
        "edit": {"token": 1, "words": "a sea\nb"}, "compare": {"tokens": (0, 1), "words": ("a", "b")},
        "steer": {"token": 1, "words": "a", "before": "b", "strength": 1},
        "predict": {"token": 1, "words": "a sea"}, "telling": {"n": 2, "by": "surprise"},
        "trust": {"token": 1, "words": "a sea"},
        "chat": {"messages": [{"role": "user", "content": "a sea"}]},
    }
    assert asked.keys() == api_schema.REQUESTS.keys()
    monkeypatch.setattr(engine.sides["a"].nla, "trust", even_trust())
    for name, fields in asked.items():
        text = {} if name == "chat" else {"text": TEXT}
        events = [fits(name, json.dumps(e)) for e in getattr(engine, name)(**text, **fields)]
        assert any(e.keys() & api_schema.REQUESTS[name].lines.keys() for e in events)


class Gated(engine_lib.Engine):
    """Every explanation waits until it may be begun."""

    def __init__(self, sides):
        super().__init__(sides, max_tokens=64)
        self.go = threading.Event()

    def explain(self, *args, **kw):
        while not self.go.wait(0.01):
            yield {}
        yield from super().explain(*args, **kw)


async def burst(address: str, gate: threading.Event) -> list:
    """The answers to CLIENTS that ask at once. AT_ONCE explanations are under way until all are answered but
    those in the line."""
    answers = []
    async with httpx2.AsyncClient(base_url=address, timeout=None, limits=httpx2.Limits()) as client:

        async def ask(i: int):
            fields = {"text": TEXT, "token": i % 8, "sample": i % 64}
            answers.append(await client.post("/api/explain", json=fields))

        asked = [asyncio.create_task(ask(i)) for i in range(CLIENTS)]
        while len(answers) < CLIENTS - WAITING - AT_ONCE:
            done, _ = await asyncio.wait(asked, timeout=0.01)
            for task in done:
                task.result()
        gate.set()
        await asyncio.gather(*asked)
    gate.clear()
    return answers


def test_two_hundred_clients_at_once(engine):
    """Who cannot wait is told when to come back, who waits is answered, and what it took is given back."""
    gated = Gated(engine.sides)
    with browser.serve_app(server.app(gated, most_waiting=WAITING)) as address:
        held = []
        tracemalloc.start()
        try:
            for _ in range(3):
                tracemalloc.reset_peak()
                answers = asyncio.run(burst(address, gated.go))
                counts = collections.Counter(a.status_code for a in answers)
                assert counts.keys() == {200, 429} and sum(counts.values()) == CLIENTS
                assert WAITING <= counts[200] <= WAITING + AT_ONCE
                for a in answers:
                    if a.status_code == 429:
                        assert 1 <= int(a.headers["retry-after"]) and "try again in" in a.json()["error"]
                    else:
                        *_, event = (fits("explain", x) for x in a.text.splitlines())
                        assert event["done"].keys() >= {"words", "fve"}
                del answers, a
                gc.collect()
                held.append(tracemalloc.get_traced_memory())
        finally:
            tracemalloc.stop()
        (_, _), (second, _), (third, peak) = held
        assert third - second < 2**20 and peak - second < 100 * 2**20
        gated.go.set()
        said = httpx2.post(f"{address}/api/explain", json={"text": TEXT, "token": 2}, timeout=None).text
        assert json.loads(said.splitlines()[-1])["done"]["words"] == last(engine.explain(TEXT, 2))["words"]


def test_a_request_that_does_not_arrive_is_given_up(engine, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)

    with browser.serve_app(server.app(engine)) as address:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as held:
            held.sendall(b"POST /api/read HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"
                         b"content-type: application/json\r\n\r\n{")
            said = held.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 408 ") and b"took more than 0.05 s to arrive" in said
        assert httpx2.post(f"{address}/api/read", json={"text": TEXT}, timeout=None).status_code == 200


@pytest.mark.parametrize("value", [1.0, 3, 0])
def test_a_whole_number_may_have_a_point(value):
    """As in JSON Schema."""
    assert api_schema.check_value(value, api_schema.TOKEN) == int(value)
    assert type(api_schema.check_value(value, api_schema.TOKEN)) is int
