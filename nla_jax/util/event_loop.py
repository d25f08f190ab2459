"""Run a coroutine from a function that is not one."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Coroutine
from typing import Any


def run(work: Coroutine) -> Any:
    """Run a coroutine to its end and return its result, also where an event loop runs already.

    A notebook's cells run inside such a loop, where `asyncio.run` refuses. The coroutine then runs in a
    thread with a loop of its own. Ctrl-C cancels it, as in `asyncio.run`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(_run_until_done, loop, task)
        try:
            return done.result()
        except KeyboardInterrupt:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
            raise


def _run_until_done(loop: asyncio.AbstractEventLoop, task: asyncio.Task) -> Any:
    try:
        return loop.run_until_complete(task)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
