"""The scheduler of requests: bounded concurrency, retries, waits that the server asks for, and the cost."""

import asyncio
import collections
import contextlib
import dataclasses
import random
import sys
from collections.abc import Awaitable, Callable, Iterator

from nla_jax.errors import UserError, short_repr
from nla_jax.providers.clients import Answer, Ask, Failed, Retry, Unreachable
from nla_jax.providers.journal import Journal, Outcome

LONGEST = 60.0  # maximum of seconds between two tries, unless the server asks for more
MAX_SERVER_WAIT = 600.0  # maximum of seconds that a server may ask to wait
MAX_FAILURES = 20  # after this many consecutive failures all rows are assumed to fail

Row = tuple[str, str]  # key, prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """concurrency: maximum number of concurrent requests (or batches). retries: tries after the first.
    backoff: seconds before the first retry; it doubles before each further one. price: dollars per million
    tokens (read, written)."""

    concurrency: int = 8
    retries: int = 6
    backoff: float = 1.0
    price: tuple[float, float] | None = None

    def __post_init__(self):
        if self.concurrency < 1 or self.retries < 0 or not 0 <= self.backoff < MAX_SERVER_WAIT:
            given = f"concurrency={self.concurrency}, retries={self.retries}, backoff={self.backoff}"
            raise UserError(f"{given}: they must be at least 1, 0 and 0, and backoff below {MAX_SERVER_WAIT}")
        if self.price and not all(0 <= p < float("inf") for p in self.price):
            raise UserError(f"the price {self.price} must be two amounts in dollars per million tokens")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Return the cost in dollars, or None without a price."""
        return self.price and (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6


@dataclasses.dataclass
class Tally:
    """The counts of one run. `again`: repeated requests by reason. `cost`: in dollars; None if the cost of an
    answer is not known."""

    asked: int = 0
    answered: int = 0
    again: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    under_way: int = 0
    most_under_way: int = 0


class Scheduler:
    """The scheduler through which all requests to a model pass.

    Args:
      journal: records outcomes; it may be None if only `patient` is used.
      told: called after each outcome is in the journal.
    """

    def __init__(self, journal: Journal | None, settings: Settings, model: str, told=lambda: None):
        self.journal, self.settings, self.model, self.told = journal, settings, model, told
        self.tally = Tally()
        self._stop = asyncio.Event()
        self._not_before = 0.0
        self._hopeless = collections.deque(maxlen=MAX_FAILURES + settings.concurrency)

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `concurrency` tasks of `work`, which requests rows until `stopping` is set or none is left.

        The first error, or Ctrl-C, stops them. Running requests are awaited, because they are paid for.
        """
        tasks = [asyncio.create_task(work()) for _ in range(self.settings.concurrency)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(t.exception() for t in done):
                self._stop.set()
        except asyncio.CancelledError:
            self._stop.set()
            print(f"nla: stopping; waiting for {self.tally.under_way} rows (Ctrl-C again abandons them)",
                  file=sys.stderr)
            raise
        finally:
            await asyncio.wait(tasks)
            errors = [t.exception() for t in tasks]
        if found := [err for err in errors if err]:
            raise found[0]

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    async def ask_all(self, rows: Iterator[Row], ask: Ask) -> None:
        """Request every row. The tasks share `rows` and draw a row only when they request it."""

        async def work():
            for key, prompt in rows:
                with self.taken(1):
                    try:
                        answer = await self.patient(lambda prompt=prompt: ask(prompt))
                        self.answered(key, answer)
                    except Failed as f:
                        self.failed(key, f)
                        self.check_failures()
                    except Retry:
                        return  # stopping; the row has no outcome
                if self.is_stopping:
                    return

        await self.run(work)

    @contextlib.contextmanager
    def taken(self, n: int):
        """Count n rows as running."""
        t = self.tally
        t.asked += n
        t.under_way += n
        t.most_under_way = max(t.most_under_way, t.under_way)
        try:
            yield
        finally:
            t.under_way -= n

    async def patient(self, call: Callable[[], Awaitable]):
        """Return the result of `call`, with retries. Raises Failed or UserError after the last try, and
        `Retry` if the run is stopping."""
        for n in range(self.settings.retries + 1):
            if (wait := self._not_before - asyncio.get_running_loop().time()) > 0:
                await self.pause(wait + random.uniform(0.0, self.settings.backoff))
            if self.is_stopping:
                raise Retry("stopped")
            try:
                return await call()
            except Retry as err:
                again = err
            if n < self.settings.retries:
                await self.wait(again, n)
        tried = f"tried {self.settings.retries + 1} times"
        if isinstance(again, Unreachable):
            todo = "correct or unset the proxy" if " through " in again.reason else "start the server"
            raise UserError(f"{again.reason}, {tried}: {todo} and run the same command again")
        raise Failed(again.reason, tried)

    async def wait(self, again: Retry, n: int) -> None:
        """Wait after try n, counted from 0. Raises UserError if the server asks for too long a wait."""
        self.tally.again[again.reason] += 1
        if again.wait is not None:
            if again.wait > MAX_SERVER_WAIT:
                raise UserError(f"the server asks to wait {again.wait:.0f} seconds ({again.reason}): run the "
                                "same command then")
            # The server answers one row, but its limit applies to all.
            now = asyncio.get_running_loop().time()
            self._not_before = max(self._not_before, now + again.wait)
        wait = min(self.settings.backoff * 2**n, LONGEST) * random.uniform(0.5, 1.0)
        await self.pause(max(wait, again.wait or 0.0))

    async def pause(self, seconds: float) -> None:
        """Sleep for `seconds`, or until the run is stopping."""
        if seconds > 0 and not self.is_stopping:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)

    def answered(self, key: str, a: Answer, model: str = "") -> None:
        """Record the answer to a row."""
        t = self.tally
        cost = a.cost if a.cost is not None else self.settings.cost(a.tokens_in, a.tokens_out)
        self.journal.add(Outcome(key, model or self.model, a.text, a.reason, a.tokens_in, a.tokens_out, cost))
        t.answered += 1
        t.tokens_in += a.tokens_in
        t.tokens_out += a.tokens_out
        t.cost = None if cost is None or t.cost is None else t.cost + cost
        self._hopeless.clear()
        self.told()

    def failed(self, key: str, f: Failed) -> None:
        """Record that a row will have no answer."""
        self.journal.add(Outcome(key, self.model, None, f.reason, detail=f.detail))
        self.tally.failed[f.reason] += 1
        self._hopeless.append(f)
        self.told()

    def check_failures(self) -> None:
        """Raise UserError if the last HOPELESS rows (plus concurrency) all failed."""
        if len(self._hopeless) == self._hopeless.maxlen and not self.is_stopping:
            f = self._hopeless[-1]
            raise UserError(
                f"the last {len(self._hopeless)} rows all failed, at the end with {f.reason!r}"
                f"{f' ({short_repr(f.detail)})' if f.detail else ''}; correct that and run again with "
                "--retry failed"
            )
