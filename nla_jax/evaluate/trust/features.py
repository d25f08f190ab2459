"""Compute the features of a claim from which trust is estimated. None of them reads the source text."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.words import claims as C
from nla_jax.lm.model import unembed
from nla_jax.prompts import CLOSE, OPEN
from nla_jax.rl import roles
from nla_jax.util.batching import map_rows, pad_rows

FEATURES = {
    "before": "share of the explanations of the tokens before that make the claim too",
    "after": "the same of the tokens after",
    "agree": "share of further samples of the same activation that make it too",
    "logp": "mean log-probability of its tokens under AV, nats",
    "first": "log-probability of its first token under AV, nats",
    "informed": "what h adds to `logp`, against the mean direction",
    "lost_ar": "by how much AR's squared error grows without it, in units of D",
    "lost_frozen": "the same for the frozen target",
    "lens": "log-probability of its first token in the target's own prediction from h (logit lens), nats",
    "place": "its position, as a share of the explanation; in the ending line: words from the end",
    "length": "logarithm of its length in characters",
}
NEAR = ("before", "after")  # these need the activations of the tokens around


@dataclasses.dataclass(frozen=True)
class Said:
    """Explanations of N activations, and what else AV says of them.

    h_ND: the activations. explanations: one of each, "" where there is none.
    samples: further explanations of the same activation, for each row.
    before, after: explanations of the tokens around, for each row; None where there are no such tokens.
    """

    h_ND: np.ndarray
    explanations: Sequence[str]
    samples: Sequence[Sequence[str]]
    before: Sequence[Sequence[str]] | None = None
    after: Sequence[Sequence[str]] | None = None


@dataclasses.dataclass(frozen=True)
class Claims:
    """All claims of N explanations. row_C: the row of each. x_CF: its features, in the order of FEATURES."""

    claims: list[C.Claim]
    row_C: np.ndarray
    x_CF: np.ndarray

    def of(self, row: int) -> list[int]:
        """Return the indices of the claims of a row."""
        return np.flatnonzero(self.row_C == row).tolist()


def claim_features(runner: Runner, mean_D, said: Said, label: str = "") -> Claims:
    """Split explanations into claims and compute the features of each. Features of NEAR may be NaN.

    mean_D: `fve.mean_direction` of training activations.
    """
    split = [C.split_claims(z) for z in said.explanations]
    claims = [c for row in split for c in row]
    row_C = np.repeat(np.arange(len(split)), [len(row) for row in split])
    x = dict.fromkeys(FEATURES, np.zeros(len(claims)))
    if claims:
        nothing = [()] * len(split)
        x["before"] = _repeats(split, nothing if said.before is None else said.before)
        x["after"] = _repeats(split, nothing if said.after is None else said.after)
        x["agree"] = np.nan_to_num(_shares(split, said.samples, C.judge_claims), nan=0.0)
        x["logp"], x["first"], x["informed"], token_C = _answer_features(runner, mean_D, said, split, label)
        x["lens"] = _lens(runner, said.h_ND[row_C], token_C, label)
        x["lost_ar"], x["lost_frozen"] = _lost(runner, said, claims, row_C, label)
        x["place"] = np.concatenate(
            [_places(row, len(z)) for row, z in zip(split, said.explanations, strict=True)]
        )
        x["length"] = np.log([max(len(c.text), 1) for c in claims])
    return Claims(claims, row_C, np.stack([np.asarray(x[name], float) for name in FEATURES], 1))


def _shares(split, others, judge) -> np.ndarray:
    """Return for each claim the share of its row's other explanations that make it; NaN if there are none."""
    out = []
    for row, texts in zip(split, others, strict=True):
        texts = [t for t in texts if t is not None]
        found = [judge(row, t) for t in texts]
        out.append(np.mean(found, 0) if texts and row else np.full(len(row), np.nan))
    return np.concatenate(out)


def _repeats(split, others) -> np.ndarray:
    return _shares(split, others, C.repeat_claims)


def _answer_features(runner: Runner, mean_D, said: Said, split, label: str):
    """Return (logp, first, informed, the id of the first token) of each claim, [C] each."""
    tok, spec = runner.tok, runner.spec
    out = tok(
        [OPEN + z + CLOSE for z in said.explanations],
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids_NT, _, _ = pad_rows(out["input_ids"], spec.av.pad)
    score = functools.partial(_score, runner.av, runner.base, spec=spec)
    mean_ND = np.broadcast_to(np.asarray(mean_D, np.float32), said.h_ND.shape)
    h_ND = np.asarray(said.h_ND, np.float32)
    (own_NT,), (blind_NT,) = (
        map_rows(lambda h, ids: (score(h, ids),), (h, ids_NT), runner.batch, label and f"{label}: {name}")
        for h, name in ((h_ND, "scores"), (mean_ND, "scores without h"))
    )
    found = []
    for n, (row, spans) in enumerate(zip(split, out["offset_mapping"], strict=True)):
        for c in row:
            start, end = c.start + len(OPEN), c.end + len(OPEN)
            at = [t for t, (a, b) in enumerate(spans) if a < end and b > start]
            own, blind = own_NT[n, at], blind_NT[n, at]
            found.append((own.mean(), own[0], (own - blind).mean(), ids_NT[n, at[0]]))
    logp, first, informed, token = zip(*found, strict=True)
    return np.array(logp), np.array(first), np.array(informed), np.array(token, np.int32)


@functools.partial(jax.jit, static_argnames="spec")
def _score(av, base, h_BD, ids_BT, spec):
    return roles.answer_logp(av, base, spec, h_BD, ids_BT)


@functools.partial(jax.jit, static_argnames="spec")
def _lens_logp(base, h_BD, token_B, spec):
    logp_BV = jax.nn.log_softmax(unembed(base, spec.lm, h_BD[:, None])[:, 0], -1)
    return logp_BV[np.arange(len(token_B)), token_B]


def _lens(runner: Runner, h_CD, token_C, label: str) -> np.ndarray:
    score = functools.partial(_lens_logp, runner.base, spec=runner.spec)
    arrays = (np.asarray(h_CD, np.float32), token_C)
    return map_rows(lambda h, t: (score(h, t),), arrays, runner.batch, label and f"{label}: lens")[0]


def _lost(runner: Runner, said: Said, claims, row_C, label: str) -> list[np.ndarray]:
    """Return by how much the errors of AR and of the frozen target grow without each claim, in units of D."""
    texts = list(said.explanations)
    rest = [_without(texts[r], c) for c, r in zip(claims, row_C, strict=True)]
    h, out = np.asarray(said.h_ND), []
    for read, who in ((runner.reconstruct, "AR"), (runner.read_frozen, "frozen target")):
        different = sorted({*texts, *rest})
        h_hat = dict(zip(different, read(different, label and f"{label}: {who}"), strict=True))
        whole = F.errors(np.stack([h_hat[t] for t in texts]), h)
        out.append((F.errors(np.stack([h_hat[t] for t in rest]), h[row_C]) - whole[row_C]) / h.shape[1])
    return out


def _without(text: str, c: C.Claim) -> str:
    """Return the text without the words of a claim."""
    before, after = text[: c.start].rstrip(" "), text[c.end :].lstrip(" ")
    inside = before and after and not before.endswith("\n") and not after.startswith("\n")
    return before + " " + after if inside else before + after


def _places(row: list[C.Claim], length: int) -> np.ndarray:
    last = sum(c.kind == "ending" for c in row)
    out = []
    for c in row:
        out.append(last if c.kind == "ending" else c.start / max(length, 1))
        last -= c.kind == "ending"
    return np.array(out, float)
