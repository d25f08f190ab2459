"""What the tests of models behind HTTP share."""

import numpy as np

from nla_jax.providers import clients, http_explain, journal, scheduler
from tests.helpers.llm_server import Server

KEY = "sk-tests-0123456789abcdef"


def document(i: int, words: int = 12):
    from nla_jax.data.corpora import Document

    text = " ".join("".join(np.random.default_rng((i, w)).choice(list("aeiounrst"), 4)) for w in range(words))
    return Document(f"doc:{i}", text, ["train", "heldout", "ood"][i % 3])


def texts_of(n: int) -> list:
    return [(d, 0, len(d.text)) for d in map(document, range(n))]


def endpoint(server: Server, kind: str = "openai", timeout: float = 5.0, **more) -> clients.Endpoint:
    url = server.url if kind == "openai" else server.root
    return clients.Endpoint(kind, "tiny", url, timeout=timeout, key_env="NLA_TEST_KEY", key=KEY, **more)


def explain(server, texts, out, kind="openai", ask=http_explain.one_by_one, retry=(), timeout=5.0, **x):
    settings = scheduler.Settings(**dict(concurrency=16, backoff=0.002) | x)
    e = endpoint(server, kind, timeout)
    with journal.Journal(f"{out}.journal") as j:
        j.forget(retry)
        return http_explain.run(texts, out, j, e, settings, ask, lambda what: None)


def adds_up(report: dict) -> bool:
    came = report["kept"] + sum(report["dropped"].values()) + sum(report["failed"].values()) + report["left"]
    asked = report["answered"] + sum(report["failed now"].values()) + report["unfinished"]
    return came == report["texts"] and asked == report["asked"]
