"""Write the explorer's /openapi.json from the table of requests."""

from nla_jax.view.explorer import neuronpedia_schema
from nla_jax.view.explorer.api_schema import MOST_BYTES, REQUESTS, RequestKind

_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_WAITS = {"place": {"type": "integer", "minimum": 0}, "error": {"type": "string"}}
_SIDE = {
    "type": "object", "required": ["name", "stage", "target", "figures", "note", "layer", "blocks",
                                 "width", "ar_kind", "trust"],
    "properties": {
        **{name: {"type": "string"} for name in ("name", "stage", "target")},
        **{name: {"type": "integer"} for name in ("layer", "blocks", "width")},
        "ar_kind": {"type": "string", "enum": ["trained", "frozen"],
                    "description": "frozen: AR is the target itself, which was not trained"},
        "note": {"type": "string", "description": "what a reader of the figures must know, or empty"},
        "trust": {"type": "boolean", "description": "the bundle has a trust model"},
        "figures": {"type": "object", "description": "name -> [value, low, high] on held-out rows"},
    },
}
_ABOUT = {
    "type": "object", "required": ["sides", "max_tokens", "chat"],
    "properties": {"sides": {"type": "object", "additionalProperties": _SIDE},
                   "max_tokens": {"type": "integer"},
                   "chat": {"type": "boolean", "description": "the target has a chat template"}},
}
_REFUSALS = {
    400: "the body is not as described, or no second bundle is open",
    401: "the token is missing", 408: "the body took too long", 413: f"more than {MOST_BYTES} bytes",
    415: "not application/json", 429: "the queue is full",
}
_DETAIL = {"type": "object", "properties": {"detail": {"type": ["string", "array"]}}, "required": ["detail"]}
_FOREIGN_REFUSALS = {
    400: "the request cannot be answered: a vector's length, a position, too long a text",
    401: "the token is missing", 403: "X-SECRET-KEY is wrong", 408: "the body took too long",
    413: "too many bytes", 415: "not application/json", 422: "the body is not as described",
    429: "the queue is full",
}
_RETRY = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}


def description(version: str) -> dict:
    """Return the OpenAPI 3.1 description of the requests that `server.app` answers under /api/."""
    about = {"summary": "The open bundles.", "operationId": "about",
             "responses": {"200": _answer("facts of the open bundles", _ABOUT), **_refused(401)}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nla explorer", "version": version, "license": {"name": "Apache-2.0"},
            "description": "An answer is a stream of JSON values, one per line: "
            '{"place": n} while the request is the n-th in the queue and 0 once it has begun, then the values'
            ' of the answer, or {"error": words} if there is none; ignore {}. Each schema describes a line.',
        },
        "servers": [{"url": "."}],  # relative to the address of this file, because of proxies
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
        "paths": {"/api/about": {"get": about},
                  **{f"/api/{name}": {"post": _asks(name, q)} for name, q in REQUESTS.items()},
                  **{f"/{name}": {"post": _foreign(name, r)}
                     for name, r in neuronpedia_schema.REQUESTS.items()}},
    }


def line(question: RequestKind) -> dict:
    """Return the schema of a line of its answer: an object with one of the names, or empty."""
    return {"type": "object", "properties": _WAITS | question.lines, "maxProperties": 1,
            "additionalProperties": False}


def _asks(name: str, q: RequestKind) -> dict:
    body = {"type": "object", "properties": q.fields, "additionalProperties": False,
            "required": [k for k, field in q.fields.items() if "default" not in field]}
    lines = {"description": "one value per line", "content": {"application/x-ndjson": {"schema": line(q)}}}
    return {
        "summary": q.about, "operationId": name,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": lines, **_refused(*_REFUSALS)},
    }


def _foreign(name: str, r: neuronpedia_schema.Request) -> dict:
    """Describe a request of Neuronpedia's NLA server."""
    body = {"type": "object", "properties": r.fields,
            "required": [k for k, field in r.fields.items() if "default" not in field]}
    content = {"application/json": {"schema": r.answer}}
    if r.frames:
        about = f"with stream: data lines, each one JSON value ({r.frames}), then [DONE]"
        content["text/event-stream"] = {"schema": {"type": "string", "description": about}}
    refused = {str(n): {"description": words, "content": {"application/json": {"schema": _DETAIL}},
                        **({"headers": _RETRY} if n == 429 else {})}
               for n, words in _FOREIGN_REFUSALS.items()}
    return {
        "summary": f"{r.about} As Neuronpedia's NLA server.", "operationId": f"neuronpedia_{name}",
        "tags": ["neuronpedia"],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "the answer", "content": content}, **refused},
    }


def _answer(about: str, schema: dict, **more) -> dict:
    return {"description": about, "content": {"application/json": {"schema": schema}}, **more}


def _refused(*statuses: int) -> dict:
    return {str(n): _answer(_REFUSALS[n], _ERROR, **({"headers": _RETRY} if n == 429 else {}))
            for n in statuses}
