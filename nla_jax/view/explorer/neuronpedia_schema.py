"""The requests of Neuronpedia's NLA server in one table, to check requests and to describe them.

Source: https://github.com/hijohnnylin/neuronpedia, apps/nla (openapi.json, server.py and
tests/test_frame_contract.py) at commit 17bc39171bf11c68bf5bf52013b11afe8e8b1f81. Names, defaults and ranges
are from there. Unknown fields are ignored, as there.
"""

import dataclasses
import json

import numpy as np

from nla_jax.view.explorer import api_schema

MOST_TEXT, MOST_DESCRIPTION = 65536, 8192  # characters
MOST_VECTORS, MOST_POSITIONS, MOST_MESSAGES, MOST_NEW = 128, 512, 64, 4096
BYTES_A_NUMBER = 25  # of a float64 in JSON, at most


class InvalidRequest(ValueError):
    """A body does not fit; `detail` is as FastAPI's: a list of {"loc", "msg", "type"}."""

    def __init__(self, loc: list, words: str):
        super().__init__(words)
        self.detail = [{"loc": ["body", *loc], "msg": words, "type": "value_error"}]


@dataclasses.dataclass(frozen=True)
class Request:
    """A kind of request: one line about it, its fields, its answer, and the frames of its stream."""

    about: str
    fields: dict[str, dict]
    answer: dict
    frames: str = ""


def _or_null(schema: dict) -> dict:
    return {"anyOf": [schema, {"type": "null"}], "default": None}


def _text(most: int, **more) -> dict:
    return {"type": "string", "maxLength": most, **more}


def _list(items: dict, most: int, least: int = 0) -> dict:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _object(required: dict, **optional) -> dict:
    return {"type": "object", "properties": required | optional, "required": [*required]}


# The length is d_model of the open bundle, which this table does not know.
VECTOR = {"type": "array", "items": {"type": "number"}, "description": "an activation: d_model numbers"}
_FLAG = {"type": "boolean"}
_MESSAGE = {"type": "object", "properties": {
    "role": _text(64), "content": _text(MOST_TEXT, default=""), "channel": _or_null(_text(64))}}
_PROMPT = {
    "text": _or_null(_text(MOST_TEXT)),
    "messages": _or_null(_list(_MESSAGE, MOST_MESSAGES)),
    "add_generation_prompt": {**_FLAG, "default": True},
    "continue_final_message": {**_FLAG, "default": False},
    "enable_thinking": _or_null(_FLAG),
}
_SAMPLING = {
    "temperature": {"type": "number", "minimum": 0, "maximum": 5, "default": 0.7},
    "max_new_tokens": {"type": "integer", "minimum": 1, "maximum": MOST_NEW, "default": 200,
                       "description": "more than the bundle's maximum means that maximum"},
}
_STREAM = {"stream": {**_FLAG, "default": False}}
_POSITION = {"type": "integer", "minimum": -(10**6), "maximum": 10**6}

_STRING, _NUMBER, _INDEX = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_MAYBE = {"type": ["string", "null"]}
_SCORE = {"mse": _NUMBER, "cosine_similarity": _NUMBER}
_TOKEN = {"token": _STRING, "token_id": _INDEX, "position": _INDEX}
_PLACE = {"fragment_index": _INDEX, "fragment_count": _INDEX, "role": _MAYBE, "section": _MAYBE,
          "channel": _MAYBE, "message_index": {"type": ["integer", "null"]}}
_DESCRIBED = _object({"description": _STRING, **_SCORE})
_EXPLAINED = _object({**_TOKEN, "l2_norm": _NUMBER, "description": _STRING, **_SCORE,
                      "generated": _FLAG, **_PLACE})


def _each(schema: dict) -> dict:
    return {"type": "array", "items": schema}


