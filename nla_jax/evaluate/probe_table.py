"""Evaluate held-out rows with the probes of the table `PROBES`: rows -> a list of figures."""

from collections.abc import Sequence

import numpy as np

from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.probes import (
    form,
    independent,
    language,
    meaning,
    patch,
    recurrence,
    retrieval,
    round_trip,
    samples,
    surface,
)
from nla_jax.evaluate.runner import RoundTrip, Runner


def evaluate(
    runner: Runner,
    columns: dict,
    mean_D: np.ndarray,
    key,
    *,
    temperature: float,
    max_new: int,
    bootstrap: int = 2000,
    seed: int = 0,
    label: str = "evaluate",
    probes: Sequence[str] = ("round_trip",),
    more: dict | None = None,
) -> tuple[list[Figure], RoundTrip]:
    """Return the figures of the named `PROBES` on one set of rows, and the round trip that they measure.

    Args:
      columns: of a store split: "h" [N, D], "doc_id", "text", "explanation" ("" where none is written).
      mean_D: `fve.mean_direction` of training activations.
      key: the random key of the sampled explanations.
      bootstrap: resamples of an interval. seed: of resamples, random edits and further samples.
      more: further fields of `Evidence`, which some probes need.
    """
    trip = runner.round_trip(columns["h"], key, temperature=temperature, max_new=max_new, label=label)
    evidence = Evidence(runner, columns, trip, mean_D, bootstrap, seed, temperature, max_new, **(more or {}))
    return [f for name in probes for f in PROBES[name](evidence, label)], trip


PROBES = {
    "round_trip": round_trip.round_trip,
    "samples": samples.samples,
    "independent": independent.independent,
    "surface": surface.surface,
    "retrieval": retrieval.retrieval,
    "recurrence": recurrence.recurrence,
    "meaning": meaning.meaning,
    "form": form.form,
    "patch": patch.patch,
    "language": language.language,
}
