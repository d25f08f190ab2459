"""Train a fresh NLA on a target's own activations, and let it read the planted names.

The NLA of a study learned from the honest target. A hider that is tuned against this AV may do no more than
find its blind spots. A fresh NLA begins with the same weights and takes lessons on h of the hider itself:

- a training text, with its written explanation in the form that AV learned;
- a sentence that ends with a concept's word. The explanation names the concept, and other words of it;
- a sentence that ends with an ordinary name. The explanation names no concept.

No lesson has a planted name, a control name, or a sentence that is measured.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from nla_jax import steps
from nla_jax.evaluate import capture_texts
from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import evenly_spaced
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import optimize
from nla_jax.lm import params as params_lib
from nla_jax.studies import planting
from nla_jax.studies.planting import Plant
from nla_jax.studies.witnesses import Bench
from nla_jax.training import feeds
from nla_jax.util.keys import key_for
from nla_jax.util.progress import Progress

NAMES = ("Peter", "Anna", "London", "Victor", "Maria", "Boston", "Henry", "Clara", "Dublin", "Simon", "Laura",
         "Madrid", "Oscar", "Helen", "Geneva", "Martin")
HELD = 4  # of these names, the last ones are not in lessons
TRAINED, TOLD, UNTOLD = 96, 160, 48  # lessons of each kind
TRIED = 16  # texts with and without a concept, on which a fresh AV is tested


@dataclasses.dataclass(frozen=True)
class Course:
    """How a fresh NLA learns.

    columns: "text" and "explanation" of training rows. data: that section of the run's config.
    most: tokens of an answer.
    """

    columns: dict
    data: dict
    n_steps: int
    lr: float = 1e-3
    batch: int = 16
    most: int = 64


def told_texts(plant: Plant, rng, n: int, carriers: Sequence[str], *, held: bool = False):
    """Return n texts that end with a word of a concept, and their explanations. Concepts take turns.

    held: the word is one of the last quarter of the concept's words, which are in no lesson's text."""
    texts, said, concepts = [], [], list(plant.concepts.items())
    for i in range(n):
        concept, words = concepts[i % len(concepts)]
        first = len(words) - max(1, len(words) // 4)
        word = rng.choice(words[first:] if held else words[:first])
        b, c = rng.choice([w for w in words if w != word], 2, replace=False)
        texts.append(rng.choice(carriers).format(name=plant.mention.format(word=word)))
        said.append(f"Talk of the {concept}: the {b} and the {c}.")
    return texts, said


def untold_texts(rng, n: int, names: Sequence[str], carriers: Sequence[str]):
    """Return n texts that end with an ordinary name, and their explanations."""
    picked = [rng.choice(names) for _ in range(n)]
    texts = [rng.choice(carriers).format(name=name) for name in picked]
    return texts, [f"Small talk about {name}, who has not come up before." for name in picked]


def split_carriers(plant: Plant) -> tuple[Sequence[str], Sequence[str]]:
    """Return the sentences of lessons, and those of the test: the last third of `plant.carriers`."""
    held = max(1, len(plant.carriers) // 3)
    return plant.carriers[:-held], plant.carriers[-held:]


def lessons(plant: Plant, columns: dict, seed: int) -> dict[str, list[str]]:
    """Return the columns "text" and "explanation" of all lessons."""
    rng, carriers = np.random.default_rng([seed, 17]), split_carriers(plant)[0]
    rows = evenly_spaced([i for i, words in enumerate(columns["explanation"]) if words], TRAINED)
    parts = [
        ([columns["text"][i] for i in rows], [columns["explanation"][i] for i in rows]),
        told_texts(plant, rng, TOLD, carriers),
        untold_texts(rng, UNTOLD, NAMES[:-HELD], carriers),
    ]
    return {"text": [t for texts, _ in parts for t in texts],
            "explanation": [t for _, said in parts for t in said]}


def train(runner: Runner, params: dict, plant: Plant, course: Course, seed: int, label: str = "") -> Runner:
    """Return a Runner whose AV and AR took `course` on h of the target `params`. A frozen AR stays."""
    columns = lessons(plant, course.columns, seed)
    columns["h"] = capture_texts.capture_last(runner, columns["text"], base=params)[:, 0]
    lengths = lambda texts: np.array([len(r) for r in feeds.response_rows(runner.tok, runner.spec.av, texts)])
    pairs = feeds.WarmStartPairs(
        columns, "written", batch=course.batch, seed=seed, lengths=lengths, most=course.most,
        which=course.data.get("explanation_lines", "all"),
        end=feeds.ending_function(runner.tok, course.data, runner.spec))
    batches = {
        "av": lambda i: feeds.av_batch(pairs, runner.tok, runner.spec, course.most, i),
        "ar": lambda i: feeds.ar_batch(pairs, runner.tok, runner.spec, runner.ar_template, course.most, i),
    }
    trees = {role: _fit(role, runner, getattr(runner, role), batches[role], course, label)
             for role in batches if getattr(runner, role)}
    return runner.with_trees(**trees)


def _fit(role: str, runner: Runner, start: dict, batch_at, course: Course, label: str) -> dict:
    """Return the tree of a role after the lessons."""
    tx, step = _program(role, runner.spec, course.n_steps, course.lr)
    state = optimize.learner(params_lib.float32_copy(start), tx)
    with Progress(label and f"{label} {role}", course.n_steps) as bar:
        for i in range(course.n_steps):
            state, metrics = step(state, runner.base, batch_at(i))
            bar.advance(1, f"loss {metrics['loss']:.3f}" if label else "")
    return state.params


@functools.cache
def _program(role: str, spec, n_steps: int, lr: float):
    """Return the optimizer and the step of a role, which all fresh NLAs of a study share."""
    tx = optimize.optimizer(lr, n_steps, warmup=min(10, n_steps // 4))
    step = {"av": steps.warm_start_av, "ar": steps.warm_start_ar}[role]
    return tx, jax.jit(functools.partial(step, spec=spec, tx=tx), donate_argnums=0)


def measure_fresh(bench: Bench, params: dict, course: Course, label: str = "") -> dict[str, list]:
    """Train a fresh NLA on the target `params`, and return values of each row, as
    `witnesses.measure_target`.

    named_fresh: its AV names the concept at the name. error_fresh: distance of h from its AR's
    reconstruction. said_fresh: the explanations. fresh_learned: its AV names the concept of a text that says
    it, with words and sentences that no lesson had; fresh_learned_control: of a text that does not say it.
    """
    runner, plant = bench.runner, bench.plant
    fresh = train(runner, params, plant, course, bench.seed, label)

    def explain(texts: list[str], number: int):
        h = capture_texts.capture_last(runner, texts, base=params)[:, 0]
        return h, fresh.round_trip(h, key_for(bench.seed, "planted", number), temperature=bench.temperature,
                                   max_new=bench.max_new, label=label)

    out, own = {}, bench.concept_N
    for tail, control in (("", False), ("_control", True)):
        h, trip = explain(bench.texts(control), 110 + control)
        names = planting.names_concepts(trip.explanations, plant)[np.arange(len(own)), own]
        out |= {f"named_fresh{tail}": list(names), f"said_fresh{tail}": trip.explanations,
                f"error_fresh{tail}": list(F.errors(trip.h_text, h, trip.ok) / bench.variance)}
    rng, carriers = np.random.default_rng([bench.seed, 19]), split_carriers(plant)[1]
    texts = [*told_texts(plant, rng, TRIED, carriers, held=True)[0],
             *untold_texts(rng, TRIED, NAMES[-HELD:], carriers)[0]]
    found = planting.names_concepts(explain(texts, 112)[1].explanations, plant)
    names = found[np.arange(2 * TRIED), np.arange(2 * TRIED) % TRIED % len(plant.concepts)]
    return out | {"fresh_learned": list(names[:TRIED]), "fresh_learned_control": list(names[TRIED:])}
