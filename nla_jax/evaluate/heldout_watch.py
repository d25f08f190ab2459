"""Measure figures of the grounding table that are cheap enough to log during training: the drift curve."""

import sys
from collections.abc import Callable

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import rows_of_other_documents
from nla_jax.evaluate.probes import language
from nla_jax.evaluate.probes.endings import BACK, last_word
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.words import claims, edits, wordnet
from nla_jax.lm import tokenizer as tok_lib

PLACES = (0, 3, 6, 9, 12)  # tokens before the end of one text, among which an explanation's own is sought


def make_watch(runner: Runner, columns: dict, n: int, key, *, temperature: float, max_new: int,
               warm_ar: dict | None = None) -> Callable:
    """Return a function (av, ar) -> {"heldout_fve": float, ...} on the first n rows of a store split.

    It measures FVE through text and the share of readable explanations. FVE is also measured with another
    document's explanation, with shuffled words, of the quotes alone and of the prose alone. The key is the
    same each time, so only the NLA changes. Further figures need something more:

      warm_ar (an AR tree): FVE by the warm start's AR.
      `runner.base`: FVE by the frozen target. If it is the whole target: log-probability of the English.
      Texts on every row: the shares that end on the text's last word, last 2 and last 3 words. With
        `runner.base`, also how often ĥ is nearest to its own activation among those of PLACES.
      Texts and WordNet: the precision of claims, and FVE of a paraphrase.
    """
    h, docs, sources = columns["h"][:n], columns["doc_id"][:n], columns["text"][:n]
    variance, known = F.variances(h), all(sources)
    has_words = known and _has_wordnet()
    near = near_activations(runner, sources) if known and runner.base else None

    def watch(av, ar) -> dict[str, float]:
        now = runner.with_trees(av=av, ar=ar)
        texts = now.explain(h, key, temperature=temperature, max_new=max_new)
        ok = np.array([bool(t) for t in texts])
        other = rows_of_other_documents(docs)
        fve_of = lambda h_hat, ok=ok: F.fve(F.errors(h_hat, h, ok), variance)
        read = {"": texts, "_words_shuffled": [edits.shuffle_words(t) for t in texts],
                "_quotes_only": [edits.keep_quotes(t) for t in texts],
                "_prose_only": [edits.remove_quotes(t) for t in texts]}
        if has_words:
            read["_paraphrase"] = [wordnet.paraphrase(t) for t in texts]
        h_hat = {name: now.reconstruct(edited) for name, edited in read.items()}
        out = {f"heldout_fve{name}": fve_of(x) for name, x in h_hat.items()}
        out["heldout_fve_shuffled"] = fve_of(h_hat[""][other], ok[other])
        if warm_ar is not None:
            out["heldout_fve_warm_ar"] = fve_of(runner.with_trees(ar=warm_ar).reconstruct(texts))
        if runner.base:
            out["heldout_fve_frozen_target"] = fve_of(now.read_frozen(texts))
        if "final_norm" in runner.base and ok.any():
            logp, count = language.plain_logp(runner, [t for t in texts if t], "")
            out["heldout_logp_target"] = float(logp.sum() / max(count.sum(), 1))
        if known:
            out["heldout_last_word"] = float(last_word(texts, sources).mean())
            for k in BACK:
                out[f"heldout_last_words_back_{k}"] = float(last_word(texts, sources, k).mean())
        if near is not None and len(near[0]):
            out["heldout_same_document"] = float(is_nearest(h_hat[""], ok, *near).mean())
        if has_words:
            out |= _precision(texts, sources)
        return out | {"heldout_ok": float(ok.mean())}

    return watch


def _has_wordnet() -> bool:
    try:
        wordnet.wordnet()
    except UserError as e:
        print(f"the held-out figures leave out claims and paraphrases: {e}", file=sys.stderr)
        return False
    return True


def near_activations(runner: Runner, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows whose text has enough tokens, h [rows, len(PLACES), D] at PLACES of each)."""
    rows = [i for i, t in enumerate(texts) if len(tok_lib.plain_ids(runner.tok, t)) > PLACES[-1]]
    if not rows:
        return np.zeros(0, int), np.zeros((0, len(PLACES), runner.spec.lm.d_model))
    return np.array(rows), capture_texts.capture_last(runner, [texts[i] for i in rows], back=PLACES)


def is_nearest(h_hat_ND, ok_N, rows, h_RPD) -> np.ndarray:
    """Return whether ĥ is nearest to the activation it is from, of len(PLACES) of one text: bool [R].

    It is not if the answer has failed. rows, h_RPD: of `near_activations`."""
    n, p, d = h_RPD.shape
    error = F.errors(np.repeat(h_hat_ND[rows], p, 0), h_RPD.reshape(n * p, d)).reshape(n, p)
    return (error.argmin(1) == 0) & ok_N[rows]


def _precision(texts: list[str], sources: list[str]) -> dict[str, float]:
    """Return the share of true claims by rules: of all, and of those outside the ending line."""
    split = [claims.split_claims(t) for t in texts]
    true = [claims.judge_claims(c, s) for c, s in zip(split, sources, strict=True)]
    out = {}
    for name, kinds in (("claim", set(claims.KINDS)), ("description", set(claims.KINDS) - {"ending"})):
        found = [ok for row, judged in zip(split, true, strict=True)
                 for c, ok in zip(row, judged, strict=True) if c.kind in kinds]
        out[f"heldout_{name}_precision"] = float(np.mean(found)) if found else 0.0
    return out
