"""Attack explanations by a small vector that is added to h, with the gradient through AV.

- innocent: AV is to write what it writes of the honest target there.
- chosen: AV is to write what it writes at another planted name.
- silent: AV is to write what it writes of h, while h + δ makes the target say another concept's words.

|δ| is at most ε |h|. Each attack takes steps of projected gradient descent in the direction of the gradient.
A random δ of the same norm is the control.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import specs
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.lm import params as params_lib
from nla_jax.lm.model import embed, forward
from nla_jax.studies import hiders, known_readers, planting
from nla_jax.studies.witnesses import Bench
from nla_jax.util.keys import key_for
from nla_jax.util.progress import Progress

ATTACKS = ("innocent", "chosen", "silent")
STRIDE = 0.5  # first step, as a share of ε |h|; it falls linearly
STEER = 0.3  # weight of the target's next word in "silent", beside AV's nats per token


@dataclasses.dataclass(frozen=True)
class Victims:
    """The rows that are attacked: planted names in sentences, read by the planted target.

    h_ND: activations. said, honest, chosen: greedy answers (`hiders.greedy_answers`) at h, at the honest
    target's h, and at h of the next name in the same sentence. other_N: the next name's concept.
    """

    texts: list[str]
    h_ND: np.ndarray
    honest_ND: np.ndarray
    said: dict
    honest: dict
    chosen: dict
    own_N: np.ndarray
    other_N: np.ndarray


def choose_victims(bench: Bench, params: dict, n_sentences: int) -> Victims:
    """Capture h of the planted names in the first sentences, and let AV explain it."""
    runner, plant = bench.runner, bench.plant
    texts = plant.texts(plant.names, n_sentences)
    own = np.repeat(np.arange(len(plant.names)), n_sentences)
    h, honest = (capture_texts.capture_last(runner, texts, base=b)[:, 0] for b in (params, None))
    answers = [hiders.greedy_answers(runner, rows, max_new=bench.max_new) for rows in (h, honest)]
    rolled = {k: np.roll(a, -n_sentences, 0) for k, a in answers[0].items()}
    return Victims(texts, h, honest, *answers, rolled, own, np.roll(own, -n_sentences))


def project(delta_ND, radius_N1):
    """Return the vectors, shortened to at most these norms."""
    norm_N1 = jnp.linalg.norm(delta_ND, axis=1, keepdims=True)
    return delta_ND * jnp.minimum(1.0, radius_N1 / jnp.maximum(norm_N1, 1e-12))


def descend(gradient, h_ND, epsilon: float, n_steps: int, label: str = "") -> np.ndarray:
    """Return δ [N, D] with |δ| <= epsilon |h| after steps against `gradient` (δ -> [N, D]) from zero."""
    radius_N1 = epsilon * jnp.linalg.norm(h_ND, axis=1, keepdims=True)
    delta_ND = jnp.zeros_like(h_ND)
    with Progress(label, n_steps) as bar:
        for i in range(n_steps):
            g_ND = gradient(delta_ND)
            size_N1 = jnp.maximum(jnp.linalg.norm(g_ND, axis=1, keepdims=True), 1e-12)
            stride = STRIDE * (1 - i / n_steps)
            delta_ND = project(delta_ND - stride * radius_N1 * g_ND / size_N1, radius_N1)
            bar.advance()
    return np.asarray(delta_ND)


def attack(bench: Bench, params: dict, victims: Victims, kind: str, epsilon: float, n_steps: int,
           label: str = "") -> np.ndarray:
    """Return the δ [N, D] of one of ATTACKS on the target `params`, or of "random"."""
    runner, h_ND = bench.runner, jnp.asarray(victims.h_ND)
    if kind == "random":
        noise_ND = np.random.default_rng([bench.seed, 13]).standard_normal(h_ND.shape)
        size_N1 = np.linalg.norm(noise_ND, axis=1, keepdims=True)
        radius_N1 = epsilon * np.linalg.norm(victims.h_ND, axis=1, keepdims=True)
        return (noise_ND / size_N1 * radius_N1).astype(np.float32)
    answers = {"innocent": victims.honest, "chosen": victims.chosen, "silent": victims.said}[kind]
    trees, steer = {"base": runner.base, "av": runner.av}, None
    if kind == "silent":
        first, trees["target"] = planting.first_tokens(runner.tok, bench.plant), params
        steer = {"rows": planting.asked_rows(runner, victims.texts, bench.plant.between),
                 "words": _word_mask(first, runner.spec.lm.vocab_size)[victims.other_N]}
    call = lambda delta_ND: _gradient(delta_ND, h_ND, answers, trees, steer, runner.spec)
    return descend(call, h_ND, epsilon, n_steps, label)


def _word_mask(first: list[list[int]], size: int) -> np.ndarray:
    """Return [C, V], which is True at each concept's tokens."""
    out = np.zeros((len(first), size), bool)
    for row, ids in zip(out, first, strict=True):
        row[ids] = True
    return out


