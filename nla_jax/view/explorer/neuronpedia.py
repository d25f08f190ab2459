"""Compute the answers of Neuronpedia's NLA server (`neuronpedia_schema`) with the explorer's engine.

Each request is a generator for the job queue. It yields {"frame": {...}} for a stream, and last
{"result": {...}}, or {"refused": words} if the request cannot be answered.
"""

from collections.abc import Iterator

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import read_tag
from nla_jax.util.batching import chunks
from nla_jax.view.explorer import neuronpedia_text
from nla_jax.view.explorer.bundles import Side, parse_unfinished, stream_answers
from nla_jax.view.explorer.engine import Engine
from nla_jax.view.explorer.job_queue import AT_ONCE
from nla_jax.view.explorer.neuronpedia_schema import (
    MOST_DESCRIPTION,
    MOST_NEW,
    MOST_POSITIONS,
    MOST_TEXT,
    MOST_VECTORS,
)

_PROMPT = ("text", "messages", "add_generation_prompt", "continue_final_message", "enable_thinking")


def answer(engine: Engine, name: str, fields: dict) -> Iterator[dict]:
    """Yield the events of a request. Each row of a request is a sample of its own, so the same request gets
    the same words."""
    try:
        yield from _WORK[name](engine, **fields)
    except UserError as e:
        yield {"refused": str(e)}


def health(engine: Engine, most_waiting: int) -> dict:
    """Return what the server's `GET /` says: the bundle, its target, and the limits of a request."""
    side = engine.sides["a"]
    return {
        "status": "ok", "verbalizer_model": side.name, "d_model": side.facts["width"],
        "reconstructor_available": True, "source_model": side.facts["target"],
        "extraction_layer": side.facts["layer"], "source_truncated": False, "completion_available": False,
        "num_cuda_devices": 0, "max_concurrent": side.nla.runner.batch, "max_concurrent_explains": AT_ONCE,
        "source_max_concurrent": 1, "reconstructor_max_concurrent": 1, "max_describe_requests": most_waiting,
        "limits": {
            "max_input_chars": MOST_TEXT, "max_positions_per_request": MOST_POSITIONS,
            "max_new_tokens": MOST_NEW, "max_describe_batch": MOST_VECTORS,
            "max_description_chars": MOST_DESCRIPTION, "max_completion_tokens": 0,
        },
    }


def _tokenize(engine: Engine, **fields) -> Iterator[dict]:
    prompt, tokens = _read(engine, fields)
    n_lead = len(engine.sides["a"].nla.spec.lead)
    yield {"result": {"tokens": tokens, "prompt_length": n_lead + len(tokens), "text": prompt.text}}


def _extract(engine: Engine, **fields) -> Iterator[dict]:
    nla = engine.sides["a"].nla
    prompt, tokens = _read(engine, fields)
    h_TD = nla.capture(prompt.text, rendered=True)
    kept = ("token", "token_id", "position")
    found = [{k: t[k] for k in kept} | {"activation": h_D.tolist(), "l2_norm": _norm(h_D)}
             for t, h_D in zip(tokens, h_TD, strict=True)]
    yield {"result": {"layer_index": nla.spec.layer, "tokens": found}}


def _explain(engine: Engine, positions, temperature, max_new_tokens, reverse, stream, **fields):
    side = engine.sides["a"]
    prompt, tokens = _read(engine, fields)
    rows = _rows(positions, len(tokens), len(side.nla.spec.lead))[:: -1 if reverse else 1]
    h_TD = side.nla.capture(prompt.text, rendered=True)
    total = {"layer_index": side.nla.spec.layer, "total": len(rows),
             "prompt_length": len(side.nla.spec.lead) + len(tokens)}
    yield {"frame": total} if stream else {}
    results = [None] * len(rows)
    samples = [1 + rows[:i].count(row) for i, row in enumerate(rows)]
    for i, found in _described(side, h_TD[rows], samples, temperature, max_new_tokens):
        place = tokens[rows[i]]
        if isinstance(found, str):
            yield {"frame": {"position": place["position"], "text": found, "done": False}} if stream else {}
            continue
        said = {k: place[k] for k in ("token", "token_id", "position")}
        rest = {k: v for k, v in place.items() if k not in said}
        results[i] = {**said, "l2_norm": _norm(h_TD[rows[i]]), **found, "generated": False, **rest}
        yield {"frame": results[i]} if stream else {}
    yield {"result": {"layer_index": side.nla.spec.layer, "results": results}}


def _describe(engine: Engine, activations, temperature, max_new_tokens, stream):
    side = engine.sides["a"]
    h_ND = _vectors(side, activations, "")
    results = [None] * len(h_ND)
    samples = list(range(1, len(h_ND) + 1))
    for i, found in _described(side, h_ND, samples, temperature, max_new_tokens):
        if isinstance(found, str):
            yield {"frame": {"index": i, "text": found, "done": False}} if stream else {}
            continue
        results[i] = found
        yield {"frame": {"index": i, **found}} if stream else {}
    yield {"result": {"results": results}}


