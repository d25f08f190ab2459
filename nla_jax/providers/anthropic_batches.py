"""Anthropic's Message Batches: cheaper requests, answered within a day, even if the process dies meanwhile.

The journal records a batch before it is submitted, and its id right after. A restart first collects the
recorded batches. The response to a submission may be lost (a kill, a broken connection). The batch is then
looked for among those that the provider received since, and submitted again only if it is not found.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

from nla_jax.errors import UserError, short_repr
from nla_jax.providers import clients
from nla_jax.providers.clients import Endpoint, Failed, Missing, Retry
from nla_jax.providers.scheduler import Row, Scheduler

PASSING = ("api_error", "overloaded_error", "rate_limit_error", "timeout_error", "expired", "no result")
AT_A_TIME = 1000  # batches per list request


async def ask_in_batches(
    rows: Iterator[Row], e: Endpoint, asking: Scheduler, *, size: int, poll: float
) -> None:
    """Request all rows in batches of `size`; `asking.settings.concurrency` batches run at a time.

    Args:
      rows: must check the journal when a row is drawn, because recorded batches are collected first.
      poll: seconds between two requests for a batch's status.

    Raises UserError if the provider rejects a batch, or does not answer after all retries.
    """
    async with clients.client(e) as (sdk, made):
        desk = _BatchRunner(sdk, made, e, asking, poll)
        waiting = iter(list(asking.journal.batches))

        async def collect():
            for name in waiting:
                batch = asking.journal.batches[name]
                open_rows = sum(k not in asking.journal for k in batch.keys)
                with asking.taken(open_rows), contextlib.suppress(Retry):
                    if batch.id or await desk.find(name):
                        left = await desk.collect(name)
                    else:
                        asking.journal.record_done(name)
                        left = dict.fromkeys(k for k in batch.keys if k not in asking.journal)
                    asking.tally.asked -= len(left)  # `work` requests them again
                if asking.is_stopping:
                    return

        async def work():
            while chunk := dict(itertools.islice(rows, size)):
                with asking.taken(len(chunk)), contextlib.suppress(Retry):
                    await desk.run_rows(chunk)
                if asking.is_stopping:
                    return

        await asking.run(collect)
        await asking.run(work)


@dataclasses.dataclass
class _BatchRunner:
    sdk: object
    made: object
    e: Endpoint
    asking: Scheduler
    poll: float

    async def run_rows(self, chunk: dict[str, str]) -> None:
        """Run a batch of {key: prompt}, and further batches for rows without an answer."""
        settings = self.asking.settings
        for n in range(settings.retries + 1):
            left = await self.collect(await self.submit(chunk))
            chunk = {key: chunk[key] for key in left}
            if not chunk:
                return
            if n < settings.retries:
                self.asking.tally.again.update(left.values())
                await self.asking.pause(settings.backoff * 2**n)
        for key, reason in left.items():
            self.asking.failed(key, Failed(reason, f"in {settings.retries + 1} batches"))

    async def submit(self, chunk: dict[str, str]) -> str:
        """Submit a batch of these rows until the provider accepts it; return its name in the journal."""
        journal, settings = self.asking.journal, self.asking.settings
        newest = await self._call_with_retries(lambda: self._list(limit=1))
        name = journal.record_submission(list(chunk), self.e.model, newest[0]["id"] if newest else None)
        requests = [
            {"custom_id": key, "params": clients.request(self.e, prompt)} for key, prompt in chunk.items()
        ]
        for n in range(settings.retries + 1):
            if self.asking.is_stopping:
                raise Retry("stopped")
            try:
                said = await self._call("create", requests=requests)
                journal.record_id(name, _field(said, "id"))
                return name
            except Failed as f:
                journal.record_done(name)
                about = f"{f.reason} ({short_repr(f.detail)}); --batch makes smaller ones"
                raise UserError(f"{self.e.url} refuses a batch of {len(chunk)} texts: {about}") from None
            except Retry as again:
                await self.asking.wait(again, n)
                # The provider may have accepted the batch although the response was lost.
                if await self.find(name):
                    return name
        raise UserError(f"{self.e.url} accepts no batch; run the same command again to continue")

    async def find(self, name: str) -> bool:
        """Return whether the provider received the batch since it was recorded; record its id if so."""
        batch = self.asking.journal.batches[name]
        since = {"before_id": batch.newest} if batch.newest else {}
        known = {b.id for b in self.asking.journal.batches.values()}
        for found in await self._call_with_retries(lambda: self._list(limit=AT_A_TIME, **since)):
            if found["id"] in known or _size(found) != len(batch.keys):
                continue
            await self._wait_for_end(found["id"])
            if await self._call_with_retries(lambda id=found["id"]: self._first(id)) in batch.keys:
                self.asking.journal.record_id(name, found["id"])
                return True
        return False

    async def collect(self, name: str) -> dict[str, str]:
        """Wait for a batch and record its outcomes; return {key: reason} of rows to request again."""
        batch = self.asking.journal.batches[name]
        await self._wait_for_end(batch.id)
        left = await self._call_with_retries(lambda: self._results(batch))
        self.asking.journal.record_done(name)
        self.asking.check_failures()
        return left

    async def _wait_for_end(self, id: str) -> None:
        while True:
            try:
                status = await self._call_with_retries(lambda: self._status(id))
            except Missing:
                where, about = self.asking.journal.path, f"{self.e.url} has no batch {id} for this key"
                raise UserError(f"{about}: give the key that submitted it, or remove its lines from {where}"
                                ) from None
            if status == "ended":
                return
            await self.asking.pause(self.poll)
            if self.asking.is_stopping:
                raise Retry("stopped")

    async def _status(self, id: str) -> str:
        return _field(await self._call("retrieve", id), "processing_status")

    async def _results(self, batch) -> dict[str, str]:
        left = dict.fromkeys((k for k in batch.keys if k not in self.asking.journal), "no result")
        async with contextlib.aclosing(self._lines(batch.id)) as lines:
            async for key, result in lines:
                if key not in left:
                    continue
                try:
                    self.asking.answered(key, clients.anthropic_answer(self.e, _message(result)), batch.model)
                except Retry as again:
                    left[key] = again.reason
                    continue
                except Failed as f:
                    self.asking.failed(key, Failed(f.reason, self.e.hidden(f.detail)))
                del left[key]
        return left

    async def _first(self, id: str) -> str | None:
        async with contextlib.aclosing(self._lines(id)) as lines:
            async for key, _ in lines:
                return key
        return None

    async def _lines(self, id: str) -> AsyncIterator[tuple[str, dict]]:
        """Yield (custom_id, result) of a batch that has ended; an archived one has none. Raises `Retry`."""
        said = await self._call("retrieve", id)
        if isinstance(said, dict) and said.get("archived_at"):
            return
        # The client sends our key to the URL in the answer, so check its host.
        there = _field(said, "results_url")
        if urlsplit(there).netloc != urlsplit(self.e.url).netloc:
            raise UserError(f"batch {id}: its results are not at {self.e.url}; no key is sent elsewhere")
        import httpx2

        loop = asyncio.get_running_loop()
        # While a response streams, the client does not translate errors of the transport.
        with clients.translate_errors(self.sdk, self.e, httpx2.HTTPError):
            async with asyncio.timeout(self.e.timeout) as deadline:
                async with self.made.messages.batches.with_streaming_response.results(id) as response:
                    async for line in response.iter_lines():
                        deadline.reschedule(loop.time() + self.e.timeout)
                        if line.strip():
                            said = json.loads(line)
                            yield _field(said, "custom_id"), said.get("result")

    async def _list(self, **how) -> list[dict]:
        said = await self._call("list", **how)
        found = said.get("data") if isinstance(said, dict) else None
        if not isinstance(found, list) or not all(_field(b, "id") for b in found):
            raise Retry("an answer without batches")
        return found

    async def _call(self, name: str, *args, **kwargs) -> object:
        call = getattr(self.made.messages.batches.with_raw_response, name)
        return await clients.send(self.sdk, self.e, call(*args, **kwargs))

    async def _call_with_retries(self, call):
        """Call as `Asking.patient`, but turn Failed into UserError, because a batch may be paid for."""
        try:
            return await self.asking.patient(call)
        except Failed as f:
            raise UserError(f"no news of batches from {self.e.url} ({f.reason}): run the same command again "
                            "to continue") from None


def _field(said: object, name: str) -> str:
    if not isinstance(said, dict) or not isinstance(said.get(name), str):
        raise Retry("an answer that is no batch")
    return said[name]


def _message(result: object) -> object:
    """Return the message of a result. If it has an error instead, raises `Retry` or Failed."""
    kind = result.get("type") if isinstance(result, dict) else None
    if kind == "succeeded":
        return result.get("message")
    error = result.get("error") if isinstance(result, dict) else None
    error = error.get("error", error) if isinstance(error, dict) else {}
    reason = str(error.get("type") if kind == "errored" and isinstance(error, dict) else kind)[:40]
    if reason in PASSING:
        raise Retry(reason)
    raise Failed(reason, str(error.get("message", ""))[:300] if isinstance(error, dict) else "")


def _size(batch: dict) -> int:
    """Return the number of requests in a batch by its counts; -1 if it has none."""
    counts = batch.get("request_counts")
    return sum(n for n in counts.values() if isinstance(n, int)) if isinstance(counts, dict) else -1
