"""Summarise a table of figures in sentences that claim no more than the intervals show."""

from collections.abc import Sequence

from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.verdict_answers import Shown
from nla_jax.evaluate.verdict_table import QUESTIONS

TERMS = (
    "h is the activation. AV wrote the words from h alone, and AR rebuilds h from the words. The target is "
    "the model that is explained. FVE is the share of h that comes back: 1 is all, 0 is nothing. Brackets "
    "hold 95 % intervals."
)


def verdict(figures: Sequence[Figure]) -> list[str]:
    """Return one sentence for each question that the figures answer; "not shown" where intervals overlap."""
    f = {x.name: x for x in figures}
    fields = {name: Shown(x) for name, x in f.items()}
    out = []
    for q in QUESTIONS:
        if set(q.needs) <= f.keys() and (answer := q.answer(f)) is not None and answer in q.says:
            out.append(q.says[answer].format(**fields, **q.more(f)))
    return out
