"""Read activations with known content without AV: by the Jacobian lens, by a linear probe, by the target.

Each reader gives scores [N, C] of C concepts, minus their mean over the N rows. The mean is what a reader
says of any row.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probes.lens import RANKED, lens_words
from nla_jax.evaluate.runner import Runner
from nla_jax.lm.model import unembed
from nla_jax.studies import planting
from nla_jax.studies.planting import Plant
from nla_jax.util.batching import map_rows

RIDGE = 0.1  # penalty of the probe, as a share of the mean squared norm of its inputs


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier of C concepts. mean_D, std_D: of its inputs, which are scaled to norm sqrt(D)."""

    mean_D: np.ndarray
    std_D: np.ndarray
    w_DC: np.ndarray

    def scores(self, h_ND) -> np.ndarray:
        """Return the score [N, C] of each concept, minus its mean over rows."""
        found = (F.normalise(h_ND) - self.mean_D) / self.std_D @ self.w_DC
        return found - found.mean(0)


def fit_probe(h_ND, concept_N, n_concepts: int) -> Probe:
    """Fit a ridge regression from activations to one-hot concepts."""
    x_ND = F.normalise(h_ND)
    mean_D, std_D = x_ND.mean(0), np.maximum(x_ND.std(0), 1e-6)
    x_ND = (x_ND - mean_D) / std_D
    y_NC = np.eye(n_concepts)[np.asarray(concept_N)] - 1 / n_concepts
    gram_NN = x_ND @ x_ND.T
    # The dual form solves for N rows instead of D dimensions.
    a_NC = np.linalg.solve(gram_NN + RIDGE * np.trace(gram_NN) / len(x_ND) * np.eye(len(x_ND)), y_NC)
    return Probe(mean_D, std_D, x_ND.T @ a_NC)


def mentions(plant: Plant, frames: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return sentences that end with a word of a concept, and the concept [N] of each."""
    said = [(plant.mention.format(word=w), c) for c, ws in enumerate(plant.concepts.values()) for w in ws]
    found = [(s.format(name=word), c) for word, c in said for s in frames]
    return [t for t, _ in found], np.array([c for _, c in found])


def mention_probe(runner: Runner, params: dict, plant: Plant) -> tuple[Probe, float]:
    """Fit a probe on h of the target `params` at the words of concepts, without any planted name.

    Returns the probe, and its accuracy on sentences that it was not fitted on: the last third of
    `plant.carriers`."""
    held = max(1, len(plant.carriers) // 3)
    parts = [mentions(plant, s) for s in (plant.carriers[:-held], plant.carriers[-held:])]
    h = [capture_texts.capture_last(runner, texts, base=params)[:, 0] for texts, _ in parts]
    probe = fit_probe(h[0], parts[0][1], len(plant.concepts))
    return probe, float((probe.scores(h[1]).argmax(1) == parts[1][1]).mean())


def lens_says(runner: Runner, j_DD, h_ND, plant: Plant) -> np.ndarray:
    """Return [N, C]: whether the first words of the Jacobian lens at h name each concept."""
    ids_NK = np.argsort(-_lens_logp(runner, j_DD, h_ND), 1, kind="stable")[:, :RANKED]
    said = [" ".join(lens_words(runner.tok, row)) for row in ids_NK]
    return planting.names_concepts(said, plant)


def lens_scores(runner: Runner, j_DD, h_ND, plant: Plant) -> np.ndarray:
    """Return the lens's scores [N, C]: `planting.concept_logp` of its log-probabilities."""
    logp_NV = _lens_logp(runner, j_DD, h_ND)
    return planting.concept_logp(planting.words_logp(runner.tok, logp_NV, plant))


def _lens_logp(runner: Runner, j_DD, h_ND) -> np.ndarray:
    """Return the lens's log-probabilities [N, V], in nats."""
    rows, lens = (np.asarray(h_ND, np.float32),), jnp.asarray(j_DD)
    (found,) = map_rows(lambda h: (_read(runner.base, lens, h, runner.spec.lm),), rows, runner.batch)
    return found.astype(np.float64)


@functools.partial(jax.jit, static_argnums=3)
def _read(base, j_DD, h_BD, lm):
    return jax.nn.log_softmax(unembed(base, lm, h_BD @ j_DD.T))