REQUESTS = {
    "explain": Request(
        "Capture the activations of a text and describe those at `positions`, by default all.",
        {**_PROMPT, "positions": _or_null(_list(_POSITION, MOST_POSITIONS)), **_SAMPLING,
         "reverse": {**_FLAG, "default": True}, **_STREAM},
        _object({"layer_index": _INDEX, "results": _each(_EXPLAINED)}),
        'first {"layer_index", "total", "prompt_length"}, then {"position", "text", "done": false} as AV '
        "writes, and a result for each position",
    ),
    "describe": Request(
        "Describe activations.",
        {"activations": _list(VECTOR, MOST_VECTORS, 1), **_SAMPLING, **_STREAM},
        _object({"results": _each(_DESCRIBED)}),
        '{"index", "text", "done": false} as AV writes, and a result with its index for each activation',
    ),
    "score": Request(
        "Score a description against an activation, by AR.",
        {"description": _text(MOST_DESCRIPTION), "activation": VECTOR}, _object(_SCORE),
    ),
    "compare": Request(
        "Describe the difference of two activations, a − b.",
        {"activation_a": VECTOR, "activation_b": VECTOR, **_SAMPLING},
        _object({"description": _STRING, "diff_norm": _NUMBER, **_SCORE}),
    ),
    "extract": Request(
        "The activation at each token of a text.", dict(_PROMPT),
        _object({"layer_index": _INDEX, "tokens": _each(
            _object({**_TOKEN, "activation": _each(_NUMBER), "l2_norm": _NUMBER}))}),
    ),
    "tokenize": Request(
        "The tokens of a text.", dict(_PROMPT),
        _object({"tokens": _each(_object({**_TOKEN, **_PLACE})), "prompt_length": _INDEX, "text": _STRING}),
    ),
}


def most_bytes(name: str, width: int) -> int:
    """Return the maximum size of a body: a text, and as many vectors of `width` as the request may have."""
    vectors = {"describe": MOST_VECTORS, "compare": 2, "score": 1}.get(name, 0)
    return 8 * MOST_TEXT + vectors * (width * BYTES_A_NUMBER + 16)


def read(name: str, body: bytes) -> dict:
    """Parse the body of a request: {field: value}, vectors as float64 arrays. Raises InvalidRequest."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest([], "the body is not JSON") from None
    if not isinstance(found, dict):
        raise InvalidRequest([], "the body must be a JSON object")
    return _fields(found, REQUESTS[name].fields, [])


def _fields(found: dict, fields: dict[str, dict], loc: list) -> dict:
    out = {}
    for name, schema in fields.items():
        if name not in found and "default" not in schema:
            raise InvalidRequest([*loc, name], f"{name} is missing")
        out[name] = _check(found[name], schema, [*loc, name]) if name in found else schema["default"]
    return out


def _check(value, schema: dict, loc: list):
    if "anyOf" in schema:
        return None if value is None else _check(value, schema["anyOf"][0], loc)
    if schema is VECTOR:
        return _vector(value, loc)
    if schema["type"] == "array":
        least, most = schema["minItems"], schema["maxItems"]
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise InvalidRequest(loc, f"{loc[-1]} must be a list of {least} to {most}")
        return [_check(v, schema["items"], [*loc, i]) for i, v in enumerate(value)]
    if schema["type"] == "object":
        if not isinstance(value, dict):
            raise InvalidRequest(loc, f"{loc[-1]} must be an object")
        return _fields(value, schema["properties"], loc)
    try:
        return api_schema.check_value(value, schema)
    except api_schema.InvalidRequest:
        schema = {"minLength": 0, **schema} if schema["type"] == "string" else schema
        words = f"{loc[-1]} must be {api_schema.describe_schema(schema)}"
        raise InvalidRequest(loc, words) from None


def _vector(value, loc: list) -> np.ndarray:
    """Return a vector as float64. JSON of Python has NaN and infinities, which no activation may have."""
    try:
        if isinstance(value, list) and all(type(x) in (int, float) for x in value):
            found = np.array([float(x) for x in value])
            with np.errstate(over="ignore"):
                if np.isfinite(found.astype(np.float32)).all():
                    return found
    except OverflowError:  # an integer beyond every float
        pass
    raise InvalidRequest(loc, f"{loc[-1]} must be a list of numbers that are finite in float32")
