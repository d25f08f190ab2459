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

EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Measured:
    """The figures of a trust model on one split, its curves, and some explanations with their claims.

    curve: the calibration (`measure.curve`). coverage: precision by coverage (`measure.coverage`) of all
    claims, and of those of the "description". examples: the first explanation of each of EXAMPLES documents,
    not selected.
    """

    figures: list[Figure]
    curve: list[dict]
    coverage: dict[str, list[dict]]
    examples: list[dict]

    def as_json(self) -> dict:
        """Return all of it as JSON values."""
        return dataclasses.asdict(self)


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
    found, seen = {}, {}
    for split in splits:
        columns = store.load_columns(data, split)
        if not all(columns["text"]):
            raise UserError(f"{data}: split {split} has rows without a text, to which claims are compared")
        seen[split] = stretch.explain_stretches(
            nla.runner,
            columns,
            rows=rows or len(columns["h"]),
            seed=seed,
            temperature=temperature,
            max_new=meta["max_new_tokens"],
            label=split,
        )
        found[split] = labelled(nla.runner, mean, seen[split], split)
    fits = np.array([keyed_hash("trust", seed, d) % 2 == 0 for d in found["heldout"][2]])
    trust = model.fit_trust(*_rows(found["heldout"], fits))
    found["heldout"] = _rows(found["heldout"], ~fits)
    out = {split: measured(trust, seen[split], *label, seed=seed) for split, label in found.items()}
    kept = {split: {k: v for k, v in m.as_json().items() if k != "examples"} for split, m in out.items()}
    value = trust.as_json() | {"measured": kept}
    paths.write(paths.path(directory) / bundle.TRUST, json.dumps(value, indent=1))
    return trust, out


def measured(trust: model.Trust, seen: stretch.Stretches, of_split, true_C, docs_C, *, seed: int) -> Measured:
    """Measure a trust model on labelled claims of one split (`labelled`)."""
    p_C, kinds = model.trust_of(trust, of_split), np.array([c.kind for c in of_split.claims])
    figures = measure.trust_figures(p_C, true_C, kinds, docs_C, seed=seed)
    figures += measure.feature_figures(of_split, true_C, docs_C)
    parts = {"all": kinds != "", "description": kinds != "ending"}
    covered = {name: measure.coverage(p_C[w], true_C[w], docs_C[w], seed)
               for name, w in parts.items() if w.any()}
    first = {}  # the first explanation of each document
    for row, doc in zip(of_split.row_C.tolist(), docs_C, strict=True):
        first.setdefault(doc, row)
    examples = []
    for row in list(first.values())[:EXAMPLES]:
        said = [{"kind": c.kind, "claim": c.text, "trust": round(float(p_C[j]), 3), "true": bool(true_C[j])}
                for j in of_split.of(row) for c in [of_split.claims[j]]]
        examples.append({"text": seen.texts[row], "explanation": seen.said.explanations[row], "claims": said})
    return Measured(figures, measure.curve(p_C, true_C, docs_C), covered, examples)


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
