"""Answer Neuronpedia's requests over HTTP: JSON, or server-sent events with `stream`.

A stream is `data: JSON` lines, then `data: [DONE]`. Comments (`: waiting`) keep it alive while the request is
in the queue. Errors are {"detail": …} with a status, as FastAPI sends them.
"""

import asyncio
import functools
import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from nla_jax.view.explorer import neuronpedia, neuronpedia_schema
from nla_jax.view.explorer.job_queue import Job, JobQueue, QueueFull

QUIET_SECONDS = 10  # of a stream without an event, before a comment


async def answer(name: str, request: Request, read_body, engine, queue: JobQueue) -> Response:
    """Return the response to a request of this name; `read_body(request, most)` reads its body."""
    body = await read_body(request, neuronpedia_schema.most_bytes(name, engine.sides["a"].facts["width"]))
    try:  # in a thread, because a body may have a million numbers
        fields = await asyncio.to_thread(neuronpedia_schema.read, name, body)
    except neuronpedia_schema.InvalidRequest as e:
        return JSONResponse({"detail": e.detail}, 422)
    try:
        job = queue.join(functools.partial(neuronpedia.answer, engine, name, fields))
    except QueueFull as e:
        words = f"the server is busy: try again in {e.seconds} s"
        return JSONResponse({"detail": words}, 429, {"Retry-After": str(e.seconds)})
    return Reply(job, fields.get("stream", False))


class Reply:
    """The answer of a job, which is cancelled when the client disconnects."""

    def __init__(self, job: Job, stream: bool):
        self.job, self.stream = job, stream

    async def __call__(self, scope, receive, send) -> None:
        gone = asyncio.create_task(_wait_for_disconnect(receive))
        work = asyncio.create_task(self._answer(scope, receive, send))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.job.leave()
            for task in (gone, work):
                if not task.done():
                    task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()) and not isinstance(error, OSError):
            raise error

    async def _answer(self, scope, receive, send) -> None:
        event = await self._next(QUIET_SECONDS if self.stream else None)
        while not self.stream and event and "result" not in event and _error(event) is None:
            event = await self._next(None)
        if event and (refusal := _error(event)):
            response = JSONResponse({"detail": refusal[1]}, refusal[0])
        elif event is None:
            response = JSONResponse({"detail": "the server is stopping"}, 503)
        elif self.stream:
            response = StreamingResponse(self._frames(event), media_type="text/event-stream",
                                         headers={"X-Accel-Buffering": "no"})
        else:
            # Encoded in a thread: the activations of a text have many digits.
            body = await asyncio.to_thread(json.dumps, event["result"])
            response = Response(body, media_type="application/json")
        await response(scope, receive, send)

    async def _next(self, seconds: float | None) -> dict | None:
        """Return the next event that is no place in the queue; {} after so many seconds; None at the end."""
        try:
            async with asyncio.timeout(seconds):
                while (event := await self.job.events.get()) is not None and "place" in event:
                    pass
                return event
        except TimeoutError:
            return {}

    async def _frames(self, event: dict | None):
        while event is not None:
            if "frame" in event:
                yield f"data: {json.dumps(event['frame'])}\n\n"
            elif (error := _error(event)) is not None:
                yield f"data: {json.dumps({'error': error[1]})}\n\n"
                return
            elif "result" in event:
                yield "data: [DONE]\n\n"
                return
            else:
                yield ": waiting\n\n"
            event = await self._next(QUIET_SECONDS)


def _error(event: dict) -> tuple[int, str] | None:
    """Return the status and words of an event that is an error."""
    if "refused" in event:
        return 400, event["refused"]
    return (500, event["error"]) if "error" in event else None


async def _wait_for_disconnect(receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
