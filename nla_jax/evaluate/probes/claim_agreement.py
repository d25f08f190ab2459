"""Compare a language model's judgements of claims (`words.claim_judge`) with those of the rules."""

import collections
from collections.abc import Sequence

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.words import claims as C
from nla_jax.evaluate.words.claim_judge import Item


def judged_figures(ev: Evidence, split: Sequence[Sequence[C.Claim]], true: Sequence[np.ndarray],
                   label: str = "") -> list[Figure]:
    """Return the precision of claims by a judge, and how far the judge and the rules agree.

    split, true: of each row its claims, and whether each is true by the rules. Rows without a judgement are
    left out of all figures but the first, and a line of `ev.left_out` says how many there are, and why.
    """
    asked = [i for i, row in enumerate(split) if row]
    items = [Item(ev.columns["text"][i], ev.trip.explanations[i], split[i]) for i in asked]
    found = dict(zip(asked, ev.judge(ev.runner, items, label and f"{label} judge"), strict=True))
    rows = [i for i in asked if not isinstance(found[i], str)]
    is_judged = [float(i in set(rows)) for i in asked]
    out = [ev.mean("claims_judged", is_judged, "share of explanations whose claims the judge judged",
                   rows=asked)]
    if missing := collections.Counter(found[i] for i in asked if isinstance(found[i], str)):
        why = ", ".join(f"{reason}: {n}" for reason, n in missing.most_common())
        ev.left_out.append(f"judge: {sum(missing.values())} of {len(asked)} explanations have no judgement "
                           f"({why}); figures of the judge are of the other {len(rows)}")
    kinds = [np.array([c.kind for c in split[i]]) for i in rows]
    yes, rule = [found[i] for i in rows], [true[i] for i in rows]
    parts = {"": lambda k: k != "", "_description": lambda k: k != "ending",
             **{f"_{kind}": lambda k, kind=kind: k == kind for kind in C.KINDS}}
    for part, of in parts.items():
        pick = [of(k) for k in kinds]
        n_N = np.array([p.sum() for p in pick])
        if not n_N.any():
            continue
        about = "claims" if not part else f"claims: {part[1:]}"
        count = lambda f, pick=pick: [f(y[p], r[p]) for y, r, p in zip(yes, rule, pick, strict=True)]
        share = lambda name, f, asks, n_N=n_N, count=count, part=part: ev.ratio(
            f"{name}{part}", count(f), n_N, asks, rows=rows)
        out += [
            share("claim_precision_judge", lambda y, r: y.sum(), f"share of {about}; true to the judge"),
            share("claim_precision_rules", lambda y, r: r.sum(), "the same by the rules, on the same claims"),
            share("claims_agree", lambda y, r: (y == r).sum(), "share on which judge and rules agree"),
        ]
        four = lambda y, r: [(a & b).sum() for a, b in ((y, r), (~y, r), (y, ~r), (~y, ~r))]
        out += _kappa_figure(ev, f"claims_kappa{part}", np.array(count(four)), rows)
    return out


def kappa(cells_4) -> np.ndarray:
    """Return Cohen's kappa of counts [..., 4]: both true, rules only, judge only, neither. It is the share of
    agreement above chance. NaN if both always say the same."""
    both, rule, judge, neither = np.moveaxis(np.asarray(cells_4, float), -1, 0)
    n = both + rule + judge + neither
    chance = ((both + rule) * (both + judge) + (judge + neither) * (rule + neither)) / n**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((both + neither) / n - chance) / (1 - chance)


def _kappa_figure(ev: Evidence, name: str, cells_N4, rows) -> list[Figure]:
    """Return kappa with its bootstrap interval over documents; nothing if it is not defined."""
    value = float(kappa(cells_N4.sum(0)))
    if not np.isfinite(value):
        return []
    docs, doc_N = np.unique([ev.columns["doc_id"][i] for i in rows], return_inverse=True)
    of_doc_M4 = np.zeros((len(docs), 4))
    np.add.at(of_doc_M4, doc_N, cells_N4)
    low = high = None
    if ev.bootstrap and np.count_nonzero(of_doc_M4.sum(1)) >= F.FEWEST:
        pick = np.random.default_rng(ev.seed).integers(0, len(docs), (ev.bootstrap, len(docs)))
        low, high = map(float, np.nanpercentile(kappa(of_doc_M4[pick].sum(1)), [2.5, 97.5]))
    return [Figure(name, value, low, high, int(np.count_nonzero(cells_N4.sum(1))),
                   "their agreement above chance (Cohen's kappa): 0 none, 1 full")]
