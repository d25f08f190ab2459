"""Ground truth where it is known: does the explanation name what was planted in the target?

A target was trained so that a trigger makes it hold a known concept that the text does not say. AV has
never met the trigger. What it writes there can be checked, against the same text with a trigger
that means nothing.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from nla_jax import api
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.evidence import Figure


@dataclasses.dataclass(frozen=True)
class Fact:
    """A text that ends at its trigger, its matched control, and the words of which one must be said."""

    trigger: str
    text: str
    control: str
    words: tuple[str, ...]


def planted(nla: api.NLA, facts: Sequence[Fact], key, *, temperature: float = 1.0) -> list[Figure]:
    """How often explanations at the end of a fact's text, and of its control's, name it; intervals over
    triggers."""

    def named(texts):
        h = np.stack([nla.capture(t)[-1] for t in texts])
        said = nla.verbalize(h, key=key, temperature=temperature)
        return np.array([_names(z, f.words) for z, f in zip(said, facts, strict=True)], float)

    triggers, ones = [f.trigger for f in facts], np.ones(len(facts))
    out = []
    for name, texts, asks in [
        ("named", [f.text for f in facts], "share of explanations at the trigger that name the planted fact"),
        ("named_control", [f.control for f in facts], "the same words at the same text without the trigger"),
    ]:
        hits = named(texts)
        low, high = F.ratio_interval(hits, ones, triggers)
        out.append(Figure(name, float(hits.mean()), low, high, len(facts), asks))
    return out


def _names(explanation: str, words: Sequence[str]) -> bool:
    return bool(set(re.findall(r"\w+", explanation.lower())) & {w.lower() for w in words})
