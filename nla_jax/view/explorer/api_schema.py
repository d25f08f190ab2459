"""Describe the explorer's requests in one table, used to check requests and to write /openapi.json.

Fields are described in JSON Schema; `check_value` implements the keywords that this table uses.
"""

import dataclasses
import json
import math

MOST_BYTES = 64 * 1024
MOST_TEXT, MOST_WORDS = 8000, 4000  # characters
MOST_SAMPLES, MOST_TURNS, MOST_TOKEN = 64, 64, 10**6 - 1
TELLING = 5  # telling tokens, unless a request says otherwise
ROLES = ("system", "user", "assistant")


class InvalidRequest(ValueError):
    """A request's body does not fit the schema; the message goes to the client."""


@dataclasses.dataclass(frozen=True)
class RequestKind:
    """A kind of request.

    about: one line. fields: name -> schema; a field with a "default" is optional. lines: name -> schema of
    the value under that name in a line of the answer."""

    about: str
    fields: dict[str, dict]
    lines: dict[str, dict]


def _text(most: int, least: int = 0, **more) -> dict:
    return {"type": "string", "minLength": least, "maxLength": most, **more}


def _whole(most: int, **more) -> dict:
    return {"type": "integer", "minimum": 0, "maximum": most, **more}


def _list(items: dict, least: int, most: int, **more) -> dict:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


def _fields(**properties: dict) -> dict:
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": [k for k, v in properties.items() if "default" not in v]}


TEXT, WORDS, TOKEN = _text(MOST_TEXT, 1), _text(MOST_WORDS), _whole(MOST_TOKEN)
SIDE = {"type": "string", "enum": ["a", "b"], "default": "a"}
TURN = _fields(role={"type": "string", "enum": [*ROLES]}, content=_text(MOST_TEXT))

# Schemas of answers; they only document, and nothing checks them.
_STRING, _NUMBER, _INDEX = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_STRINGS, _INDICES = ({"type": "array", "items": x} for x in (_STRING, _INDEX))
_SCORE = {"fve": _NUMBER, "cos": _NUMBER, "ok": {"type": "boolean"}}
_TWO_SCORES = _list(_fields(**_SCORE), 2, 2)
_CLAIMS = {"type": "array", "items": _fields(words=_STRING, adds=_NUMBER)}
_CONTROLS = {"type": "object", "properties": {"shuffled": _NUMBER, "mean": _NUMBER}, "required": ["shuffled"]}
# Scores of the frozen target, which reads the words alone; `shuffled` is its FVE on other texts' words.
_FROZEN = _fields(fve=_NUMBER, cos=_NUMBER, shuffled=_NUMBER)
_END = {"type": ["object", "null"], "properties": {"words": _STRING, "adds": _NUMBER},
        "required": ["words", "adds"]}
_JUDGED = {"words": _STRING, "frozen": _FROZEN, **_SCORE, "claims": _CLAIMS, "end": _END,
           "controls": _CONTROLS}
_NEXT = _list(_fields(token=_STRING, p=_NUMBER), 1, 5)
_HEAT = {"type": "array", "items": _fields(token=_INDEX, words=_STRING, **_SCORE)}
_TURNS = {"type": "array", "items": _fields(role=_STRING, start=_INDEX, end=_INDEX)}

