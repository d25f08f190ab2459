"""Explain tokens of a text and say of each claim how likely it is true, without reading the text's words."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from nla_jax.evaluate.runner import Runner
from nla_jax.evaluate.trust import stretch
from nla_jax.evaluate.trust.features import Said, claim_features
from nla_jax.evaluate.trust.model import Trust, trust_of
from nla_jax.evaluate.words import claims as C
from nla_jax.util.keys import key_for


@dataclasses.dataclass(frozen=True)
class TrustedClaim:
    """A claim of an explanation: its kind, its words, its span [start, end), and the trust in it."""

    kind: str
    text: str
    start: int
    end: int
    trust: float


def trust_claims(
    runner: Runner,
    mean_D,
    trust: Trust,
    h_TD,
    positions: list[int],
    explanations: list[str],
    *,
    seed: int = 0,
    max_new: int,
    label: str = "",
) -> list[list[TrustedClaim]]:
    """Return the claims of each explanation with the trust in each: `trust_rows` of one text.

    Args:
      h_TD: activations of all tokens of one text. positions: of the explanations. Both may be a single
        activation and [0].
    """
    at = {(0, p): p for p in range(len(h_TD))}
    places = [(0, p) for p in positions]
    return trust_rows(runner, mean_D, trust, h_TD, at, places, explanations, seed=seed, max_new=max_new,
                      label=label)


def trust_rows(
    runner: Runner,
    mean_D,
    trust: Trust,
    h_ND,
    at: Mapping[tuple[int, int], int],
    places: Sequence[tuple[int, int]],
    explanations: list[str],
    *,
    seed: int = 0,
    max_new: int,
    label: str = "",
) -> list[list[TrustedClaim]]:
    """Return the claims of explanations of tokens of several texts, with the trust in each.

    AV writes stretch.SAMPLES more explanations of each position, and one of each token within
    stretch.AROUND of it. Where such tokens are missing on one side, `Trust.alone` is used.

    Args:
      at: (text, token) -> row of h_ND, for the explained tokens and for those around them.
      places: (text, token) of each explanation.
    """
    asked = {"temperature": 1.0, "max_new": max_new}
    steps = [d for d in range(-stretch.AROUND, stretch.AROUND + 1) if d]
    around = sorted({(text, p + d) for text, p in places for d in steps if (text, p + d) in at})
    said: dict[tuple[int, int], str] = {}
    if around:
        told = label and f"{label}: neighbours"
        texts = runner.explain(h_ND[[at[a] for a in around]], key_for(seed, "trust"), **asked, label=told)
        said = dict(zip(around, texts, strict=True))
    h_RD = h_ND[[at[p] for p in places]]
    more = [
        runner.explain(h_RD, key_for(seed, "trust", 1 + s), **asked, label=label and f"{label}: samples")
        for s in range(stretch.SAMPLES)
    ]

    def side(place, sign):
        near = [(place[0], place[1] + sign * d) for d in range(1, stretch.AROUND + 1)]
        return [said[p] for p in near if p in said]

    found = claim_features(
        runner,
        mean_D,
        Said(
            h_RD,
            explanations,
            list(zip(*more, strict=True)),
            [side(p, -1) for p in places],
            [side(p, 1) for p in places],
        ),
        label,
    )
    p_C = trust_of(trust, found)
    return [
        [TrustedClaim(*_place(found.claims[j]), float(p_C[j])) for j in found.of(i)] for i in range(len(h_RD))
    ]


def _place(c: C.Claim) -> tuple:
    return c.kind, c.text, c.start, c.end


def keep_trusted(explanation: str, claims: list[TrustedClaim], least: float) -> str:
    """Return the explanation with each claim that is trusted less than `least` replaced by "[…]"."""
    out, at = [], 0
    for c in claims:
        if c.trust < least:
            out += [explanation[at : c.start], "[…]"]
            at = c.end
    text = "".join(out) + explanation[at:]
    while "[…] […]" in text:
        text = text.replace("[…] […]", "[…]")
    return text


def mean_or_zero(mean_D, d_model: int) -> np.ndarray:
    """Return the mean direction, or zeros for an imported bundle that has none."""
    return np.zeros(d_model, np.float32) if mean_D is None else np.asarray(mean_D, np.float32)