def _score(engine: Engine, description, activation):
    side = engine.sides["a"]
    yield {"result": _scores(side, [description], _vectors(side, [activation], "activation"))[0]}


def _compare(engine: Engine, activation_a, activation_b, temperature, max_new_tokens):
    side = engine.sides["a"]
    for name, v in (("activation_a", activation_a), ("activation_b", activation_b)):
        _check_length(side, v, name)
    difference_D = activation_a - activation_b
    if not difference_D.any():
        raise UserError("activation_a and activation_b are equal: there is no difference to describe")
    h_1D, found = _vectors(side, [difference_D], "the difference"), {}
    for event in _described(side, h_1D, [1], temperature, max_new_tokens):
        found = event[1]  # the last has description and scores
        yield {}
    yield {"result": {"description": found["description"], "diff_norm": _norm(difference_D), **found}}


_WORK = {"explain": _explain, "describe": _describe, "score": _score, "compare": _compare,
         "extract": _extract, "tokenize": _tokenize}


def _read(engine: Engine, fields: dict) -> tuple[neuronpedia_text.Prompt, list[dict]]:
    """Return the prompt and its tokens. Raises UserError for none, and for more than the engine reads."""
    nla = engine.sides["a"].nla
    prompt = neuronpedia_text.read_prompt(nla.tokenizer, nla.spec.lead, **{k: fields[k] for k in _PROMPT})
    tokens = neuronpedia_text.read_tokens(nla.tokenizer, prompt, len(nla.spec.lead))
    if not tokens:
        raise UserError("the text is empty: give at least one token")
    if len(tokens) > engine.max_tokens:
        raise UserError(f"the text has {len(tokens)} tokens; at most {engine.max_tokens} are read here")
    return prompt, tokens


def _rows(positions: list[int] | None, n: int, n_lead: int) -> list[int]:
    """Return the rows of h at the positions, which count the tokens before every text."""
    if not positions:
        positions = list(range(n_lead, n_lead + n))
        if n > MOST_POSITIONS:
            raise UserError(f"the text has {n} positions; at most {MOST_POSITIONS} are described: give some")
    rows = [p - n_lead if p >= 0 else n + p for p in positions]
    for p, row in zip(positions, rows, strict=True):
        if not -n_lead <= row < n:
            raise UserError(f"position {p} is out of range (0..{n_lead + n - 1})")
        if row < 0:
            raise UserError(f"position {p} is a token that stands before every text; it is not described")
    return rows


def _check_length(side: Side, v: np.ndarray, name: str) -> None:
    if len(v) != side.facts["width"]:
        raise UserError(f"{name} has {len(v)} numbers; d_model is {side.facts['width']}")


def _vectors(side: Side, vectors: list[np.ndarray], name: str) -> np.ndarray:
    """Return vectors as h [N, D], scaled to a maximum of 1 because only the direction counts, and squares of
    extreme numbers are not finite. Raises UserError for a wrong length, and for a zero vector."""
    out = []
    for i, v in enumerate(vectors):
        what = name or f"activation {i}"
        _check_length(side, v, what)
        if not v.any():
            raise UserError(f"{what} is zero: it has no direction")
        out.append(v / np.abs(v).max())
    return np.stack(out)


def _described(side: Side, h_ND, samples: list[int], temperature: float, max_new: int) -> Iterator[tuple]:
    """Yield (row, the words so far) as AV writes, then (row, description and scores) for each row."""
    for pick in chunks(list(range(len(h_ND))), side.nla.runner.batch):
        numbers = np.array([samples[i] for i in pick])
        shown: dict[int, str] = {}
        for written, _ in stream_answers(side, h_ND[pick], numbers, temperature, max_new):
            for i, response in zip(pick, written, strict=True):
                words = parse_unfinished(response)
                if words != shown.get(i, ""):
                    shown[i] = words
                    yield i, words
        texts = [read_tag(w) or "" for w in written]
        scores = _scores(side, texts, h_ND[pick])
        for i, text, score in zip(pick, texts, scores, strict=True):
            yield i, {"description": text, **score}


def _scores(side: Side, texts: list[str], h_ND: np.ndarray) -> list[dict]:
    """Return mse and cosine_similarity by AR. The mse of unit vectors times √d_model is 2 (1 − cosine); a
    text without words scores as an orthogonal vector."""
    h_hat_ND, ok_N = side.nla.reconstruct(texts), np.array([bool(t.strip()) for t in texts])
    cos_N = np.where(ok_N, np.sum(F.normalise(h_ND) * F.normalise(h_hat_ND), 1) / h_ND.shape[1], 0.0)
    cos_N = np.clip(np.nan_to_num(cos_N), -1, 1)
    return [{"mse": float(2 - 2 * c), "cosine_similarity": float(c)} for c in cos_N]


def _norm(v) -> float:
    return float(np.linalg.norm(np.asarray(v, np.float64)))
