"""Explanations of a corpus by the target itself: `nla data explain`."""

import collections
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from nla_jax import prompts
from nla_jax.data import explanations
from nla_jax.data.corpora import Document, open_corpus
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts, sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.chat import make_answer
from nla_jax.util import hardware, paths
from nla_jax.util.batching import chunks
from nla_jax.util.keys import new_key
from nla_jax.util.progress import Progress

Text = tuple[Document, int, int]  # doc.text[start:end]


def run(
    target: str,
    corpus: str,
    out: str | Path,
    *,
    n: int,
    batch: int = 16,
    max_new: int = 160,
    temperature: float = 0.7,
    words: tuple[int, int] = (50, 95),
    seed: int = 0,
    dtype: str = "bfloat16",
) -> dict:
    """Let `target` explain n texts of `corpus`. An interrupted run is resumed.

    Usable answers are appended to `out` in the schema of `explanations.Record`. Unusable answers are appended
    unchanged to `out` + ".dropped". A text that is in either file is not explained again.
    The key of an answer depends on (seed, text) only, so neither the batch nor a restart changes it.

    Args:
      target, corpus: URIs (`weights.resolve`, `corpora.open_corpus`).
      max_new: maximum number of tokens of an answer. words: minimum and maximum number of words of a text.

    Returns:
      {"texts": ..., "kept": ..., "dropped": {reason: ...}} of these n texts.

    Raises:
      UserError: target or corpus cannot be opened, no text is long enough, or a setting is invalid.
    """
    if n < 1 or batch < 1 or max_new < 1 or temperature < 0:
        raise UserError(f"n={n}, batch={batch}, max_new={max_new}, temperature={temperature}: the "
                        "first three must be at least 1, the temperature at least 0")
    if paths.is_remote(out):
        raise UserError(f"{out}: object storage cannot append lines; name a local file, and copy it later")
    out = paths.path(out)
    if out.is_dir():
        raise UserError(f"{out} is a directory: name a .jsonl file")
    # With the tokenizer, documents that spell its special tokens are left out.
    texts = choose_texts(open_corpus(corpus, tok=_tokenizer(target)), n, words, seed)
    dropped = out.with_name(out.name + ".dropped")
    done = {_place(r) for path in (out, dropped) for r in _read(path)}
    left = sum((d.doc_id, a, b) not in done for d, a, b in texts)
    if left:
        answer = _answerer(target, max_new, temperature, seed, dtype, batch, out)
        with Progress("explain", len(texts), len(texts) - left, unit="texts") as bar:
            # Batches are slices of the whole list, so a restart has the same ones.
            for part in chunks(texts, batch):
                new = [(d.doc_id, a, b) not in done for d, a, b in part]
                if any(new):
                    _append_answers(part, new, answer(part), out, dropped)
                    bar.advance(sum(new))
    return _count(texts, out, dropped)


def corpus_of(corpus: str, target: str) -> list[Document]:
    """Open the documents to explain; `target`'s tokenizer renders conversations. Raises UserError."""
    return open_corpus(corpus, tok=_tokenizer(target) if "chat:" in corpus else None)


def _tokenizer(target: str):
    tok = tok_lib.load(weights.resolve(target))
    chat_prompts.stop_thinking(tok)
    return tok


def choose_texts(docs: Sequence[Document], n: int, words: tuple[int, int], seed: int) -> list[Text]:
    """Choose n texts of whole words from the documents of all splits; texts do not overlap.

    Lengths, gaps and the choice are keyed by (seed, document), so a larger n only adds texts.
    Raises UserError if no document is long enough.
    """
    low, high = words
    if not 1 <= low <= high:
        raise UserError(f"texts of {low} to {high} words: give a minimum of at least 1 and a maximum "
                        "that is not below it")
    found = []
    for doc in docs:
        starts = [0, *(i + 1 for i, c in enumerate(doc.text) if c == " "), len(doc.text) + 1]
        at = 0
        while True:
            draw = keyed_hash("explain", seed, doc.doc_id, at)
            first = at + draw % low
            at = first + low + (draw >> 32) % (high - low + 1)
            if at >= len(starts):
                break
            a, b = starts[first], starts[at] - 1
            # In a conversation, a text must be inside one turn.
            if not doc.spans or any(start <= a and b <= end for start, end in doc.spans):
                found.append((doc, a, b))
    if not found:
        raise UserError(f"no document of the corpus contains a text of {low} words: set a smaller minimum")
    found.sort(key=lambda t: keyed_hash("explain", seed, t[0].doc_id, t[1], t[2]))
    return found[:n]


