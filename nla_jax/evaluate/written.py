"""Explanations that an LLM wrote, in the form that AV and AR were trained on."""

import numpy as np

from nla_jax import train as T
from nla_jax.evaluate.evidence import Evidence


def written(ev: Evidence) -> tuple[np.ndarray, list[str]]:
    """(rows that have a written explanation, its words): the lines of the run's config and the ending line.
    An NLA whose config is not known reads it as it was written."""
    if not any(ev.columns["explanation"]):
        return np.zeros(0, int), []
    data, runner = (ev.settings or {}).get("data", {}), ev.warm or ev.runner
    texts = T.Texts(ev.columns, "written", batch=1, seed=0, which=data.get("explanation_lines", "all"),
                    end=T.end_of(runner.tok, data, runner.spec))  # fmt: skip
    return texts.rows, texts.words(texts.rows)
