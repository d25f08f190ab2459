"""A provider of your own: a function from a prompt to its answer (docs/howto/own.md)."""

import asyncio
import inspect
from collections.abc import Callable, Iterator

from nla_jax.errors import UserError, one_line
from nla_jax.providers.clients import EMPTY, Answer, Endpoint, Failed, Retry
from nla_jax.providers.scheduler import Row, Scheduler


def endpoint(name: str, model: str = "", max_tokens: int = 400) -> Endpoint:
    """Return the endpoint that the estimate and the journal name for the function `name`."""
    return Endpoint(name, model or name, name, max_tokens)


def asker(function: Callable[[str], str]) -> Callable:
    """Return a function (rows, endpoint, scheduler) -> a coroutine that asks for all rows, a few at a time.

    function: prompt -> answer, plain or async. A plain one runs in threads. It may raise `clients.Retry` to
    be asked once more, and `clients.Failed` when there is no answer to this prompt.

    The coroutine raises UserError for any other exception, and for an answer that is not a string.
    """

    async def ask_all(rows: Iterator[Row], e: Endpoint, asking: Scheduler) -> None:
        async def ask(prompt: str) -> Answer:
            try:
                if inspect.iscoroutinefunction(function):
                    text = await function(prompt)
                else:
                    text = await asyncio.to_thread(function, prompt)
            except (Retry, Failed, UserError):
                raise
            except Exception as err:
                what = f"provider {e.kind!r} failed ({type(err).__name__}: {one_line(err)})"
                raise UserError(f"{what}; what was answered is kept, and the same command goes on") from err
            if not isinstance(text, str):
                raise UserError(f"provider {e.kind!r} must return a string, not {type(text).__name__}")
            return Answer(text, "" if text.strip() else EMPTY)

        await asking.ask_all(rows, ask)

    return ask_all
