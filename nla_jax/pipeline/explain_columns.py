"""The settings of a batch of explanations, and the columns of its output."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from nla_jax import api
from nla_jax.data import lessons
from nla_jax.errors import UserError, did_you_mean
from nla_jax.evaluate import distribution, row_scores
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.trust import apply
from nla_jax.evaluate.words import edits
from nla_jax.pipeline import explain_inputs
from nla_jax.pipeline.explain_inputs import Row

# Columns of the output, in order; the input's columns come before them.
COLUMNS = {
    "row": "number of the row",
    "item": "number of the text or activation in the input",
    "position": "index of the explained token",
    "token": "that token",
    "sample": "number of the sample of this activation",
    "seed": "of sampling",
    "explanation": "AV's words; null if its answer could not be parsed",
    "failed": "whether it could not be parsed",
    "fve": "by AR, as in `TokenReport`",
    "cos": "cosine of AR's prediction and h",
    "fve_frozen": "FVE by the frozen target, which reads the words alone",
    "cos_frozen": "the same cosine by the frozen target",
    "recurrence": "share of the claims that recur at the explained tokens before; null without any",
    "recurring": "these claims",
    "norm": "|h|",
    "cos_mean": "cosine of h with the mean direction of training activations",
    "norm_percentile": "share of training activations with a smaller norm, in percent",
    "angle_percentile": "the same for that cosine",
    "unusual": "norm and angle, if they are outside the training activations' range",
    "claims": "the claims and the trust in each (`nla trust`)",
    "trusted": "the explanation without the claims that are trusted less than --trust",
    "error": "why an input was not explained",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the rows, beside bundle and input. Fields as the flags of `nla explain --file`."""

    positions: str = "last"
    samples: int = 1
    temperature: float | None = None  # 0, or 1 with several samples
    max_new: int = 0  # 0: the bundle's
    seed: int = 0
    scale: str = "mean"
    scores: tuple[str, ...] = row_scores.READERS
    trust: float | None = None
    field: str = ""
    rendered: bool = False
    carry: tuple[str, ...] | None = None

    def __post_init__(self):
        explain_inputs.parse_positions(self.positions)
        distribution.parse_scale(self.scale)
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: must be at least 1")
        if unknown := [s for s in self.scores if s not in row_scores.READERS]:
            known = row_scores.READERS
            raise UserError(f"scores {unknown[0]!r}: must be of {', '.join(known)}, or none"
                            f"{did_you_mean(unknown[0], known)}")

    @property
    def heat(self) -> float:
        """Return the temperature of sampling."""
        return (1.0 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature


def rows_of(nla: api.NLA, batch, said: list[str], o: Options, said_at) -> list[dict]:
    """Return the output's rows of a batch.

    Args:
      batch: (number, Row) of each. said: AV's explanations, "" where there is none.
      said_at: {(item, sample): {position: explanation}} of the rows before; it is updated.
    """
    real = [i for i, (_, row) in enumerate(batch) if row.h_D is not None]
    columns: dict[int, dict] = {}
    if real:
        h_ND, texts = np.stack([batch[i][1].h_D for i in real]), [said[i] for i in real]
        scores = row_scores.score_columns(nla.runner, nla.mean_direction, h_ND, texts, o.scores)
        fits = distribution.compare_rows(h_ND, nla.mean_direction, nla.activations)
        claims = _claims(nla, [batch[i][1] for i in real], texts, o) if o.trust is not None else None
        for k, i in enumerate(real):
            columns[i] = {name: _round(a[k]) for name, a in scores.items()}
            columns[i] |= {n: _round(v) for n, v in dataclasses.asdict(fits[k]).items()}
            if claims is not None:
                columns[i]["claims"] = [dataclasses.asdict(c) | {"trust": _round(c.trust)} for c in claims[k]]
                columns[i]["trusted"] = apply.keep_trusted(texts[k], claims[k], o.trust) or None
    out = []
    for i, (number, row) in enumerate(batch):
        own = dict.fromkeys(_names(o)) | columns.get(i, {})
        own |= {"row": number, "item": row.item, "position": row.position, "token": row.token,
                "sample": row.sample, "seed": o.seed, "explanation": said[i] or None, "failed": not said[i],
                "error": row.error or None}
        if row.h_D is not None:
            own |= _recurrence(said_at, row, said[i])
        out.append(_carried(row.fields, o) | own)
    return out


def _names(o: Options) -> list[str]:
    left_out = set() if o.trust is not None else {"claims", "trusted"}
    left_out |= {"fve", "cos"} if "ar" not in o.scores else set()
    left_out |= {"fve_frozen", "cos_frozen"} if "frozen" not in o.scores else set()
    return [name for name in COLUMNS if name not in left_out]


def _carried(fields: Mapping, o: Options) -> dict:
    """Return the input's columns, as input_NAME where the output has a column of that name."""
    kept = fields if o.carry is None else {n: fields.get(n) for n in o.carry}
    return {f"input_{n}" if n in COLUMNS else n: v for n, v in kept.items()}


def _recurrence(said_at, row: Row, text: str) -> dict:
    """Return the recurrence of the claims, without the ending line, at up to BACK explained tokens before."""
    for other in [k for k in said_at if k[0] != row.item]:
        del said_at[other]
    known = said_at[row.item, row.sample]
    near = [known[p] for p in sorted(p for p in known if p is not None)[-recurrence.BACK :]]
    known[row.position] = text
    about = lessons.split_end(text)[0]
    kinds = recurrence.recurring_claims(about, near) if near and text else []
    found = [k for k in kinds if k is not None]
    recurring = [c for c, kind in zip(edits.claims(about), kinds, strict=True) if kind] if kinds else []
    return {"recurrence": round(sum(found) / len(found), 4) if found else None,
            "recurring": recurring if near else None}


def _claims(nla: api.NLA, rows: list[Row], texts: list[str], o: Options) -> list[list]:
    at: dict[tuple[int, int], int] = {}
    h: list[np.ndarray] = []
    for row in rows:
        for position, h_D in (row.near or {0: row.h_D}).items():
            place = row.item, position
            if place not in at:
                at[place] = len(h)
                h.append(h_D)
    places = [(row.item, row.position or 0) for row in rows]
    mean_D = apply.mean_or_zero(nla.mean_direction, nla.spec.lm.d_model)
    return apply.trust_rows(nla.runner, mean_D, nla.trust, np.stack(h), at, places, texts, seed=o.seed,
                            max_new=o.max_new or nla.meta["max_new_tokens"])


def _round(value):
    return round(float(value), 5) if isinstance(value, float | np.floating) else value
