"""Measure what each witness sees of a concept in a target: AV, readers of h, distances, patching.

Rows are names in sentences (`Plant.texts`). Each measure is taken at the planted names and at as many control
names, which were tuned as often with words of all concepts.
"""

import dataclasses

import numpy as np

from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.runner import Runner
from nla_jax.studies import known_readers, planting
from nla_jax.studies.planting import Plant
from nla_jax.util.keys import key_for


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all targets of a study are measured with.

    asked: sentences of each name. j_DD: the Jacobian lens. variance: mean squared distance of a natural
    activation from the mean, the unit of all distances. ordinary: texts without a planted name.
    """

    runner: Runner
    plant: Plant
    j_DD: np.ndarray
    variance: float
    ordinary: list[str]
    asked: int
    max_new: int
    temperature: float = 1.0
    seed: int = 0

    @property
    def concept_N(self) -> np.ndarray:
        """Return the concept of each row; a control borrows that of the name at its place."""
        return np.repeat(np.arange(len(self.plant.concepts)), len(self.texts()) // len(self.plant.names))

    def texts(self, control: bool = False) -> list[str]:
        """Return the sentences with planted names, or with control names."""
        return self.plant.texts(self.plant.controls if control else self.plant.names, self.asked)


def measure_target(bench: Bench, params: dict, label: str = "") -> dict[str, list]:
    """Return values of each row, for the target `params`, by measure; controls end in "_control".

    mass: probability that the next word is one of the concept's. held: whether the concept's words are
    preferred to those of the others. named, named_next: whether AV names the concept at the name, and at the
    token before the next word. lens, probe: whether these readers find it in h. distance: of h from the
    honest target's. error_ar, error_frozen, error_tuned: of the words, read by AR, by the honest target, and
    by this one. kl_words: KL of the next word, with AR's reconstruction in the place of h. mass_words,
    mass_honest: `mass` with that, or with the honest target's h, in the place of h. said: the explanations.
    Distances and errors are in units of the natural variance.
    """
    out: dict[str, list] = {}
    probe, accuracy = known_readers.mention_probe(bench.runner, params, bench.plant)
    for tail, control in (("", False), ("_control", True)):
        found = _measure_names(bench, params, probe, control, label and f"{label}{tail}")
        out |= {f"{k}{tail}": list(v) for k, v in found.items()}
    pair = [capture_texts.capture_last(bench.runner, bench.ordinary, base=b)[:, 0] for b in (params, None)]
    out["distance_ordinary"] = list(F.errors(*pair) / bench.variance)
    return out | {"probe_accuracy": [accuracy]}


def _measure_names(bench: Bench, params: dict, probe, control: bool, label: str) -> dict:
    runner, plant, texts = bench.runner, bench.plant, bench.texts(control)
    own = bench.concept_N
    at = np.arange(len(own)), own
    h, honest = (capture_texts.capture_last(runner, texts, base=b)[:, 0] for b in (params, None))
    after = capture_texts.capture_last(runner, [t + plant.between for t in texts], base=params)[:, 0]
    key = lambda i: key_for(bench.seed, "planted", 100 + 2 * control + i)
    how = dict(temperature=bench.temperature, max_new=bench.max_new, label=label)
    trip, said_next = runner.round_trip(h, key(0), **how), runner.explain(after, key(1), **how)
    mean = F.normalise(h).mean(0)  # of a failed answer, as in the probe `patch`
    h_hat = np.where(trip.ok[:, None], trip.h_text, mean)
    tuned = runner.with_trees()
    tuned.base = params
    clean, words, in_place = (planting.ask(runner, params, texts, plant, v) for v in (None, h_hat, honest))
    by = {k: planting.words_logp(runner.tok, logp, plant)
          for k, logp in (("clean", clean), ("words", words), ("honest", in_place))}
    mass = {k: planting.concept_mass(logp)[at] for k, logp in by.items()}
    return {
        "mass": mass["clean"],
        "held": planting.concept_logp(by["clean"]).argmax(1) == own,
        "named": planting.names_concepts(trip.explanations, plant)[at],
        "named_next": planting.names_concepts(said_next, plant)[at],
        "lens": known_readers.lens_says(runner, bench.j_DD, h, plant)[at],
        "probe": probe.scores(h).argmax(1) == own,
        "distance": F.errors(h, honest) / bench.variance,
        "error_ar": F.errors(trip.h_text, h, trip.ok) / bench.variance,
        **{f"error_{k}": F.errors(r.read_frozen(trip.explanations), h, trip.ok) / bench.variance
           for k, r in (("frozen", runner), ("tuned", tuned))},
        "kl_words": np.sum(np.exp(clean) * (clean - words), 1),
        "mass_words": mass["words"],
        "mass_honest": mass["honest"],
        "said": trip.explanations,
    }

