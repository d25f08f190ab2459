"""Ask one model many questions for an evaluation: over HTTP, or by a function of your own.

Answers are kept in a journal (`journal`), so that a killed run does not pay for one twice. An answer that the
caller cannot read is asked for again, a few times.
"""

import asyncio
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nla_jax.errors import UserError, short_repr
from nla_jax.providers import clients, own_provider
from nla_jax.providers.journal import Journal, Outcome, key_of
from nla_jax.providers.scheduler import Scheduler, Settings
from nla_jax.util import choices, event_loop
from nla_jax.util.progress import Progress

SPEC = re.compile(rf"({'|'.join(clients.PROVIDERS)}):(\S+?)(?:@(https?://\S+))?")
AGAIN = 2  # further requests after an answer that cannot be read
UNREADABLE = "an answer that cannot be read"

Usable = Callable[[str, str], bool]  # (prompt, answer) -> whether the answer can be read


class Model(NamedTuple):
    """A model that answers. ask_all: (rows, endpoint, scheduler) -> a coroutine that asks for all rows."""

    endpoint: clients.Endpoint
    ask_all: Callable
    is_own: bool


def find_model(spec: str, what: str, *, key_env: str = "", max_tokens: int = 400, timeout: float = 120.0,
               usable: Usable = lambda prompt, text: True) -> Model:
    """Return the model `spec`: openai:MODEL, openai:MODEL@URL, anthropic:MODEL, or module:function.

    Args:
      what: what the model is for, for messages. key_env, max_tokens, timeout: as in `clients.endpoint`.

    Raises UserError for another spec, and as `clients.endpoint` and `choices.find_function`.
    """
    if found := SPEC.fullmatch(spec):
        kind, model, url = found.groups()
        e = clients.endpoint(kind, model, url or "", key_env, max_tokens=max_tokens, timeout=timeout)

        async def ask_all(rows, e, asking):
            async with clients.open_asker(e) as ask:
                await asking.ask_all(rows, lambda prompt: _readable(ask, prompt, usable))

        return Model(e, ask_all, False)
    module, _, function = spec.partition(":")
    if not (module and function) or module in clients.PROVIDERS:
        raise UserError(f"no {what} {spec!r}: write openai:MODEL@http://HOST:PORT/v1, openai:MODEL, "
                        "anthropic:MODEL or module:function")
    if key_env:
        raise UserError("--key-env is not for a function of your own: it decides how to authenticate")
    own = choices.find_function(spec, what)

    is_async = inspect.iscoroutinefunction(own)

    async def call(prompt: str) -> str:
        for _ in range(1 + AGAIN):
            text = await own(prompt) if is_async else await asyncio.to_thread(own, prompt)
            if not isinstance(text, str) or not text.strip() or usable(prompt, text):
                return text
        raise clients.Failed(UNREADABLE, text[:300])

    return Model(own_provider.endpoint(spec, max_tokens=max_tokens), own_provider.asker(call), True)


async def _readable(ask: clients.Ask, prompt: str, usable: Usable) -> clients.Answer:
    for _ in range(1 + AGAIN):
        answer = await ask(prompt)
        if answer.reason or usable(prompt, answer.text):
            return answer
    raise clients.Failed(UNREADABLE, answer.text[:300])


def try_model(model: Model, settings: Settings, prompt: str, what: str) -> None:
    """Send a first, small request. Raises UserError if it fails (key, model or address)."""
    if model.is_own:
        return
    e = model.endpoint

    async def once():
        async with clients.open_asker(e) as ask:
            try:
                await Scheduler(None, settings, e.model).patient(lambda: ask(prompt))
            except clients.Failed as f:
                about = f"{f.reason} ({short_repr(f.detail)})"
                raise UserError(f"{e.url} does not answer as a {what}: {about}") from None

    event_loop.run(once())


def ask_journalled(model: Model, journal: str | Path, settings: Settings, prompts: Sequence[str],
                   missing: str, label: str = "") -> list[Outcome | None]:
    """Return the outcome of each prompt; None where the run ended before. Answers are kept in `journal`.

    Prompts that failed in an earlier run are asked again. An error that concerns all prompts is printed,
    with `missing`: what the others will lack.
    """
    e = model.endpoint
    keys = [key_of(p, e.model) for p in prompts]
    with Journal(journal) as j:
        j.forget(("failed",))
        new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in j}
        asking = Scheduler(j, settings, e.model)
        with Progress(label, len(prompts), len(prompts) - len(new), unit="prompts") as bar:
            asking.told = lambda: bar.advance(1)
            try:
                event_loop.run(model.ask_all(iter(new.items()), e, asking))
            except UserError as err:
                print(f"nla: {err}; {missing}", file=sys.stderr)
        return [j.get(k) for k in keys]
