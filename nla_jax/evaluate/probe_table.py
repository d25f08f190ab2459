"""Evaluate held-out rows with the probes of the table `PROBES`: rows -> a list of figures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.probes import (
    claims,
    drift,
    form,
    independent,
    language,
    lens,
    meaning,
    patch,
    recurrence,
    retrieval,
    round_trip,
    sae,
    samples,
    surface,
)
from nla_jax.evaluate.runner import RoundTrip, Runner
from nla_jax.evaluate.words import embedder, wordnet
from nla_jax.util.choices import choose


class Probe(NamedTuple):
    """A family of figures.

    measure: (Evidence, label) -> its figures. fetch: downloads what it needs; it is called before any work.
    """

    measure: Callable[[Evidence, str], list[Figure]]
    fetch: Callable[[], object] = lambda: None


PROBES = {
    "round_trip": Probe(round_trip.round_trip),
    "samples": Probe(samples.samples),
    "independent": Probe(independent.independent),
    "surface": Probe(surface.surface),
    "retrieval": Probe(retrieval.retrieval, embedder.load),
    "recurrence": Probe(recurrence.recurrence),
    "meaning": Probe(meaning.meaning, wordnet.wordnet),
    "claims": Probe(claims.claims, wordnet.wordnet),
    "drift": Probe(drift.drift, wordnet.wordnet),
    "form": Probe(form.form),
    "patch": Probe(patch.patch),
    "language": Probe(language.language),
    "lens": Probe(lens.lens, wordnet.wordnet),
    "sae": Probe(sae.sae),
}


def find_probes(names: Sequence[str]) -> dict[str, Probe]:
    """Return the probes of these names: of PROBES, "all", or "module:function" (docs/howto/own.md).

    Raises UserError for an unknown name.
    """
    out: dict[str, Probe] = {}
    for name in names:
        found = PROBES if name == "all" else {name: choose(PROBES, name, "probe")}
        out |= {k: p if isinstance(p, Probe) else Probe(p) for k, p in found.items()}
    return out


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
    """Return the figures of these probes (`find_probes`) on one set of rows, and the round trip measured.

    Args:
      columns: of a store split: "h" [N, D], "doc_id", "text", "explanation" ("" where none is written).
      mean_D: `fve.mean_direction` of training activations.
      key: the random key of the sampled explanations.
      bootstrap: resamples of an interval. seed: of resamples, random edits and further samples.
      more: further fields of `Evidence`, which some probes need.
    """
    wanted = find_probes(probes)
    trip = runner.round_trip(columns["h"], key, temperature=temperature, max_new=max_new, label=label)
    evidence = Evidence(runner, columns, trip, mean_D, bootstrap, seed, temperature, max_new, **(more or {}))
    figures: list[Figure] = []
    for name, probe in wanted.items():
        found = probe.measure(evidence, label)
        if not isinstance(found, list) or not all(isinstance(f, Figure) for f in found):
            raise UserError(f"probe {name!r}: the function must return a list of `probe_types.Figure`")
        figures += found
    return figures, trip
