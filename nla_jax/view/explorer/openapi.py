"""The explorer's /openapi.json, from the table of questions."""

from nla_jax.view.explorer.api_schema import MOST_BYTES, QUESTIONS, Question

_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_WAITS = {"place": {"type": "integer", "minimum": 0}, "error": {"type": "string"}}
_SIDE = {
    "type": "object", "required": ["name", "stage", "target", "figures", "layer", "blocks", "width",
                                 "ar_kind"],
    "properties": {
        **{name: {"type": "string"} for name in ("name", "stage", "target")},
        **{name: {"type": "integer"} for name in ("layer", "blocks", "width")},
        "ar_kind": {"type": "string", "enum": ["trained", "frozen"],
                    "description": "frozen: AR is the target itself, and nothing of it was trained"},
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
    415: "not application/json", 429: "the line is full",
}
_RETRY = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "seconds"}}


def description(version: str) -> dict:
    """OpenAPI 3.1 of what `server.app` answers under /api/."""
    about = {"summary": "What is open.", "operationId": "about",
             "responses": {"200": _answer("facts of the open bundles", _ABOUT), **_refused(401)}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nla explorer", "version": version, "license": {"name": "Apache-2.0"},
            "description": "Answers to questions are JSON values, one a line, as they come: "
            '{"place": n} while the request is the n-th that waits and 0 once it is begun, then the answer\'s'
            ' own, or {"error": words} where it cannot be given; {} says nothing. Each schema is of a line.',
        },
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
        "paths": {"/api/about": {"get": about},
                  **{f"/api/{name}": {"post": _asks(name, q)} for name, q in QUESTIONS.items()}},
    }


def line(question: Question) -> dict:
    """The schema of a line of its answer: one of the names, or none."""
    return {"type": "object", "properties": _WAITS | question.lines, "maxProperties": 1,
            "additionalProperties": False}


def _asks(name: str, q: Question) -> dict:
    body = {"type": "object", "properties": q.fields, "additionalProperties": False,
            "required": [k for k, field in q.fields.items() if "default" not in field]}
    lines = {"description": "a value a line", "content": {"application/x-ndjson": {"schema": line(q)}}}
    return {
        "summary": q.about, "operationId": name,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": lines, **_refused(*_REFUSALS)},
    }


def _answer(about: str, schema: dict, **more) -> dict:
    return {"description": about, "content": {"application/json": {"schema": schema}}, **more}


def _refused(*statuses: int) -> dict:
    return {str(n): _answer(_REFUSALS[n], _ERROR, **({"headers": _RETRY} if n == 429 else {}))
            for n in statuses}
