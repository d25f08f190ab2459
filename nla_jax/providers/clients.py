"""One request to a language model over HTTP, which has one of four outcomes.

An `Answer`. The exception `Retry`: there is no answer now, but a retry may bring one. `Failed`: there will be
no answer to this prompt. UserError: there will be no answer to any prompt (key, model, address, credit).

The official clients (`openai`, `anthropic`; the extra `providers`) do the transport, because they know each
provider's headers. Their own retries are off. `scheduler` retries instead: it counts retries, delays all
rows if the server asks one to wait, and shows the reason. Answers are parsed from the JSON and not by the
clients' classes, because servers compatible with OpenAI's omit some fields.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import importlib
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple

from nla_jax.errors import UserError, one_line, short_repr
from nla_jax.providers import retry_header
from nla_jax.util import network

REFUSED, CUT, EMPTY = "refused", "cut at the token limit", "empty answer"
OVERLOADED = (408, 409, 425, 429)  # a retry may succeed, as after 500 and above
SHORTEST_KEY = 8  # shorter values ("none", "EMPTY") are placeholders, and may be words of an answer


class Answer(NamedTuple):
    """A model's answer. `reason`: "", or why it is unusable (REFUSED, CUT, EMPTY). `cost`: in dollars."""

    text: str
    reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None


class Retry(Exception):
    """There is no answer now. `wait`: seconds that the server asks to wait, or None."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Unreachable(Retry):
    """There is no server at the address, so the row is not to blame."""


class Failed(Exception):
    """There will be no answer to this prompt. `reason` is for counts; `detail` is the server's message."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Missing(UserError):
    """HTTP 404: the server does not have the requested resource."""


Ask = Callable[[str], Awaitable[Answer]]


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model at an address. `timeout`: seconds for a request and its whole answer."""

    kind: str
    model: str
    url: str
    max_tokens: int = 400
    temperature: float | None = None
    timeout: float = 120.0
    key_env: str = ""
    key: str = dataclasses.field(default="", repr=False)

    def hidden(self, text: str) -> str:
        """Return a server's text with our key replaced, and with characters that UTF-8 can encode."""
        if len(self.key) >= SHORTEST_KEY:
            text = text.replace(self.key, "[key]")
        return text.encode("utf-8", "replace").decode("utf-8")

    @property
    def ours(self) -> bool:
        """Return whether this is the provider's own address."""
        return self.url == PROVIDERS[self.kind].home


def endpoint(kind: str, model: str, base_url: str = "", key_env: str = "", **settings) -> Endpoint:
    """Return the endpoint with its key from the environment.

    The provider's own variable is read only for its own address. Another server gets a key only if
    `key_env` gives its variable.

    Raises UserError if there is no model, if the address is invalid or contains a password, or if a key is
    needed and missing.
    """
    if kind not in PROVIDERS:
        raise UserError(f"no provider {kind!r}: there are {', '.join(PROVIDERS)}")
    home, variable, *_ = PROVIDERS[kind]
    if not model:
        raise UserError(f"no model: name one that {base_url or home} serves, with --model")
    url = network.check_url(base_url).rstrip("/") if base_url else home
    name = key_env or (variable if url == home else "")
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise UserError(f"{url} needs a key: set the environment variable {name}")
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"the environment variable {name} holds no key: a key must be ASCII without white "
                        "space")
    if not (settings.get("timeout", 1.0) > 0 and settings.get("max_tokens", 1) > 0):
        raise UserError("the time-out and the number of tokens of an answer must be above 0")
    return Endpoint(kind, model, url, key_env=name, key=key, **settings)