def _check_settings(out: Path, target: str, **settings) -> None:
    """Write OUT.settings, what determines an answer. Raises UserError if it is there and says otherwise."""
    model, path = weights.resolve(target), out.with_name(out.name + ".settings")
    tok = tok_lib.load(model)
    settings |= {"target": weights.digest(model), "tokenizer": tok_lib.fingerprint(tok)}
    settings["chat_template"] = tok.chat_template
    if not path.exists():
        paths.write(path, json.dumps(settings, indent=1, ensure_ascii=False))
    elif other := [k for k, v in json.loads(path.read_text("utf-8")).items() if settings.get(k) != v]:
        said = ", ".join(other)
        raise UserError(f"{out} was begun with another {said}; give the same, name another --out, or delete "
                        f"{path} to continue with these")


def _answerer(target: str, max_new: int, temperature: float, seed: int, dtype: str, batch: int,
              out: Path | None = None):
    """Return a function from texts (at most `batch`) to the target's answers. Raises UserError if `out` was
    begun with other settings."""
    if out:
        _check_settings(out, target, max_new=max_new, temperature=temperature, seed=seed, dtype=dtype)
    hardware.announce(dtype)
    _, cfg, base, tok = sharded_load.open_target(target, dtype)
    eos = tuple(tok_lib.eos_ids(tok))
    chat_prompts.stop_thinking(tok)
    # A draft may have the closing tag, so an answer that may have a draft does not stop there.
    stop = () if chat_prompts.thinks(tok) else tok_lib.inner_ids(tok, prompts.CLOSE.strip())
    write = make_answer(
        base, cfg, tok, max_new=max_new, batch=batch, eos=eos, dtype=dtype,
        temperature=temperature, stop=stop)

    def answer(texts: list[Text]) -> list[str]:
        rows = [chat_prompts.chat_ids(tok, explanations.instruction(d.text[a:b])) for d, a, b in texts]
        longest = max(map(len, rows))
        if longest + max_new > cfg.max_position:
            raise UserError(f"a prompt of {longest} tokens and an answer of {max_new} do not fit the "
                            f"{cfg.max_position} positions of {target}: ask for shorter texts")
        places = np.array([keyed_hash(d.doc_id, a, b) % 2**32 for d, a, b in texts], np.uint32)
        return write(rows, jax.vmap(functools.partial(jax.random.fold_in, new_key(seed)))(places))

    return answer


def _append_answers(texts: list[Text], new: list[bool], answers: list[str], out: Path, dropped: Path) -> None:
    """Append the answers about new texts: usable ones to `out`, others to `dropped`."""
    number = sum(1 for _ in _read(out))
    kept, rest = [], []
    for (doc, a, b), fresh, answer in zip(texts, new, answers, strict=True):
        explanation, _ = explanations.parse_explanation(answer)
        if not fresh:
            continue
        if explanation is None:
            rest.append(explanations.record_of(-1, doc, a, b, answer))
        else:
            kept.append(explanations.record_of(number + len(kept), doc, a, b, explanation))
    for path, records in ((out, kept), (dropped, rest)):
        if records:
            explanations.append(path, records)


def _count(texts: list[Text], out: Path, dropped: Path) -> dict:
    asked = {(d.doc_id, a, b) for d, a, b in texts}
    reasons = collections.Counter(explanations.parse_explanation(r.explanation)[1]
                                  for r in _read(dropped) if _place(r) in asked)
    kept = sum(_place(r) in asked for r in _read(out))
    return {"texts": len(texts), "kept": kept, "dropped": dict(sorted(reasons.items()))}


def _place(r: explanations.Record) -> tuple[str, int, int]:
    return r.doc_id, r.start, r.end


def _read(path: Path):
    return explanations.read(path) if path.exists() else ()
