"""Measure a trust model on claims that it was not fitted on: ranking, calibration, precision by coverage."""

import numpy as np

from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.trust.features import FEATURES, Claims
from nla_jax.evaluate.words.claims import KINDS

BINS = 10
RESAMPLES = 500


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


def curve(p_C, true_C) -> list[dict]:
    """Return for BINS bins of equal size the mean trust, the share of true claims, the number of claims."""
    p, true = np.asarray(p_C), np.asarray(true_C, float)
    parts = np.array_split(np.argsort(p, kind="stable"), BINS)
    return [
        {"trust": float(p[i].mean()), "true": float(true[i].mean()), "claims": len(i)}
        for i in parts
        if len(i)
    ]


def trust_figures(p_C, true_C, kinds, docs_C, *, seed: int = 0) -> list[Figure]:
    """Return AUROC, over all claims and within each kind, calibration error, and precision by coverage.

    Intervals are 95 % bootstrap intervals over documents.
    """
    p, true, kinds = np.asarray(p_C), np.asarray(true_C, bool), np.asarray(kinds)
    wanted = [
        (
            "trust_auroc",
            auroc,
            slice(None),
            "a true claim is trusted more than a false one (chance .5)",
            "published without the source: .665",
        ),
        *(
            (
                f"trust_auroc_{k}",
                auroc,
                np.flatnonzero(kinds == k),
                f"the same within claims of the kind {k}",
                "",
            )
            for k in KINDS
        ),
        (
            "trust_calibration_error",
            calibration_error,
            slice(None),
            "mean distance of trust from the share of true claims",
            "",
        ),
        (
            "trust_precision_all",
            lambda p, t: precision_at(p, t, 1.0),
            slice(None),
            "share of true claims, all kept",
            "",
        ),
        (
            "trust_precision_half",
            lambda p, t: precision_at(p, t, 0.5),
            slice(None),
            "the same of the half that is trusted most",
            "published filter: .40 to .56 at about half",
        ),
        (
            "trust_gain_half",
            lambda p, t: precision_at(p, t, 0.5) / max(precision_at(p, t, 1.0), 1e-9),
            slice(None),
            "the ratio of the two",
            "",
        ),
    ]
    docs = np.asarray(docs_C)
    out = []
    for name, measure, which, asks, reference in wanted:
        a, b, d = p[which], true[which], docs[which]
        if not len(a) or not np.isfinite(value := measure(a, b)):
            continue
        low, high = _interval(measure, a, b, d, seed)
        out.append(Figure(name, value, low, high, len(a), asks, reference))
    return out


def feature_figures(claims: Claims, true_C, docs_C) -> list[Figure]:
    """Return the AUROC of each feature alone, with its better sign, over claims that have it."""
    out = []
    for j, name in enumerate(FEATURES):
        x, true = claims.x_CF[:, j], np.asarray(true_C, bool)
        has = np.isfinite(x)
        value = auroc(x[has], true[has])
        if np.isfinite(value):
            low, high = _interval(lambda p, t: auroc(p, t), x[has], true[has], np.asarray(docs_C)[has], 0)
            if value < 0.5:
                value, low, high = (
                    1 - value,
                    None if high is None else 1 - high,
                    None if low is None else 1 - low,
                )
            out.append(
                Figure(
                    f"auroc_{name}", value, low, high, int(has.sum()), f"one feature alone: {FEATURES[name]}"
                )
            )
    return out


def _interval(measure, p, true, docs, seed):
    _, doc = np.unique(docs, return_inverse=True)
    rows = [np.flatnonzero(doc == i) for i in range(doc.max() + 1)]
    if len(rows) < 4:
        return None, None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        pick = np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))])
        found.append(measure(p[pick], true[pick]))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
