"""Run a few jobs in turns in a worker thread, with a bounded queue.

A turn lasts until the job's next event. Waiting clients get their position. Cancelled jobs are dropped. A job
that fails does not affect the others."""

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from nla_jax.errors import UserError

log = logging.getLogger(__name__)

AT_ONCE = 8  # jobs that take turns


class QueueFull(Exception):
    """The queue is full; `seconds` estimates when a client may try again."""

    def __init__(self, seconds: int):
        super().__init__(f"try again in {seconds} s")
        self.seconds = seconds


class Job:
    """A job in the queue. `events` belongs to the event loop that submitted it; None marks the end."""

    def __init__(self, work: Callable[[], Iterator[dict]], loop: asyncio.AbstractEventLoop):
        self.work, self._loop = work, loop
        self.events: asyncio.Queue[dict | None] = asyncio.Queue()
        self.left, self.began = False, 0.0

    def tell(self, event: dict | None) -> None:
        """Put an event; any thread may call this."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def leave(self) -> None:
        """Cancel the job: it is dropped from the queue, or stops at its next event."""
        self.left = True


class JobQueue:
    """A worker thread with a queue of at most `most` waiting jobs; `at_once` jobs take turns."""

    def __init__(self, most: int = 16, at_once: int = AT_ONCE):
        self.most, self.at_once = most, at_once
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._seconds, self._open = 1.0, True  # _seconds: moving average of a job's duration
        self._thread = threading.Thread(target=self._work, name="explorer", daemon=True)
        self._thread.start()

    def join(self, work: Callable[[], Iterator[dict]]) -> Job:
        """Submit work from the running event loop. Raises Full if the queue is full."""
        with self._changed:
            self._drop_cancelled()
            if len(self._waiting) >= self.most:
                raise QueueFull(max(1, round(self._seconds * len(self._waiting) / self.at_once / 2)))
            job = Job(work, asyncio.get_running_loop())
            self._waiting.append(job)
            self._send_positions()
            self._changed.notify()
        return job

    def close(self) -> None:
        """Cancel all jobs and end the thread after its current event."""
        with self._changed:
            self._open = False
            for job in self._waiting:
                job.leave()
            self._changed.notify()
        self._thread.join(30)

    def _drop_cancelled(self) -> None:
        kept = [job for job in self._waiting if not job.left]
        if len(kept) < len(self._waiting):
            self._waiting = collections.deque(kept)

    def _send_positions(self) -> None:
        for place, job in enumerate(self._waiting, 1):
            job.tell({"place": place})

    def _next(self, wait: bool) -> Job | None:
        """Return the next job; None if the queue is closed, or if it is empty and there is no `wait`."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._waiting or not self._open)
            self._drop_cancelled()
            if not (self._open and self._waiting):
                return None
            job = self._waiting.popleft()
            self._send_positions()
            return job

    def _work(self) -> None:
        running: dict[Job, Iterator[dict]] = {}
        while self._open:
            while len(running) < self.at_once and (job := self._next(wait=not running)):
                job.began = time.monotonic()
                job.tell({"place": 0})
                running[job] = _events(job)
            for job, events in [*running.items()]:
                if job.left or next(events, None) is None:
                    events.close()
                    del running[job]
                    self._seconds += 0.2 * (time.monotonic() - job.began - self._seconds)
        for events in running.values():
            events.close()


def _events(job: Job) -> Iterator[dict]:
    """Do a job. Tell its client each event, yield after it, and tell the end even if the job fails."""
    try:
        with contextlib.closing(job.work()) as events:
            for event in events:
                if event and not job.left:
                    job.tell(event)
                yield event
    except UserError as e:
        job.tell({"error": str(e)})
    except Exception:
        log.exception("a request failed")
        job.tell({"error": "the server failed to answer; its log says why"})
    finally:
        job.tell(None)
