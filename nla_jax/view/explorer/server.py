"""Serve the explorer's pages and API on Starlette (`nla serve`).

An answer is a stream of JSON values, one per line. {"place": n} says that the request is the n-th in the
queue, and 0 that it has begun. The values of the `engine` follow, or {"error": words}; {} keeps the
connection alive. All text is sent as JSON, and the page inserts it with textContent only. The page's
Content-Security-Policy allows no inline script, no inline style and no other host.

A proxy may serve it under any path, and may strip that path or keep it: every link is relative, and
`local_path` cuts the path off. The page's own address may lack its last slash, so the page asks for its first
files as `?file=NAME`, which leads to the page's address either way. `begin.js` then adds the slash.
"""

import asyncio
import contextlib
import functools
import hashlib
import importlib.resources
import json
import re
import secrets
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from nla_jax import __version__
from nla_jax.errors import UserError, short_repr
from nla_jax.view.explorer import api_schema, neuronpedia, neuronpedia_http, neuronpedia_schema, openapi
from nla_jax.view.explorer.engine import Engine
from nla_jax.view.explorer.job_queue import AT_ONCE, Job, JobQueue, QueueFull

BODY_SECONDS = 10  # for a request to arrive

SCRIPTS = ("begin.js", "app.js", "api.js", "chat.js", "draw.js", "links.js", "panel.js")
FILES = {**dict.fromkeys(SCRIPTS, "text/javascript"), "app.css": "text/css", "icon.svg": "image/svg+xml"}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RequestRefused(Exception):
    """The request is refused with this HTTP status and message."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


def app(engine: Engine, *, token: str = "", hosts: tuple[str, ...] = (), most_waiting: int = 16,
        at_once: int = AT_ONCE) -> Starlette:
    """Return the application.

    Args:
      token: required from every client; "" for none.
      hosts: accepted host names, as a protection against DNS rebinding; () accepts any.
      most_waiting: requests that may wait in the queue. at_once: requests that are answered in turns.
    """
    line = JobQueue(most_waiting, at_once)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        line.close()

    async def index(request: Request) -> Response:
        if "file" in request.query_params:
            return _static(request, request.query_params["file"])
        if token and _is_same(request.query_params.get("token", ""), token):
            # `begin.js` removes the token from the address bar, so that copied links do not contain it.
            answer = Response(_file("index.html"), media_type="text/html")
            # Without a path, the browser sends the cookie to the page's own path only: other users' servers
            # may have the same host.
            answer.set_cookie(_cookie(token), token, httponly=True, samesite="strict", path=None,
                              secure=request.url.scheme == "https")
            return answer
        _check_token(request, token)
        wanted = request.headers.get("accept", "")
        if "application/json" in wanted and "text/html" not in wanted:  # Neuronpedia's health check
            return JSONResponse(neuronpedia.health(engine, most_waiting))
        return Response(_file("index.html"), media_type="text/html")

    async def static(request: Request) -> Response:
        return _static(request, request.path_params["name"])

    def _static(request: Request, name: str) -> Response:
        _check_token(request, token)
        if name not in FILES:
            raise RequestRefused(404, "no such file")
        return Response(_file(name), media_type=FILES[name])

    async def about(request: Request) -> Response:
        _check_token(request, token)
        return JSONResponse(engine.about())

    async def described(request: Request) -> Response:
        _check_token(request, token)
        return JSONResponse(openapi.description(__version__))

    async def ask(request: Request) -> Response:
        _check_token(request, token)
        what = request.path_params["what"]
        if what not in api_schema.REQUESTS:
            raise RequestRefused(404, "no such question")
        try:
            fields = api_schema.read(await _body(request), api_schema.REQUESTS[what].fields)
        except api_schema.InvalidRequest as e:
            raise RequestRefused(400, str(e)) from e
        if fields.get("side", "a") not in engine.sides:
            raise RequestRefused(400, "no second bundle is open: start with --compare DIR")
        try:
            job = line.join(functools.partial(getattr(engine, what), **fields))
        except QueueFull as e:
            raise RequestRefused(429, f"the server is busy: try again in {e.seconds} s") from e
        return Answer(job)

    async def foreign(request: Request) -> Response:
        _check_token(request, token)
        return await neuronpedia_http.answer(request.scope["path"][1:], request, _body, engine, line)

    async def refuse(request: Request, e: RequestRefused) -> Response:
        headers = {"Retry-After": str(e.__cause__.seconds)} if isinstance(e.__cause__, QueueFull) else {}
        key = "detail" if request.url.path.strip("/") in neuronpedia_schema.REQUESTS else "error"
        return JSONResponse({key: str(e)}, e.status, headers)

    async def gone(request: Request, e: Exception) -> Response:
        return PlainTextResponse("", 400)

    made = Starlette(
        routes=[Route("/", index), Route("/static/{name}", static), Route("/api/about", about),
                Route("/openapi.json", described), Route("/api/{what}", ask, methods=["POST"]),
                *(Route(f"/{name}", foreign, methods=["POST"]) for name in neuronpedia_schema.REQUESTS)],
        exception_handlers={RequestRefused: refuse, ClientDisconnect: gone}, lifespan=lifespan,
    )
    made.add_middleware(Guard, hosts=hosts)
    made.state.line = line
    return made


class Answer(StreamingResponse):
    """Stream the events of a job, and cancel the job when the client disconnects."""

    def __init__(self, job: Job):
        # nginx would otherwise collect the answer and send it whole.
        super().__init__(_lines(job), media_type="application/x-ndjson", headers={"X-Accel-Buffering": "no"})
        self.job = job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.leave()


class Guard:
    """Add HEADERS to every answer, refuse requests for other host names, and cut off a proxy's path."""

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
        name = found[1].lower().removesuffix(".") if found else ""
        if self.hosts and name not in self.hosts:
            shown = name if _NAME.fullmatch(name) else "NAME"
            words = (f"this server does not answer to the name {shown}; start it with --allow-host {shown} "
                     "(in a notebook: any_host=True)\n")
            return await PlainTextResponse(words, 421)(scope, receive, with_headers)
        path = local_path(scope["path"], scope["method"])
        return await self.app({**scope, "path": path}, receive, with_headers)