@contextlib.asynccontextmanager
async def client(e: Endpoint) -> AsyncIterator:
    """Yield (module, client) of the official package, which neither retries nor follows redirects. Raises
    UserError if the environment's proxy or certificates cannot be used; loopback addresses need none."""
    try:
        sdk = importlib.import_module(e.kind)
    except ImportError:
        raise UserError(f"the package {e.kind} is not installed: pip install 'nla_jax[providers]'") from None
    try:
        more = network.client_settings(e.url)
        # A redirect would carry the key to another server.
        http = sdk.DefaultAsyncHttpxClient(follow_redirects=False, timeout=e.timeout, **more)
    except Exception as err:  # of proxies, ssl and files
        said = network.hide_passwords(one_line(err))
        raise UserError(f"no request to {e.url} can be sent ({said}){network.hint(repr(err))}") from None
    settings = dict(api_key=e.key or "none", base_url=e.url, max_retries=0, http_client=http)
    async with PROVIDERS[e.kind].connect(sdk, e, settings) as made:
        yield sdk, made


@contextlib.asynccontextmanager
async def open_asker(e: Endpoint) -> AsyncIterator[Ask]:
    """Yield a function from a prompt to its answer, which raises `Retry`, `Failed` or UserError."""
    async with client(e) as (sdk, made):

        async def ask(prompt: str) -> Answer:
            call = PROVIDERS[e.kind].part(made).with_raw_response.create(**request(e, prompt))
            return PROVIDERS[e.kind].read(e, await send(sdk, e, call))

        yield ask


def request(e: Endpoint, prompt: str) -> dict:
    """Return the body of a request."""
    limit = PROVIDERS[e.kind].limit if e.ours else "max_tokens"
    heat = {} if e.temperature is None else {"temperature": e.temperature}
    return {"model": e.model, "messages": [{"role": "user", "content": prompt}], limit: e.max_tokens, **heat}


async def send(sdk, e: Endpoint, call) -> object:
    """Await a call of a client's `with_raw_response`; return its JSON. Raises as `translate_errors`."""
    with translate_errors(sdk, e):
        # The clients' own time-outs restart with every byte.
        async with asyncio.timeout(e.timeout):
            response = await call
        return response.http_response.json()


@contextlib.contextmanager
def translate_errors(sdk, e: Endpoint, *broken: type[Exception]):
    """Turn a client's exceptions into `Retry`, `Failed` or UserError, without their headers or causes.

    Args:
      broken: further exception classes that mean a broken connection.
    """
    try:
        yield
    except (TimeoutError, sdk.APITimeoutError):
        raise Retry("time-out") from None
    except (sdk.APIConnectionError, *broken) as err:
        cause, proxy = err.__cause__, network.proxy_of(e.url)
        said = short_repr(e.hidden(str(cause)))
        if "CERTIFICATE_VERIFY_FAILED" in said:
            raise UserError(f"{e.url}: its certificate is not trusted ({said}): set SSL_CERT_FILE to a file "
                            f"of certificates that has it{network.hint(said)}") from None
        if type(cause).__name__ in ("ConnectError", "ProxyError"):
            through = f" through {proxy}" if proxy else ""
            raise Unreachable(f"no connection to {e.url}{through} ({said})") from None
        raise Retry("broken connection") from None
    except sdk.APIStatusError as err:
        raise error_of_status(e, err.status_code, err.response.headers, err.body) from None
    except (ValueError, RecursionError, sdk.APIError):
        raise Retry("an answer that is not JSON") from None


def error_of_status(e: Endpoint, status: int, headers: Mapping[str, str], body: object) -> Exception:
    """Return the exception for an HTTP status other than 2xx: for the row, or for the whole run."""
    code, said = _error(body)
    code, detail = e.hidden(code), e.hidden(said)[:300]
    about = f" ({short_repr(detail)})" if detail else ""
    if status == 401:
        wants = f"it does not accept the key in {e.key_env}" if e.key else "it needs a key (--key-env NAME)"
        return UserError(f"HTTP 401 from {e.url}: {wants}")
    if status == 407:
        return UserError(f"HTTP 407: the proxy asks for a password{network.hint()}")
    if status == 402 or code == "insufficient_quota":
        return UserError(f"HTTP {status} from {e.url}: no credit left{about}; add some and run this again")
    if status in (404, 405):
        return Missing(f"HTTP {status} from {e.url}: no model {e.model!r}, or no such address{about}")
    if status < 400:
        return UserError(f"HTTP {status}: {e.url} redirects; give the new address with --base-url")
    reason = f"HTTP {status} {code}".strip()
    if status in OVERLOADED or status >= 500:
        return Retry(reason, retry_header.retry_after(headers, datetime.datetime.now(datetime.UTC)))
    return Failed(reason, detail)


