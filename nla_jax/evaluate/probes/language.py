"""Measure whether explanations are still English, and whether AV copies training texts.

The figures are log-probabilities under models that were not trained jointly, the vocabulary, and the share
of words in passages copied from training texts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import objectives
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.written_explanations import written
from nla_jax.lm.model import embed, forward
from nla_jax.lm.tokenizer import all_plain_ids
from nla_jax.rl import roles
from nla_jax.training import feeds
from nla_jax.util.batching import map_rows, pad_rows

RUN = 12  # words in a row; two texts do not share so many by chance


def language(ev: Evidence, label: str = "") -> list[Figure]:
    """Return log-probabilities per token (nats), the vocabulary, and the share of copied words."""
    texts, cols = ev.trip.explanations, ev.columns
    said = [i for i, t in enumerate(texts) if t]
    known, learned = written(ev)
    if not said:
        return []
    out = []
    for name, rows, words, asks in [
        ("logp_target", said, [texts[i] for i in said],
         "nats a token: the explanation under the target that reads it as text"),
        ("logp_target_written", known, learned, "the same of explanations an LLM wrote"),
    ]:
        if len(rows):
            logp, n = plain_logp(ev.runner, words, label and f"{label} {name}")
            out.append(ev.ratio(name, logp, n, asks, rows=rows))
    if ev.warm is not None:
        logp, n = answer_logp(ev.warm, cols["h"][said], [texts[i] for i in said], label)
        own, m = answer_logp(ev.runner, cols["h"][said], [texts[i] for i in said], label)
        out += [
            ev.ratio("logp_warm_av", logp, n, "nats a token: the answer under the warm-start AV, given h",
                     rows=said),
            ev.ratio("logp_own_av", own, m, "the same under the AV that wrote it: the gap is its drift",
                     rows=said),
        ]
    bags = [_words(t) for t in texts]
    different = float(len(set().union(*bags)))
    out.append(Figure("vocabulary", different, None, None, len(texts), "different words in all explanations"))
    if ev.train is not None:
        runs = _runs([*ev.train["text"], *written(ev, train=True)[1]])
        copied = [_count_copied(bag, runs) for bag in bags]
        out.append(ev.ratio("copied", copied, [len(b) for b in bags],
                            f"share of words in runs of {RUN} that occur in a training text"))
    return out


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _runs(texts) -> set[int]:
    out = set()
    for text in set(texts):
        words = _words(text)
        out |= {hash(tuple(words[i : i + RUN])) for i in range(len(words) - RUN + 1)}
    return out


def _count_copied(words: list[str], known: set[int]) -> int:
    """Return how many words are inside a run of RUN words that is in `known`."""
    inside = np.zeros(len(words), bool)
    for i in range(len(words) - RUN + 1):
        if hash(tuple(words[i : i + RUN])) in known:
            inside[i : i + RUN] = True
    return int(inside.sum())


@functools.partial(jax.jit, static_argnames="spec")
def _score_text(base, ids_BT, valid_BT, spec):
    x, _ = forward(base, spec.lm, embed(base, spec.lm, ids_BT[:, :-1]), valid_BT[:, :-1])
    logp, _, _ = objectives.token_scores(base, spec.lm, x.reshape(-1, x.shape[-1]),
                                         ids_BT[:, 1:].reshape(-1), chunk=spec.vocab_chunk,
                                         stats=False)
    mask = valid_BT[:, 1:]
    return jnp.sum(logp.reshape(mask.shape) * mask, 1), mask.sum(1)


@functools.partial(jax.jit, static_argnames="spec")
def _score_answer(av, base, h_BD, ids_BT, mask_BT, spec):
    return jnp.sum(roles.answer_logp(av, base, spec, h_BD, ids_BT) * mask_BT, 1), mask_BT.sum(1)


def plain_logp(runner: Runner, texts: list[str], label: str):
    """Return (sum of log-probabilities, number of scored tokens) of each text under the target.

    The first token of a prompt is not scored."""
    ids = [[*runner.spec.lead, *words] for words in all_plain_ids(runner.tok, texts)]
    ids, valid, _ = pad_rows(ids, runner.spec.av.pad)
    score = functools.partial(_score_text, runner.base, spec=runner.spec)
    return _sums(map_rows(score, (ids, valid), runner.batch, label))


def answer_logp(runner: Runner, h_ND, texts: list[str], label: str):
    """Return (sum of log-probabilities in nats, number of tokens), [N] each, of answers under AV given h.

    The answers include the tags."""
    rows = feeds.response_rows(runner.tok, runner.spec.av, texts)
    ids, mask, _ = pad_rows(rows, runner.spec.av.pad)
    score = functools.partial(_score_answer, runner.av, runner.base, spec=runner.spec)
    arrays = (np.asarray(h_ND, np.float32), ids, mask)
    return _sums(map_rows(score, arrays, runner.batch, label and f"{label} answers"))


def _sums(found):
    return [a.astype(np.float64) for a in found]
