"""Many prompts, a few at a time: retries, waiting as long as one is told to, and what it has cost so far."""

import asyncio
import collections
import contextlib
import dataclasses
import random
import sys
from collections.abc import Awaitable, Callable, Iterator

from nla_jax.errors import UserError, shown
from nla_jax.providers.clients import Again, Answer, Ask, Failed, Unreachable
from nla_jax.providers.journal import Journal, Outcome

LONGEST = 60.0  # seconds between two tries, unless the server asks for more
PATIENCE = 600.0  # the longest wait that a server may ask for
HOPELESS = 20  # rows in a row that fail for good: something is wrong with all of them

Row = tuple[str, str]  # key, prompt


@dataclasses.dataclass(frozen=True)
class Settings:
    """concurrency: requests (or batches) under way at a time. retries: tries after the first. backoff:
    seconds before the first of them, twice as many before each other. price: dollars for a million tokens
    read and written."""

    concurrency: int = 8
    retries: int = 6
    backoff: float = 1.0
    price: tuple[float, float] | None = None

    def __post_init__(self):
        if self.concurrency < 1 or self.retries < 0 or not 0 <= self.backoff < PATIENCE:
            given = f"concurrency={self.concurrency}, retries={self.retries}, backoff={self.backoff}"
            raise UserError(f"{given}: at least 1, 0 and 0 are needed, and a backoff below {PATIENCE}")
        if self.price and not all(0 <= p < float("inf") for p in self.price):
            raise UserError(f"the price {self.price} must be two amounts of dollars for a million tokens")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Dollars, or None without a price."""
        return self.price and (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6


@dataclasses.dataclass
class Tally:
    """What one run has asked for. `again`: requests that had to be repeated, by reason. `cost`: None as soon
    as an answer's is not known."""

    asked: int = 0
    answered: int = 0
    again: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = 0.0
    under_way: int = 0
    most_under_way: int = 0


class Asking:
    """The one place that rows go through on their way to a model.

    Args:
      journal: where outcomes go; None only for `patient` alone.
      told: called after each outcome, once it is in the journal.
    """

    def __init__(self, journal: Journal | None, settings: Settings, model: str, told=lambda: None):
        self.journal, self.settings, self.model, self.told = journal, settings, model, told
        self.tally = Tally()
        self._stop = asyncio.Event()
        self._not_before = 0.0
        self._hopeless = collections.deque(maxlen=HOPELESS + settings.concurrency)

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """`concurrency` times `work`, which asks for row after row until `stopping` or there are no more.

        The first error, or Ctrl-C, ends it: what is under way is waited for, since it is paid for.
        """
        tasks = [asyncio.create_task(work()) for _ in range(self.settings.concurrency)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if any(t.exception() for t in done):
                self._stop.set()
        except asyncio.CancelledError:
            self._stop.set()
            print(f"nla: stopping; {self.tally.under_way} rows are under way (Ctrl-C again gives them up)",
                  file=sys.stderr)
            raise
        finally:
            await asyncio.wait(tasks)
            errors = [t.exception() for t in tasks]
        if found := [err for err in errors if err]:
            raise found[0]

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def ask_all(self, rows: Iterator[Row], ask: Ask) -> None:
        """Ask for every row. `rows` is shared: no more of it is taken than is under way."""

        async def work():
            for key, prompt in rows:
                with self.taken(1):
                    try:
                        answer = await self.patient(lambda prompt=prompt: ask(prompt))
                        self.answered(key, answer)
                    except Failed as f:
                        self.failed(key, f)
                        self.despair()
                    except Again:
                        return  # stopping: the row stays as it was
                if self.stopping:
                    return

        await self.run(work)

    @contextlib.contextmanager
    def taken(self, n: int):
        """n rows are under way."""
        t = self.tally
        t.asked += n
        t.under_way += n
        t.most_under_way = max(t.most_under_way, t.under_way)
        try:
            yield
        finally:
            t.under_way -= n

    async def patient(self, call: Callable[[], Awaitable]):
        """What `call` gives, tried again and again. Raises Failed or UserError after the last try; `Again` if
        it is time to stop."""
        for n in range(self.settings.retries + 1):
            if (wait := self._not_before - asyncio.get_running_loop().time()) > 0:
                await self.pause(wait + random.uniform(0.0, self.settings.backoff))
            if self.stopping:
                raise Again("stopped")
            try:
                return await call()
            except Again as err:
                again = err
            if n < self.settings.retries:
                await self.wait(again, n)
        tried = f"tried {self.settings.retries + 1} times"
        if isinstance(again, Unreachable):
            raise UserError(f"{again.reason}, {tried}: the same command goes on when there is one")
        raise Failed(again.reason, tried)

    async def wait(self, again: Again, n: int) -> None:
        """What there is to wait after try n, counted from 0. Raises UserError when that is too long."""
        self.tally.again[again.reason] += 1
        if again.wait is not None:
            if again.wait > PATIENCE:
                raise UserError(f"the server asks to wait {again.wait:.0f} seconds ({again.reason}): the "
                                "same command goes on then")
            # It is told to one row and meant for all.
            now = asyncio.get_running_loop().time()
            self._not_before = max(self._not_before, now + again.wait)
        wait = min(self.settings.backoff * 2**n, LONGEST) * random.uniform(0.5, 1.0)
        await self.pause(max(wait, again.wait or 0.0))

    async def pause(self, seconds: float) -> None:
        """Sleep, or less when it is time to stop."""
        if seconds > 0 and not self.stopping:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)

    def answered(self, key: str, a: Answer, model: str = "") -> None:
        """Note the answer to a row."""
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
        """Note that a row has no answer for good."""
        self.journal.add(Outcome(key, self.model, None, f.reason, detail=f.detail))
        self.tally.failed[f.reason] += 1
        self._hopeless.append(f)
        self.told()

    def despair(self) -> None:
        """Raises UserError when row after row has failed lately."""
        if len(self._hopeless) == self._hopeless.maxlen and not self.stopping:
            f = self._hopeless[-1]
            raise UserError(f"the last {len(self._hopeless)} rows all failed, at the end with {f.reason!r}"
                            f"{f' ({shown(f.detail)})' if f.detail else ''}; once that is mended, go on with "
                            "--retry failed")
