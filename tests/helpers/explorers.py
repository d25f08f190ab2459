"""What the tests of the explorer share."""

import json
import threading

from nla_jax.evaluate.trust import features, model
from nla_jax.evaluate.words.claims import KINDS

TEXT = "an old town by the sea"
NASTY = "</script><img src=x onerror=alert(1)>\u2028\x00 'é' \U0001f600"


def even_trust() -> model.Trust:
    """A trust model that gives every claim the probability .5 plus what recurs after it."""
    def weights(names):
        width = (len(names) + 1) * len(KINDS) + len(names)
        slopes = [float(name == "after") for name in names] + [0.0] * (width - len(names))
        return model.Weights(names, (0.0,) * len(names), (1.0,) * len(names), tuple(slopes), 0.0)

    alone = tuple(n for n in features.FEATURES if n not in features.NEAR)
    return model.Trust(weights(tuple(features.FEATURES)), weights(alone), {})


def last(events) -> dict:
    *_, event = filter(None, events)
    return event["done"]


def post(client, what, **fields):
    return client.post(f"/api/{what}", json=fields)


def values(answer) -> list[dict]:
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(x) for x in answer.text.splitlines()]


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