def _error(body: object) -> tuple[str, str]:
    """Return (code, message) of an error body in the formats of OpenAI, vLLM, Ollama and Anthropic."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(inner, dict):
        return "", str(inner or "")[:1000]
    named = [inner.get(k) for k in ("code", "type")]
    code = next((c for c in named if isinstance(c, str) and re.fullmatch(r"[a-z][a-z_]{2,39}", c)), "")
    return code, str(inner.get("message") or "")[:1000]


def openai_answer(e: Endpoint, body: object) -> Answer:
    """Return the answer of a chat completion. Raises `Retry` if there is none."""
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):  # parts
            content = "".join(p["text"] for p in content if p.get("type") == "text")
        usage = body.get("usage") or {}
        tokens = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        cost = usage.get("cost")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Retry(_no_answer(body)) from None
    if finish == "error" or not isinstance(content or "", str):
        raise Retry("an answer without a text")
    refused = finish == "content_filter" or bool(refusal)
    cost = float(cost) if isinstance(cost, int | float) and math.isfinite(cost) and cost >= 0 else None
    return _answer(e, content or "", refused, finish == "length", tokens, cost)


def anthropic_answer(e: Endpoint, body: object) -> Answer:
    """Return the answer of a message. Raises `Retry` if there is none."""
    try:
        text = "".join(b["text"] for b in body["content"] if b["type"] == "text")
        stop, usage = body.get("stop_reason"), body.get("usage") or {}
        read = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        tokens = sum(_count(usage.get(k)) for k in read), _count(usage.get("output_tokens"))
    except (KeyError, TypeError, AttributeError):
        raise Retry(_no_answer(body)) from None
    cut = stop in ("max_tokens", "model_context_window_exceeded")
    return _answer(e, text, stop == "refusal", cut, tokens, None)


def _answer(e: Endpoint, text: str, refused: bool, cut: bool, tokens, cost) -> Answer:
    reason = REFUSED if refused else CUT if cut else EMPTY if not text.strip() else ""
    return Answer(e.hidden(text), reason, *tokens, cost)


def _no_answer(body: object) -> str:
    error = isinstance(body, dict) and body.get("error")
    return "an error in place of an answer" if error else "an answer without a text"


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


class Provider(NamedTuple):
    """A kind of server. home: its own address. key: the variable with its key. connect: (sdk, endpoint,
    settings) -> client. part: client -> what creates answers. limit: its name for the most tokens."""

    home: str
    key: str
    connect: Callable
    part: Callable
    read: Callable[[Endpoint, object], Answer]
    limit: str = "max_tokens"


PROVIDERS = {
    # OpenAI's newer models refuse max_tokens; some of the compatible servers know nothing else.
    "openai": Provider(
        "https://api.openai.com/v1", "OPENAI_API_KEY",
        lambda sdk, e, settings: sdk.AsyncOpenAI(**settings, default_headers={} if e.ours else {
            "OpenAI-Organization": sdk.Omit(), "OpenAI-Project": sdk.Omit()}),
        lambda made: made.chat.completions, openai_answer, "max_completion_tokens"),
    "anthropic": Provider(
        "https://api.anthropic.com", "ANTHROPIC_API_KEY",
        lambda sdk, e, settings: sdk.AsyncAnthropic(**settings),
        lambda made: made.messages, anthropic_answer),
}