_OWN = re.compile(r"/(?:static/[^/]+|api/[^/]+|openapi\.json)$")
_NAME = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|[0-9a-f:]*:[0-9a-f:.]*)")


def local_path(path: str, method: str = "GET") -> str:
    """Return a request's path without the path under which a proxy serves the explorer.

    Whatever is not the path of a file is that of the page, because a proxy may drop its last slash. The names
    of Neuronpedia's requests count for POST only, because the path of a proxy may end on one of them."""
    if found := _OWN.search(path):
        return found[0]
    last = path.rpartition("/")[2]
    if method == "POST" and last in neuronpedia_schema.REQUESTS:
        return f"/{last}"
    return path if re.search(r"\.[a-z]{2,5}$", path) else "/"


def host_name(given: str) -> str:
    """Return the name of a host as browsers send it. Raises UserError for an address or a port."""
    name = given.strip().lower().removesuffix(".").removeprefix("[").removesuffix("]")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--allow-host {short_repr(given)}: give a host's name alone, such as nla.example.org, without "
            "https://, port and path"
        )
    return name


def _cookie(token: str) -> str:
    """Return the cookie's name. Each token has its own, because all ports of a host share their cookies."""
    return f"nla_token_{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def _is_same(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


def _check_token(request: Request, token: str) -> None:
    # A proxy may send a header of its own, so the cookie counts even then.
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    secret = request.headers.get("x-secret-key", "")  # of Neuronpedia's clients
    cookie = request.cookies.get(_cookie(token), "")
    if token and not any(_is_same(x, token) for x in (given, secret, cookie)):
        status = 403 if secret else 401
        raise RequestRefused(status, "open the address with the token that nla serve printed")


async def _body(request: Request, most: int = api_schema.MOST_BYTES) -> bytes:
    """Read the body, at most `most` bytes of it.

    Requiring application/json blocks other sites: a browser sends it across origins only after a preflight
    request, which this server does not answer."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestRefused(415, "send application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise RequestRefused(413, f"at most {most} bytes")
    except TimeoutError:
        raise RequestRefused(408, f"the request took more than {BODY_SECONDS} s to arrive") from None
    return bytes(body)


async def _lines(job: Job) -> AsyncIterator[bytes]:
    while True:
        try:
            event = await asyncio.wait_for(job.events.get(), 10)
        except TimeoutError:
            event = {}  # keeps proxies from closing an idle connection
        if event is None:
            return
        yield json.dumps(event).encode() + b"\n"  # ASCII, because some clients also break lines at U+2028


@functools.cache
def _file(name: str) -> bytes:
    return (importlib.resources.files("nla_jax.view.explorer") / "static" / name).read_bytes()
