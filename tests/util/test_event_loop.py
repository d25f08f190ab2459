"""A coroutine is run to its end, in a notebook's event loop too."""

import asyncio
import threading

import pytest

from nla_jax.evaluate.words import paraphrase
from nla_jax.providers import scheduler
from nla_jax.util import event_loop
from tests.helpers import http_models
from tests.helpers.llm_server import Server


async def answer(value):
    await asyncio.sleep(0)
    if isinstance(value, Exception):
        raise value
    return value, threading.current_thread() is threading.main_thread()


def test_without_and_inside_a_loop():
    async def cell():
        return event_loop.run(answer(2))

    assert event_loop.run(answer(1)) == (1, True)
    assert asyncio.run(cell()) == (2, False)


def test_what_it_raises():
    async def cell():
        event_loop.run(answer(ValueError("as it was")))

    for run in (lambda: event_loop.run(answer(ValueError("as it was"))), lambda: asyncio.run(cell())):
        with pytest.raises(ValueError, match="as it was"):
            run()


def test_ctrl_c_cancels_it(monkeypatch):
    """The interrupt comes in the main thread, which waits for the other one."""
    ended = []

    async def long():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    def interrupted(future):
        raise KeyboardInterrupt

    async def cell():
        event_loop.run(long())

    monkeypatch.setattr(event_loop.concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert ended == [True]


def test_models_over_http_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("NLA_TEST_KEY", http_models.KEY)

    async def cell():
        with Server(lambda text, n: "no opening tag") as server:
            say = paraphrase.make_paraphraser(
                f"openai:tiny@{server.url}", tmp_path / "j", texts=1, ask_for=lambda what: None,
                key_env="NLA_TEST_KEY", settings=scheduler.Settings(backoff=0.001))
            said = say(["A ship."])
            server.plan = lambda text, n: "ok"
            return said, http_models.explain(server, http_models.texts_of(2), tmp_path / "out.jsonl")["kept"]

    assert asyncio.run(cell()) == (["I will not speak of A."], 2)
