"""Measure how many claims of an explanation are true of its source text.

Rules judge them (`words.claims`), and a language model where one is given (`claim_agreement`).
"""

import numpy as np

from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.evaluate.probes.claim_agreement import judged_figures
from nla_jax.evaluate.words import claims as C
from nla_jax.evaluate.written_explanations import written

ABOUT = {
    "ending": "words of the ending line that the text has in the same place",
    "quote": "quotations that are in the text",
    "name": "names that are in the text",
    "number": "numbers that are in the text",
    "word": "content words that the text has in some form, or has a synonym of",
}


def claims(ev: Evidence, label: str = "") -> list[Figure]:
    """Return the precision of claims, by kind, of another document's claims and of written explanations."""
    if not ev.has_texts():
        ev.left_out.append("claims: the data has no texts to compare with")
        return []
    split, texts = [C.split_claims(z) for z in ev.trip.explanations], ev.columns["text"]
    true = [C.judge_claims(c, t) for c, t in zip(split, texts, strict=True)]
    n_N = np.array([len(c) for c in split])
    if not n_N.any():
        ev.left_out.append("claims: no explanation has a claim")
        return []
    said_N = [np.array([c.kind != "ending" for c in row], bool) for row in split]
    true_N = np.array([t.sum() for t in true])
    other = rows_of_other_documents(ev.columns["doc_id"])
    chance = [C.judge_claims(c, texts[i]) for c, i in zip(split, other, strict=True)]
    count = lambda judged, which: np.array([(t & w).sum() for t, w in zip(judged, which, strict=True)])
    out = [
        ev.ratio(
            "claim_precision",
            true_N,
            n_N,
            "share of claims that are true of the text, by rules",
            reference="published: .21 by an LLM judge, before and after RL",
        ),
        ev.ratio("claim_precision_shuffled", [c.sum() for c in chance], n_N,
                 "the same against another document's text"),
        ev.mean("claims_accurate", true_N, "true claims of an explanation"),
        ev.mean("claims_fabricated", n_N - true_N, "false claims of an explanation"),
    ]
    described_N = np.array([w.sum() for w in said_N])
    if described_N.any():
        out += [
            ev.ratio("description_precision", count(true, said_N), described_N,
                     "share of claims outside the ending line that are true, by rules"),
            ev.ratio("description_precision_shuffled", count(chance, said_N), described_N,
                     "the same against another document's text"),
        ]
    for kind in C.KINDS:
        is_kind = [np.array([c.kind == kind for c in row], bool) for row in split]
        of_kind_N = np.array([k.sum() for k in is_kind])
        if of_kind_N.any():
            hit_N = np.array([(k & t).sum() for k, t in zip(is_kind, true, strict=True)])
            out.append(ev.ratio(f"claim_precision_{kind}", hit_N, of_kind_N, f"share of {ABOUT[kind]}"))
    judged = judged_figures(ev, split, true, label) if ev.judge else []
    return out + judged + _written(ev)


def _written(ev: Evidence) -> list[Figure]:
    """Return the precision of an LLM's claims: the scale, because the rules judge some true claims false."""
    rows, words = written(ev)
    split = [[c for c in C.split_claims(z) if c.kind != "ending"] for z in words]
    if not any(split):
        return []
    true = [C.judge_claims(c, ev.columns["text"][i]).sum() for c, i in zip(split, rows, strict=True)]
    asks = "the same of explanations by an LLM that had the text: the most that these rules find"
    return [ev.ratio("description_precision_written", true, [len(c) for c in split], asks, rows=rows)]