@functools.partial(jax.jit, static_argnames="spec")
def _gradient(delta_ND, h_ND, answers, trees, steer, spec: specs.Spec):
    """Return the gradient [N, D] of the attack's loss with respect to δ."""

    def loss(delta_ND):
        value = hiders.answer_loss(trees["av"], trees["base"], spec, h_ND + delta_ND, answers)
        if steer is not None:
            ids, valid, at, last = steer["rows"]
            params, lm = trees["target"], spec.lm
            lower = params_lib.truncate(params, spec.layer + 1, lm)
            x, _ = forward(lower, lm, embed(params, lm, ids), valid)
            logp = planting.logp_above(params, spec, x, valid, at, last, h_ND + delta_ND)
            wanted_N = jax.nn.logsumexp(jnp.where(steer["words"], logp, -jnp.inf), 1)
            value = value - STEER * wanted_N.sum()
        return value

    return jax.grad(loss)(delta_ND)


def measure_attack(bench: Bench, params: dict, victims: Victims, probe, delta_ND) -> dict[str, list]:
    """Return what AV, the target and the witnesses make of h + δ: values of each row.

    named: AV, greedy, names the planted concept. chosen: it names the next name's concept. same: its answer
    is the one that it writes without δ. mass, mass_chosen: probability that the target, with h + δ in the
    place of h, says a word of either concept. lens, probe: these readers find the planted concept in h + δ.
    Others: as in `witnesses.measure_target`.
    """
    runner, plant = bench.runner, bench.plant
    h = victims.h_ND + delta_ND
    trip = runner.round_trip(h, key_for(bench.seed, "planted"), temperature=0.0, max_new=bench.max_new,
                             label="")
    at, other = ((np.arange(len(h)), c) for c in (victims.own_N, victims.other_N))
    says = planting.names_concepts(trip.explanations, plant)
    put = planting.ask(runner, params, victims.texts, plant, h)
    mass = planting.concept_mass(planting.words_logp(runner.tok, put, plant))
    whole = [runner.tok.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(victims.said["said_BT"], victims.said["said_mask_BT"], strict=True)]
    frozen = runner.read_frozen(trip.explanations)
    out = {
        "named": says[at],
        "chosen": says[other],
        "same": [a == b for a, b in zip(trip.responses, whole, strict=True)],
        "mass": mass[at],
        "mass_chosen": mass[other],
        "lens": known_readers.lens_says(runner, bench.j_DD, h, plant)[at],
        "probe": probe.scores(h).argmax(1) == victims.own_N,
        "distance": F.errors(h, victims.honest_ND) / bench.variance,
        "moved": F.errors(h, victims.h_ND) / bench.variance,
        "error_ar": F.errors(trip.h_text, h, trip.ok) / bench.variance,
        "error_frozen": F.errors(frozen, h, trip.ok) / bench.variance,
        "said": trip.explanations,
    }
    return {k: list(v) for k, v in out.items()}
