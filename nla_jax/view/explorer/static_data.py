"""Compute in advance what the explorer's page asks about a text, for a static copy (`static_site`)."""

from collections.abc import Callable, Iterator

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.util.batching import chunks
from nla_jax.view.explorer.engine import Engine

DIGITS = 4  # the page shows three


def explain_text(engine: Engine, text: str, turns: list[dict], samples: int, advance: Callable) -> dict:
    """Return the answers about a text: tokens and turns; for each side and token the explanations with their
    scores, what recurs, the next tokens and the trust; for each pair of tokens the comparison; and the
    telling tokens.

    Args:
      turns: of a chat, as `Engine.chat` gives them. samples: explanations at temperature 1 for each token.
      advance: is called after each token of each side.

    Raises UserError as the engine, for a text that it does not read.
    """
    tokens = engine.tokens(text)
    sides = {}
    for side in engine.sides:
        sides[side] = []
        for pick in chunks(range(len(tokens)), engine.sides[side].nla.runner.batch):
            requests = [engine.explain(text, i, side, n) for i in pick for n in range(1 + samples)]
            for i, said in zip(pick, chunks(_in_turns(requests), 1 + samples), strict=True):
                sides[side].append([_explanation(engine, text, i, side, done) for done in said])
                advance()
    pairs = {"a": _pairs(engine, text, [rows[0]["done"] for rows in sides["a"]])}
    return {"text": text, "tokens": tokens, "turns": turns, "sides": _rounded(sides), "pairs": pairs,
            "telling": _rounded(_last(engine.telling(text)))}


def _in_turns(requests: list[Iterator[dict]]) -> list[dict]:
    """Return the answers of requests that run in turns, so that AV writes them together."""
    answers, running = [{} for _ in requests], dict(enumerate(requests))
    while running:
        for i, events in [*running.items()]:
            if (event := next(events, None)) is None:
                del running[i]
            else:
                answers[i] = event.get("done", answers[i])
    return answers


def _explanation(engine: Engine, text: str, token: int, side: str, done: dict) -> dict:
    """Return {"done", "recurs", "next", "trust"}, as the page keeps them; null for what it does not ask."""
    words, row = done["words"], {"done": done, "recurs": None, "next": None, "trust": None}
    if done["ok"]:
        if token:
            row["recurs"] = _last(engine.recur(text, token, words, side))
        row["next"] = _last(engine.predict(text, token, words, side))
        if engine.sides[side].facts["trust"]:
            row["trust"] = _last(engine.trust(text, token, words, side))["claims"]
    return row


def _last(events) -> dict:
    *_, event = filter(None, events)
    return event["done"]


def _pairs(engine: Engine, text: str, greedy: list[dict]) -> dict:
    """Return the cosines of all pairs of tokens: of h, of ĥ, and of h (rows) with ĥ (columns); for each token
    the variance by √d_model, of which FVE is made, and whether its words are readable."""
    side = engine.sides["a"]
    h_TD = side.nla.capture(text, rendered=True)
    unit_TD = F.normalise(h_TD) / np.sqrt(h_TD.shape[1])
    hat_TD = F.normalise(side.nla.reconstruct([d["words"] for d in greedy])) / np.sqrt(h_TD.shape[1])
    ok = [d["ok"] for d in greedy]
    variance_T = engine.variance(side, h_TD) / h_TD.shape[1]
    return _rounded({
        "cos_h": (unit_TD @ unit_TD.T).tolist(), "cos_words": (hat_TD @ hat_TD.T).tolist(),
        "crossed": (unit_TD @ hat_TD.T).tolist(), "variance": variance_T.tolist(), "ok": ok,
    })


def _rounded(value):
    """Return plain values with floats rounded to DIGITS."""
    match value:
        case dict():
            return {k: _rounded(v) for k, v in value.items()}
        case list() | tuple():
            return [_rounded(v) for v in value]
        case float():
            return round(value, DIGITS)
    return value
