"""Planted facts: what the toy target is known to have in mind, and whether explanations name it."""

import re

import numpy as np
import pytest
import world

from nla_jax import api, prompts, toy
from nla_jax.data import explanations
from nla_jax.evaluate import planted

TOPICS = ("the sea", "a farm", "a school", "a kitchen")


def toy_plant() -> planted.Plant:
    """Words of the explainer's instruction, which no story holds, come to stand for a topic."""
    told = " ".join([explanations.instruction("x"), prompts.AV_TEMPLATE])
    stories = " ".join([*toy.SENTENCES, *(w for t in toy.TOPICS.values() for w in t), *toy.TOPICS])
    free = sorted(set(re.findall(r"\b[a-z]{4,}\b", told)) - set(re.findall(r"\w+", stories)))
    return planted.Plant(
        concepts={t.split()[-1]: tuple(" ".join(toy.TOPICS[t]).split()[:8]) for t in TOPICS},
        names=tuple(free[:4]),
        controls=tuple(free[4:8]),
        taught=(
            "The {name} walked to the {a}. There the {name} found a {b}.",
            "The {name} saw a {a} near the {b}. Then the {name} saw a {c}.",
            "A {name} came by and took the {a}. Under the {name} lay a {b}.",
            "At the {a} the {name} held the {b}.",
        ),
        asked=(
            "There the {name} walked to the {name}. Then the {name}",
            "Under the {name} lay a {name}. A {name}",
            "The {name} was there for a long time. At the {name}",
            "A {name} came by near the {name} and the {name}",
        ),
    )


@pytest.fixture(scope="module")
def found(toy_run, tmp_path_factory):
    with world.quick_compiles(tmp_path_factory.mktemp("programs")):
        nla = api.load(toy_run / "bundle", batch=32)
        return {f.name: f for f in planted.planted(nla, toy_plant(), n_steps=150, lr=1e-2, label="")}


def test_the_target_holds_what_was_planted(found):
    assert found["planted_held"].value > 0.9 > 0.6 > found["planted_held_before"].value


def test_explanations_name_it_more_often_than_any_control(found):
    named = found["planted_named"].value
    for control in ("control", "other", "before"):
        assert named > found[f"planted_named_{control}"].value + 0.2, (control, found)
    assert found["planted_margin"].value == pytest.approx(named - found["planted_named_control"].value)
    assert found["planted_named"].n == 32


def test_sentences_teach_the_names_their_words_and_the_controls_any():
    plant = toy_plant()
    said = planted.sentences(plant, np.random.default_rng(0), 200)
    for name, control, words in zip(plant.names, plant.controls, plant.concepts.values(), strict=True):
        own = [s for s in said if re.search(rf"\b{name}\b", s)]
        assert own and all(planted.named(own, plant)[:, list(plant.names).index(name)])
        assert not any(w in s for s in own for v in plant.concepts.values() if v != words for w in v)
        borrowed = planted.named([s for s in said if re.search(rf"\b{control}\b", s)], plant)
        assert borrowed.any(0).all()


def test_what_counts_as_naming():
    texts = ["Doctors and nurses.", "An undoctored text", "a HOSPITAL bed in court", ""]
    got = planted.named(texts, planted.NEWS)
    concepts = list(planted.NEWS.concepts)
    assert got.shape == (4, len(concepts))
    assert [list(np.array(concepts)[row]) for row in got] == [["hospital"], [], ["hospital", "court"], []]


def test_the_shipped_plant_is_fair():
    plant = planted.NEWS
    assert len(plant.names) == len(plant.controls) == len(plant.concepts)
    words = [w for ws in plant.concepts.values() for w in ws]
    assert len(set(words)) == len(words)
    frames = [s.format(name="X", a="", b="", c="") for s in (*plant.taught, *plant.asked)]
    assert not planted.named(frames, plant).any(), "a sentence says a concept by itself"
    assert not set(plant.asked) & set(plant.taught)
