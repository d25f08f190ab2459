"""`nla serve`: the explorer's pages and what they ask for, on Starlette.

Answers are JSON, a value a line as it comes: {"place": n} while the request is the n-th that waits and 0 once
it is begun, then what the `engine` yields, and {"error": words} where that refuses; {} says nothing. All text
goes out as JSON, and the page writes it with textContent alone; its Content-Security-Policy has no inline
script, no inline style and no foreign host.
"""

import asyncio
import contextlib
import functools
import importlib.resources
import json
import re
import secrets
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from nla_jax import __version__
from nla_jax.view.explorer import api_schema, openapi
from nla_jax.view.explorer.engine import Engine
from nla_jax.view.explorer.job_queue import Full, Job, Line

BODY_SECONDS = 10  # for a request to arrive

SCRIPTS = ("app.js", "api.js", "chat.js", "draw.js", "links.js", "panel.js")
FILES = {**dict.fromkeys(SCRIPTS, "text/javascript"), "app.css": "text/css", "icon.svg": "image/svg+xml"}
COOKIE = "nla_token"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is not done: status and what to say."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


def app(engine: Engine, *, token: str = "", hosts: tuple[str, ...] = (), most_waiting: int = 16) -> Starlette:
    """The application.

    Args:
      token: who does not bring it is turned away; "" for none.
      hosts: names that it may be called by, against pages elsewhere that have a name point here; () for any.
      most_waiting: requests that may wait for the one under way.
    """
    line = Line(most_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        line.close()

    async def index(request: Request) -> Response:
        if token and secrets.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            # The address bar, and what is copied from it, no longer has the token.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", path="/")
            return answer
        _allowed(request, token)
        return Response(_file("index.html"), media_type="text/html")

    async def static(request: Request) -> Response:
        _allowed(request, token)
        name = request.path_params["name"]
        if name not in FILES:
            raise Refused(404, "no such file")
        return Response(_file(name), media_type=FILES[name])

    async def about(request: Request) -> Response:
        _allowed(request, token)
        return JSONResponse(engine.about())

    async def described(request: Request) -> Response:
        _allowed(request, token)
        return JSONResponse(openapi.description(__version__))

    async def ask(request: Request) -> Response:
        _allowed(request, token)
        what = request.path_params["what"]
        if what not in api_schema.QUESTIONS:
            raise Refused(404, "no such question")
        try:
            fields = api_schema.read(await _body(request), api_schema.QUESTIONS[what].fields)
        except api_schema.Unfit as e:
            raise Refused(400, str(e)) from e
        if fields.get("side", "a") not in engine.sides:
            raise Refused(400, "no second bundle is open: start with --compare DIR")
        try:
            job = line.join(functools.partial(getattr(engine, what), **fields))
        except Full as e:
            raise Refused(429, f"too many people at once: try again in {e.seconds} s") from e
        return Answer(job)

    async def refuse(request: Request, e: Refused) -> Response:
        headers = {"Retry-After": str(e.__cause__.seconds)} if isinstance(e.__cause__, Full) else {}
        return JSONResponse({"error": str(e)}, e.status, headers)

    async def gone(request: Request, e: Exception) -> Response:
        return PlainTextResponse("", 400)

    made = Starlette(
        routes=[Route("/", index), Route("/static/{name}", static), Route("/api/about", about),
                Route("/openapi.json", described), Route("/api/{what}", ask, methods=["POST"])],
        exception_handlers={Refused: refuse, ClientDisconnect: gone}, lifespan=lifespan,
    )
    made.add_middleware(Guard, hosts=hosts)
    made.state.line = line
    return made


class Answer(StreamingResponse):
    """What a job says, as it says it; the job is left once nobody listens any longer."""

    def __init__(self, job: Job):
        super().__init__(_lines(job), media_type="application/x-ndjson")
        self.job = job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.leave()


class Guard:
    """Headers on every answer, and no answer to a host name that is not ours."""

    def __init__(self, app, hosts: tuple[str, ...]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                own = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        found = re.fullmatch(r"\[?([^\[\]]*?)\]?(:\d+)?", Request(scope).headers.get("host", ""))
        if self.hosts and (not found or found[1].lower() not in self.hosts):
            return await PlainTextResponse("not a name of this server", 421)(scope, receive, with_headers)
        return await self.app(scope, receive, with_headers)


def _allowed(request: Request, token: str) -> None:
    if not token:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    given = given or request.cookies.get(COOKIE, "")
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise Refused(401, "open the address with the token that nla serve printed")


async def _body(request: Request) -> bytes:
    """The body, of which no more than is allowed is ever kept. A page elsewhere cannot send this media type
    without asking first, and is not answered."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send application/json")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > api_schema.MOST_BYTES:
                    raise Refused(413, f"at most {api_schema.MOST_BYTES} bytes")
    except TimeoutError:
        raise Refused(408, f"the request took more than {BODY_SECONDS} s to arrive") from None
    return body


async def _lines(job: Job) -> AsyncIterator[bytes]:
    while True:
        try:
            event = await asyncio.wait_for(job.events.get(), 10)
        except TimeoutError:
            event = {}  # so that whoever stands between does not take the silence for the end
        if event is None:
            return
        yield json.dumps(event).encode() + b"\n"  # ASCII: some clients break lines at U+2028 too


@functools.cache
def _file(name: str) -> bytes:
    return (importlib.resources.files("nla_jax.view.explorer") / "static" / name).read_bytes()


LOOPBACK = ("127.0.0.1", "localhost", "::1")
