"""Measure a trust model on claims that it was not fitted on: ranking, calibration, precision by coverage."""

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.trust.features import FEATURES, Claims
from nla_jax.evaluate.words.claims import KINDS

BINS = 10
RESAMPLES = 500
SHARES = (0.05, *(i / 10 for i in range(1, 11)))  # of claims that are kept


def auroc(p_C, true_C) -> float:
    """Return the probability that a true claim is trusted more than a false one; ties count half."""
    from scipy.stats import rankdata

    true = np.asarray(true_C, bool)
    n, m = true.sum(), (~true).sum()
    return float((rankdata(p_C)[true].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def precision_at(p_C, true_C, share: float) -> float:
    """Return the share of true claims among the `share` of claims with the highest trust."""
    order = np.argsort(-np.asarray(p_C), kind="stable")
    return float(np.asarray(true_C, float)[order[: max(1, round(share * len(order)))]].mean())


def calibration_error(p_C, true_C) -> float:
    """Return the mean distance of trust from the share of true claims over BINS bins of equal size (ECE)."""
    order = np.argsort(p_C, kind="stable")
    parts = np.array_split(order, BINS)
    p, true = np.asarray(p_C), np.asarray(true_C, float)
    return float(sum(len(i) * abs(p[i].mean() - true[i].mean()) for i in parts if len(i)) / len(p))


def curve(p_C, true_C, docs_C) -> list[dict]:
    """Return for BINS bins of equal size the mean trust, the share of true claims, the number of claims.

    low, high: the 95 % bootstrap interval of the share over documents, None if they are too few.
    """
    p, true, docs = np.asarray(p_C), np.asarray(true_C, float), np.asarray(docs_C)
    parts = np.array_split(np.argsort(p, kind="stable"), BINS)
    out = []
    for i in parts:
        if len(i):
            low, high = F.ratio_interval(true[i], np.ones(len(i)), docs[i], n=RESAMPLES)
            out.append({"trust": float(p[i].mean()), "true": float(true[i].mean()), "claims": len(i),
                        "low": low, "high": high})
    return out


def coverage(p_C, true_C, docs_C, seed: int = 0) -> list[dict]:
    """Return the precision of the most trusted share of claims for each share of SHARES, with intervals."""
    p, true, docs = np.asarray(p_C), np.asarray(true_C, bool), np.asarray(docs_C)
    out = []
    for share in SHARES:
        low, high = _interval(lambda p, true, s=share: precision_at(p, true, s), p, true, docs, seed)
        out.append({"coverage": share, "precision": precision_at(p, true, share), "low": low, "high": high})
    return out


def trust_figures(p_C, true_C, kinds, docs_C, *, seed: int = 0) -> list[Figure]:
    """Return AUROC, over all claims and within each kind, calibration error, and precision by coverage.

    Intervals are 95 % bootstrap intervals over documents.
    """
    p, true = np.asarray(p_C), np.asarray(true_C, bool)
    kinds, docs = np.asarray(kinds), np.asarray(docs_C)
    every = np.ones(len(p), bool)
    at = lambda share: lambda p, true: precision_at(p, true, share)
    gain = lambda p, true: precision_at(p, true, 0.5) / max(precision_at(p, true, 1.0), 1e-9)
    asked = [
        ("auroc", auroc, every, "a true claim is trusted more than a false one (chance .5)",
         "published without the source: .665"),
        ("auroc_description", auroc, kinds != "ending", "the same outside the ending line", ""),
        *((f"auroc_{k}", auroc, kinds == k, f"the same within claims of the kind {k}", "") for k in KINDS),
        ("calibration_error", calibration_error, every,
         "mean distance of trust from the share of true claims", ""),
        ("precision_all", at(1.0), every, "share of true claims, if all are kept", ""),
        ("precision_half", at(0.5), every, "the same of the half that is trusted most",
         "published, by a filter: .40 to .56"),
        ("gain_half", gain, every, "the ratio of the two; at most the inverse of the former, or 2", ""),
        ("precision_all_description", at(1.0), kinds != "ending", "all that are outside the ending line", ""),
        ("precision_half_description", at(0.5), kinds != "ending",
         "the half of these that is trusted most", ""),
    ]
    out = []
    for name, measure, which, asks, reference in asked:
        if which.any() and np.isfinite(value := measure(p[which], true[which])):
            low, high = _interval(measure, p[which], true[which], docs[which], seed)
            out.append(Figure(f"trust_{name}", value, low, high, int(which.sum()), asks, reference))
    return out


def feature_figures(claims: Claims, true_C, docs_C) -> list[Figure]:
    """Return the AUROC of each feature alone, with its better sign, over claims that have it."""
    out = []
    for j, name in enumerate(FEATURES):
        x, true = claims.x_CF[:, j], np.asarray(true_C, bool)
        has = np.isfinite(x)
        value = auroc(x[has], true[has])
        if np.isfinite(value):
            low, high = _interval(auroc, x[has], true[has], np.asarray(docs_C)[has], 0)
            if value < 0.5:
                value = 1 - value
                low, high = (None, None) if low is None else (1 - high, 1 - low)
            asks = f"one feature alone: {FEATURES[name]}"
            out.append(Figure(f"auroc_{name}", value, low, high, int(has.sum()), asks))
    return out


def _interval(measure, p, true, docs, seed):
    _, doc = np.unique(docs, return_inverse=True)
    rows = [np.flatnonzero(doc == i) for i in range(doc.max() + 1)]
    if len(rows) < F.FEWEST:
        return None, None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        pick = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        found.append(measure(p[pick], true[pick]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
