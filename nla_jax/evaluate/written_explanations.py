"""Explanations that an LLM wrote, in the form that AV and AR were trained on."""

import numpy as np

from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.runner import Runner
from nla_jax.training import feeds


def learned(columns: dict, settings: dict | None, runner: Runner) -> tuple[np.ndarray, list[str]]:
    """(rows that have a written explanation, its words): the lines of the run's config and the ending line.
    An NLA whose config is not known reads it as it was written."""
    if not any(columns["explanation"]):
        return np.zeros(0, int), []
    data = (settings or {}).get("data", {})
    texts = feeds.Texts(columns, "written", batch=1, seed=0, which=data.get("explanation_lines", "all"),
                        end=feeds.end_of(runner.tok, data, runner.spec))
    return texts.rows, texts.words(texts.rows)


def written(ev: Evidence, *, train: bool = False) -> tuple[np.ndarray, list[str]]:
    """`learned` of the evaluated rows; with `train`, of the training rows."""
    return learned(ev.train if train else ev.columns, ev.settings, ev.warm or ev.runner)
