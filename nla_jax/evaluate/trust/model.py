"""Fit and apply the trust model: features of a claim -> the probability that it is true, by `words.claims`.

It is a logistic regression. Each kind of claim has its own intercept and its own additions to the weights.
There are two: one with and one without the features that need the tokens around (`features.NEAR`).
"""

import dataclasses
import json

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate.trust.features import FEATURES, NEAR, Claims
from nla_jax.evaluate.words.claims import KINDS

STRENGTH = 0.05  # of the data against the L2 penalty: scikit-learn's C
FEWEST = 50  # claims of either label, below which nothing is fitted


@dataclasses.dataclass(frozen=True)
class Weights:
    """A logistic regression. names: its features, with center and scale. weights: of `_design`'s columns."""

    names: tuple[str, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float


@dataclasses.dataclass(frozen=True)
class Trust:
    """The trust model of one NLA. near: with the tokens around. alone: for a single activation.

    fitted: what it was fitted on (numbers of documents and claims, share of true claims).
    """

    near: Weights
    alone: Weights
    fitted: dict

    def as_json(self) -> dict:
        """Return JSON values, for the sidecar of a bundle."""
        return dataclasses.asdict(self)


def read_trust(path) -> Trust | None:
    """Read the file that `nla trust` writes; None if there is none. Raises UserError for a damaged one."""
    if not path.is_file():
        return None
    try:
        return of_json(json.loads(path.read_text("utf-8")))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e}); delete it, or fit it again with `nla trust`") from e


def of_json(value: dict) -> Trust:
    """Read `Trust.as_json`. Raises UserError if it is of another version of the features."""
    try:
        sides = {
            k: Weights(**{f: tuple(v) if isinstance(v, list) else v for f, v in value[k].items()})
            for k in ("near", "alone")
        }
        known = all(set(w.names) <= FEATURES.keys() for w in sides.values())
        sizes = all(len(w.weights) == _width(len(w.names)) for w in sides.values())
    except (KeyError, TypeError) as e:
        raise UserError(
            f"the trust model of this bundle is damaged ({e}); fit it again with `nla trust`"
        ) from e
    if not known or not sizes:
        raise UserError("the trust model of this bundle is of another version; fit it again with `nla trust`")
    return Trust(**sides, fitted=value.get("fitted", {}))


def fit_trust(claims: Claims, true_C, docs_C) -> Trust:
    """Fit both models to claims with labels. docs_C: the document of each claim, which is counted.

    Raises UserError if there are fewer than FEWEST true or false claims.
    """
    true = np.asarray(true_C, bool)
    if min(true.sum(), (~true).sum()) < FEWEST:
        raise UserError(
            f"the trust model needs {FEWEST} true and {FEWEST} false claims; there are {true.sum()} "
            f"and {(~true).sum()}: give more rows"
        )
    kinds = [c.kind for c in claims.claims]
    both = {}
    for side, names in (("near", tuple(FEATURES)), ("alone", tuple(n for n in FEATURES if n not in NEAR))):
        x = claims.x_CF[:, [list(FEATURES).index(n) for n in names]]
        usable = np.isfinite(x).all(1)
        both[side] = _fit(
            names, x[usable], [k for k, u in zip(kinds, usable, strict=True) if u], true[usable]
        )
    fitted = {"documents": len(set(docs_C)), "claims": len(true), "true": round(float(true.mean()), 4)}
    return Trust(**both, fitted=fitted)


def _fit(names, x_CF, kinds, true_C) -> Weights:
    from sklearn.linear_model import LogisticRegression

    center, scale = x_CF.mean(0), np.maximum(x_CF.std(0), 1e-6)
    found = LogisticRegression(C=STRENGTH, max_iter=2000).fit(_design(x_CF, kinds, center, scale), true_C)
    plain = lambda a: tuple(float(v) for v in a)
    return Weights(names, plain(center), plain(scale), plain(found.coef_[0]), float(found.intercept_[0]))


def _width(n_features: int) -> int:
    return (n_features + 1) * len(KINDS) + n_features


def _design(x_CF, kinds, center, scale) -> np.ndarray:
    """Return the standardised features, limited to ±4, one column a kind, and the features of each kind."""
    z = np.clip((x_CF - np.asarray(center)) / np.asarray(scale), -4.0, 4.0)
    kind_CK = np.array([[k == name for name in KINDS] for k in kinds], float).reshape(-1, len(KINDS))
    within = (kind_CK[:, :, None] * z[:, None, :]).reshape(len(z), -1)
    return np.concatenate([z, kind_CK, within], 1)


def trust_of(trust: Trust, claims: Claims) -> np.ndarray:
    """Return the probability [C] that each claim is true. `alone` serves claims without tokens around."""
    kinds, out = [c.kind for c in claims.claims], np.zeros(len(claims.claims))
    if not len(out):
        return out
    has_near = np.isfinite(claims.x_CF).all(1)
    for w, use in ((trust.near, has_near), (trust.alone, ~has_near)):
        x = claims.x_CF[:, [list(FEATURES).index(n) for n in w.names]]
        logit = _design(np.nan_to_num(x), kinds, w.center, w.scale) @ np.array(w.weights) + w.bias
        out = np.where(use, 1.0 / (1.0 + np.exp(-logit)), out)
    return out
