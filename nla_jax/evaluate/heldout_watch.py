"""Measure the figures of the grounding table that are cheap enough to log during training."""

from collections.abc import Callable

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import rows_of_other_documents
from nla_jax.evaluate.probes.endings import BACK, last_word
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.words import edits


def make_watch(runner: Runner, columns: dict, n: int, key, *, temperature: float, max_new: int) -> Callable:
    """Return a function (av, ar) -> {"heldout_fve": float, ...} on the first n rows of a store split.

    It measures FVE through text, and FVE with another document's explanation, with shuffled words, of the
    quotes alone and of the prose alone. FVE by the frozen target needs `runner.base`. It also measures the
    share of readable explanations. If every row has its text, it measures the shares that end on the text's
    last word, last 2 and last 3 words. The key is the same each time, so only the NLA changes.
    """
    h, docs, sources = columns["h"][:n], columns["doc_id"][:n], columns["text"][:n]
    variance = F.variances(h)

    def watch(av, ar) -> dict[str, float]:
        now = runner.with_trees(av=av, ar=ar)
        texts = now.explain(h, key, temperature=temperature, max_new=max_new)
        ok = np.array([bool(t) for t in texts])
        other = rows_of_other_documents(docs)
        read = {"": texts, "_words_shuffled": [edits.shuffle_words(t) for t in texts],
                "_quotes_only": [edits.keep_quotes(t) for t in texts],
                "_prose_only": [edits.remove_quotes(t) for t in texts]}
        h_hat = {name: now.reconstruct(edited) for name, edited in read.items()}
        out = {f"heldout_fve{name}": F.fve(F.errors(x, h, ok), variance) for name, x in h_hat.items()}
        out["heldout_fve_shuffled"] = F.fve(F.errors(h_hat[""][other], h, ok[other]), variance)
        if runner.base:
            out["heldout_fve_frozen_target"] = F.fve(F.errors(now.read_frozen(texts), h, ok), variance)
        if all(sources):
            out["heldout_last_word"] = float(last_word(texts, sources).mean())
            for n in BACK:
                out[f"heldout_last_words_back_{n}"] = float(last_word(texts, sources, n).mean())
        return out | {"heldout_ok": float(ok.mean())}

    return watch
