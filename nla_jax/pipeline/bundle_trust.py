"""Fit the trust model of a bundle on held-out documents, and measure it on others: `nla trust`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nla_jax import api, bundle
from nla_jax.data import store
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.trust import apply, features, measure, model, stretch
from nla_jax.evaluate.words import claims, wordnet
from nla_jax.pipeline import grounding
from nla_jax.util import paths


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures of a trust model on one split, and its calibration curve (`measure.curve`)."""

    figures: list[Figure]
    curve: list[dict]

    def as_json(self) -> dict:
        """Return the figures and the curve as JSON values."""
        return {"figures": [dataclasses.asdict(f) for f in self.figures], "curve": self.curve}


def fit_bundle(
    directory: str | Path,
    *,
    data: str | Path = "",
    splits: Sequence[str] = ("heldout",),
    rows: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    target: str | None = None,
    batch: int = 64,
    dtype: str = "",
) -> tuple[model.Trust, dict[str, Measured]]:
    """Fit a bundle's trust model, write it into the bundle, and measure it: (model, split -> figures).

    Half of the held-out documents, by a hash of their ids, fit the model. The other half and the other
    splits measure it. AV and AR saw none of these documents.

    Args: those of `grounding.evaluate_bundle`. rows: texts of each split, at most; 0: all.

    Raises UserError as `grounding.evaluate_bundle` and `model.fit_trust`.
    """
    directory = paths.absolute(directory)
    meta = bundle.read_sidecar(directory)
    if "heldout" not in splits:
        raise UserError("trust is fitted on the split heldout: add it to --splits")
    data, _, _ = grounding.open_store(directory, meta, data, splits, 0, target)
    wordnet.wordnet()
    nla = api.load(directory, target, batch, dtype=dtype)
    mean = apply.mean_or_zero(nla.mean_direction, nla.spec.lm.d_model)
    found, out = {}, {}
    for split in splits:
        columns = store.load_columns(data, split)
        if not all(columns["text"]):
            raise UserError(f"{data}: split {split} has rows without a text, to which claims are compared")
        seen = stretch.explain_stretches(
            nla.runner,
            columns,
            rows=rows or len(columns["h"]),
            seed=seed,
            temperature=temperature,
            max_new=meta["max_new_tokens"],
            label=split,
        )
        found[split] = labelled(nla.runner, mean, seen, split)
    fits = np.array([keyed_hash("trust", seed, d) % 2 == 0 for d in found["heldout"][2]])
    trust = model.fit_trust(*_rows(found["heldout"], fits))
    found["heldout"] = _rows(found["heldout"], ~fits)
    for split, (of_split, true_C, docs_C) in found.items():
        p_C = model.trust_of(trust, of_split)
        figures = measure.trust_figures(p_C, true_C, [c.kind for c in of_split.claims], docs_C, seed=seed)
        figures += measure.feature_figures(of_split, true_C, docs_C)
        out[split] = Measured(figures, measure.curve(p_C, true_C))
    value = trust.as_json() | {"measured": {split: m.as_json() for split, m in out.items()}}
    paths.write(paths.path(directory) / bundle.TRUST, json.dumps(value, indent=1))
    return trust, out


def labelled(runner, mean_D, seen: stretch.Stretches, label: str):
    """Return (the claims of the centres with features, whether each is true [C], its document [C])."""
    found = features.claim_features(runner, mean_D, seen.said, label)
    by_row = [[found.claims[j] for j in found.of(i)] for i in range(len(seen.texts))]
    true = [claims.judge_claims(c, t) for c, t in zip(by_row, seen.texts, strict=True)]
    docs = [seen.docs[i] for i in found.row_C]
    return found, np.concatenate(true) if true else np.zeros(0, bool), np.array(docs)


def _rows(found, pick_C):
    of_split, true_C, docs_C = found
    claims_C = [c for c, p in zip(of_split.claims, pick_C, strict=True) if p]
    kept = features.Claims(claims_C, of_split.row_C[pick_C], of_split.x_CF[pick_C])
    return kept, true_C[pick_C], docs_C[pick_C]
