"""Requests that a careless or hostile client may send to Neuronpedia's endpoints, made from a seed.

    python -m tests.helpers.api_fuzz --requests 2000

serves a tiny random bundle, sends that many, and prints the statuses and the longest answer.
"""

import argparse
import collections
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nla_jax.view.explorer import neuronpedia_schema as schema

NAMES = tuple(schema.REQUESTS)
TEXTS = ("a", "an old town by the sea", "é\u2028\U0001f600", "\x00", " ", "",
         "<|im_start|>user\nhi<|im_end|>", "ab " * 400, "x" * 70000, "\ud800", "</explanation>", "㈱")
NUMBERS = (0, 1, -1, 0.5, 1e-320, 1e300, -1e39, 10**400, float("nan"), float("inf"), -0.0, True, None, "1")
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")


def value(rng: random.Random, depth: int = 0):
    """Any JSON value, of Python's kind: with NaN and huge integers."""
    pick = rng.randrange(8 if depth < 4 else 4)
    if pick < 2:
        return rng.choice(NUMBERS)
    if pick < 4:
        return rng.choice(TEXTS)
    if pick < 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ("text", "role", "content", "x")
    return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(3))}


def vector(rng: random.Random, width: int):
    """An activation, or something near one."""
    n = rng.choice((*[width] * 12, width - 1, width + 1, 0))
    scale = rng.choice((1, 1, 1, 1e-30, 1e-200, 1e30, 0))
    out = [scale * rng.gauss(0, 1) for _ in range(n)]
    if rng.random() < 0.05 and out:
        out[rng.randrange(n)] = value(rng)
    return out


def fields(rng: random.Random, name: str, width: int) -> dict:
    """The fields of a request: most fit, each may be missing or anything."""
    turns = rng.choice((0, 1, 1, 3, 70))
    good = {
        "text": lambda: rng.choice(TEXTS), "description": lambda: rng.choice(TEXTS),
        "messages": lambda: rng.choice((None, None, [{"role": rng.choice(("user", "assistant", "tool", ",")),
                                                      "content": rng.choice(TEXTS)}] * turns)),
        "positions": lambda: rng.choice((None, [], [-1], [0, 0, -1], [10**9])),
        "activations": lambda: [vector(rng, width) for _ in range(rng.choice((0, 1, 1, 1, 2, 9, 129)))],
        "temperature": lambda: rng.choice((0, 0.7, 1, 5, 5.1)),
        "max_new_tokens": lambda: rng.choice((1, 3, 200, 4096, 4097)),
        **{f: lambda: vector(rng, width) for f in ("activation", "activation_a", "activation_b")},
    }
    out = {}
    for field in schema.REQUESTS[name].fields:
        dice = rng.random()
        if dice < 0.85:
            out[field] = good.get(field, lambda: rng.random() < 0.5)()
        elif dice < 0.9:
            out[field] = value(rng)
    if rng.random() < 0.1:
        out[rng.choice(TEXTS)[:9]] = value(rng)
    return out


def body(rng: random.Random, name: str, width: int) -> bytes:
    """The bytes of a body: JSON in UTF-8, or cut short, or in another encoding, or no JSON at all."""
    text = json.dumps(fields(rng, name, width), ensure_ascii=rng.random() < 0.5)
    whole = text.encode("utf-8", "surrogatepass")
    pick = rng.randrange(24)
    if pick == 0:
        return whole[: rng.randrange(len(whole) + 1)]
    if pick == 1:
        return rng.choice((b"", b"\xff\xfe{}", b"[" * 50000, b"[]", b'"a"', b"null", b"NaN", whole * 2))
    if pick == 2:
        return json.dumps(fields(rng, name, width)).encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if pick == 3:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(99)))
    return whole


def requests(seed: int, n: int, width: int) -> Iterator[dict]:
    """Yield n requests as arguments of a client: method, url, content, headers."""
    rng = random.Random(seed)
    for _ in range(n):
        name = rng.choice(NAMES)
        kind = rng.choice((*["application/json"] * 20, "application/json; charset=latin-1", "text/plain", ""))
        headers = {"content-type": kind}
        if rng.random() < 0.05:
            headers["content-encoding"] = "gzip"
        if rng.random() < 0.05:
            headers["x-secret-key"] = "wrong"
        wrong = rng.random() < 0.05
        yield {
            "method": rng.choice(METHODS) if wrong else "POST",
            "url": rng.choice((f"/{name}",) * 20 + (f"/{name}/", f"//{name}", f"/{name}x", "/completion")),
            "content": body(rng, name, width), "headers": headers,
        }


def fuzz(client, seed: int, n: int, width: int) -> tuple[collections.Counter, float, dict]:
    """Send n requests. Return the statuses, the seconds of the slowest answer, and its request.

    Every answer of an endpoint is whole: JSON as its status says, or a stream that ends as it should."""
    statuses, slowest = collections.Counter(), (0.0, {})
    for request in requests(seed, n, width):
        began = time.monotonic()
        answer = client.request(**request)
        slowest = max(slowest, (time.monotonic() - began, request), key=lambda s: s[0])
        statuses[answer.status_code] += 1
        kind = answer.headers.get("content-type", "")
        if kind.startswith("text/event-stream"):
            frames = [x.removeprefix("data: ") for x in answer.text.split("\n\n") if x.startswith("data: ")]
            assert frames[-1] == "[DONE]", (request, frames[-1])
            assert all(isinstance(json.loads(f), dict) for f in frames[:-1])
        elif kind == "application/json":
            json.loads(answer.text, parse_constant=_refuse)
    return statuses, *slowest


def _refuse(name: str):
    raise AssertionError(f"{name} is not JSON")


def main(argv=None) -> None:
    from starlette.testclient import TestClient

    from nla_jax.view.explorer import bundles, engine, server
    from tests.helpers import world

    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--requests", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        world.build(Path(place))
        opened = engine.Engine(bundles.open_sides(Path(place) / "run" / "bundle"), max_tokens=64)
        opened.warm_up()
        with TestClient(server.app(opened), base_url="http://localhost") as client:
            width = opened.sides["a"].facts["width"]
            statuses, seconds, request = fuzz(client, args.seed, args.requests, width)
    print(f"{args.requests} requests: " + ", ".join(f"{s}: {n}" for s, n in sorted(statuses.items())))
    print(f"slowest: {seconds:.1f} s ({request['url']}, {len(request['content'])} bytes)")


if __name__ == "__main__":
    main()