REQUESTS = {
    "read": RequestKind("The tokens of a text.", {"text": TEXT}, {"done": _fields(tokens=_STRINGS)}),
    "chat": RequestKind(
        "A chat in the target's template: its text, for the other requests, its tokens, and the tokens of "
        "each turn's words (from start, up to but without end).",
        {"messages": _list(TURN, 1, MOST_TURNS), "opens": {"type": "boolean", "default": True}},
        {"done": _fields(text=_STRING, tokens=_STRINGS, turns=_TURNS)},
    ),
    "heat": RequestKind(
        "The greedy explanation of each token with its scores, several tokens per line.",
        {"text": TEXT, "side": SIDE, "start": _whole(MOST_TOKEN, default=0)},
        {"heat": _HEAT},
    ),
    "explain": RequestKind(
        "One explanation as it is written, then its scores. Sample 0 is greedy.",
        {"text": TEXT, "token": TOKEN, "side": SIDE, "sample": _whole(MOST_SAMPLES - 1, default=0)},
        {"written": _STRING, "done": _fields(**_JUDGED)},
    ),
    "telling": RequestKind(
        "The n telling tokens of a text, in their order: the target is least sure what follows them "
        "(entropy), or what does follow surprises it most (surprise). `nats` is that entropy or surprise.",
        {"text": TEXT, "n": {"type": "integer", "minimum": 1, "maximum": 64, "default": TELLING},
         "by": {"type": "string", "enum": ["entropy", "surprise"], "default": "entropy"}},
        {"done": _fields(tokens=_INDICES, nats={"type": "array", "items": _NUMBER})},
    ),
    "recur": RequestKind(
        "The claims of an explanation that recur in the greedy explanations of the preceding tokens: for "
        "each claim the numbers of those tokens, null for a claim of common words alone.",
        {"text": TEXT, "token": TOKEN, "side": SIDE, "words": WORDS},
        {"done": _fields(before=_INDICES, at={"type": "array", "items": {"type": ["array", "null"]}})},
    ),
    "trust": RequestKind(
        "The claims of an explanation, each with its span and the trust in it: the estimated probability "
        "that it is true of the text. Only bundles with a trust model answer (`trust` in their facts).",
        {"text": TEXT, "token": TOKEN, "side": SIDE, "words": WORDS},
        {"done": _fields(claims={"type": "array", "items": _fields(
            kind=_STRING, text=_STRING, start=_INDEX, end=_INDEX, trust=_NUMBER)})},
    ),
    "predict": RequestKind(
        "The target's likeliest next tokens with their probabilities: after the text up to the token, and "
        "after the words alone. `kl` is KL(first || second), in nats.",
        {"text": TEXT, "token": TOKEN, "side": SIDE, "words": WORDS},
        {"done": _fields(after_text=_NEXT, after_words=_NEXT, kl=_NUMBER)},
    ),
    "edit": RequestKind(
        "Scores of other words, and the cosine of AR's direction with that of `before`.",
        {"text": TEXT, "token": TOKEN, "side": SIDE, "words": WORDS, "before": _text(MOST_WORDS, default="")},
        {"done": _fields(**_JUDGED, cos_before=_NUMBER)},
    ),
    "steer": RequestKind(
        "The target's continuations: plain, and steered by the difference of two explanations.",
        {
            "text": TEXT,
            "token": TOKEN,
            "side": SIDE,
            "words": WORDS,
            "before": WORDS,
            "strength": {"type": "number", "minimum": -8, "maximum": 8},
        },
        {"goes_on": _list(_STRING, 2, 2), "done": _fields(goes_on=_list(_STRING, 2, 2), strength=_NUMBER)},
    ),
    "compare": RequestKind(
        "The similarity of two tokens, and each explanation scored on both.",
        {"text": TEXT, "side": SIDE, "tokens": _list(TOKEN, 2, 2), "words": _list(WORDS, 2, 2)},
        {"done": _fields(cos_h=_NUMBER, cos_words=_NUMBER, own=_TWO_SCORES, crossed=_TWO_SCORES)},
    ),
}


def read(body: bytes, fields: dict[str, dict]) -> dict:
    """Parse the fields of a request. Raises Unfit for a body that is not JSON, and for missing, unknown or
    invalid fields."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None
    if not isinstance(found, dict):
        raise InvalidRequest("the body must be a JSON object")
    if extra := sorted(found.keys() - fields.keys()):
        raise InvalidRequest(f"unknown field {extra[0][:40]!r}; known fields are {', '.join(fields)}")
    out = {}
    for name, schema in fields.items():
        try:
            out[name] = check_value(found[name] if name in found else schema["default"], schema)
        except (InvalidRequest, KeyError):
            raise InvalidRequest(f"{name} must be {describe_schema(schema)}") from None
    return out


def check_value(value, schema: dict):
    """Return the value with lists as tuples and whole numbers as int. Raises Unfit if it does not fit."""
    kind = schema["type"]
    if kind in ("integer", "number") and type(value) in (int, float) and _is_finite(value):
        ok = schema["minimum"] <= value <= schema["maximum"] and (kind == "number" or value == int(value))
        value = int(value) if ok and kind == "integer" else value
    elif kind == "string" and type(value) is str:
        ok = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        ok = ok and value in schema.get("enum", [value]) and _has_whole_characters(value)
    elif kind == "array" and type(value) is list:
        if ok := schema["minItems"] <= len(value) <= schema["maxItems"]:
            value = tuple(check_value(v, schema["items"]) for v in value)
    elif kind == "object" and type(value) is dict:
        if ok := value.keys() == schema["properties"].keys():
            value = {k: check_value(v, schema["properties"][k]) for k, v in value.items()}
    else:
        ok = kind == "boolean" and type(value) is bool
    if not ok:
        raise InvalidRequest
    return value


def _is_finite(value: int | float) -> bool:
    """Return whether a number is finite, and if it is an integer, whether a float can hold it."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _has_whole_characters(text: str) -> bool:
    """Return whether the text has no lone surrogates, which tokenizers reject."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def describe_schema(schema: dict) -> str:
    """Describe a schema in words."""
    match schema:
        case {"enum": names}:
            return " or ".join(names)
        case {"type": "string", "minLength": least, "maxLength": most}:
            return f"a text of {least} to {most} characters"
        case {"type": "integer", "minimum": least, "maximum": most}:
            return f"a whole number from {least} to {most}"
        case {"type": "number", "minimum": least, "maximum": most}:
            return f"a number from {least} to {most}"
        case {"type": "array", "items": items, "minItems": least, "maxItems": most}:
            return (
                f"a list of {least if least == most else f'{least} to {most}'}, each {describe_schema(items)}"
            )
        case {"type": "object", "properties": properties}:
            return " and ".join(f"{name} ({describe_schema(p)})" for name, p in properties.items())
    return "true or false"
