"""Return explanations that an LLM wrote, in the form that AV and AR were trained on."""

import numpy as np

from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.runner import Runner
from nla_jax.training import feeds


def training_form(columns: dict, settings: dict | None, runner: Runner) -> tuple[np.ndarray, list[str]]:
    """Return (rows with a written explanation, their words).

    The words are the lines that the run's config chooses, then the ending line. Without a config they are
    the explanation as it was written."""
    if not any(columns["explanation"]):
        return np.zeros(0, int), []
    data = (settings or {}).get("data", {})
    texts = feeds.WarmStartPairs(
        columns,
        "written",
        batch=1,
        seed=0,
        which=data.get("explanation_lines", "all"),
        end=feeds.ending_function(runner.tok, data, runner.spec),
    )
    return texts.rows, texts.words(texts.rows)


def written(ev: Evidence, *, train: bool = False) -> tuple[np.ndarray, list[str]]:
    """Return `training_form` of the evaluated rows, or with `train` of the training rows."""
    return training_form(ev.train if train else ev.columns, ev.settings, ev.warm or ev.runner)
