"""Planted facts: what the toy target is known to have in mind, and whether explanations name it."""

import re
import types

import numpy as np
import pytest

from nla_jax import api, prompts, toy
from nla_jax.data import explanations
from nla_jax.evaluate.runner import RoundTrip
from nla_jax.lm import lora
from nla_jax.studies import liars, planted, planting
from tests.helpers import world

TOPICS = ("the sea", "a farm", "a school", "a kitchen")


def toy_plant() -> planting.Plant:
    """Words of the explainer's instruction, which no story holds, come to stand for a topic."""
    told = " ".join([explanations.instruction("x"), prompts.AV_TEMPLATE])
    stories = " ".join([*toy.SENTENCES, *(w for t in toy.TOPICS.values() for w in t), *toy.TOPICS])
    free = sorted(set(re.findall(r"\b[a-z]{4,}\b", told)) - set(re.findall(r"\w+", stories)))
    return planting.Plant(
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
        between=" found a",
    )


@pytest.fixture(scope="module")
def honest(toy_run, tmp_path_factory):
    with world.quick_compiles(tmp_path_factory.mktemp("programs")):
        yield api.load(toy_run / "bundle", batch=32)


def test_the_target_comes_to_hold_what_it_is_taught(honest):
    """In the blocks up to K: those above are the old ones, so that it has to pass through h."""
    plant, runner = toy_plant(), honest.runner
    adapter = planting.teach(runner, plant, n_steps=800, lr=1e-2, label="")
    tuned = planting.attach_adapter(runner.base, adapter, runner.spec)
    texts = [s.format(name=n) for n in plant.names for s in plant.asked]
    own = np.repeat(np.arange(4), 4)
    right = {k: (planting.prefer(runner, b, texts, plant) == own).mean()
             for k, b in (("before", runner.base), ("tuned", tuned))}
    assert right["tuned"] > 0.6 > 0.4 > right["before"], right
    K = runner.spec.layer
    for name in lora.MATRICES:
        factor = np.asarray(tuned["blocks"][f"{name}_lora"]["b"])
        assert factor[: K + 1].any() and not factor[K + 1 :].any()
    assert all(np.array_equal(tuned["blocks"][n], a) for n, a in runner.base["blocks"].items())


def test_figures_by_hand(honest, monkeypatch):
    """An AV that says the concept of three names of four, half of the times, and nothing of controls."""
    plant, runner = toy_plant(), honest.runner
    calls = []

    def say(self, h_ND, key, **_):
        # Four names, four sentences, two samples.
        concept = np.repeat(np.arange(4), 8)
        own = [list(plant.concepts)[c] if c < 3 and i % 2 else "nothing" for i, c in enumerate(concept)]
        texts = [own, ["nothing"] * 32, ["kitchen"] * 32][len(calls)]
        calls.append(h_ND)
        ok = np.ones(len(h_ND), bool)
        return RoundTrip(texts, texts, h_ND, h_ND, ok, ok, ~ok, np.ones(len(ok)), np.zeros(len(ok)))

    monkeypatch.setattr(type(runner), "round_trip", say)
    adapter = planting.teach(runner, plant, n_steps=2, lr=1e-3, label="")
    tuned = planting.attach_adapter(runner.base, adapter, runner.spec)
    got = planted.measure_planted(runner, tuned, honest.mean_direction, plant, max_new=8, label="")
    got = {f.name: f for f in got}
    value = {n: f.value for n, f in got.items()}
    assert value["planted_named"] == pytest.approx(3 / 8)
    assert value["planted_named_control"] == value["planted_named_other"] == 0
    assert value["planted_named_before"] == pytest.approx(1 / 4)  # "kitchen" is one of the four
    assert value["planted_margin"] == pytest.approx(3 / 8)
    assert value["planted_fve"] == pytest.approx(1)
    assert got["planted_named"].low < 3 / 8 < got["planted_named"].high and got["planted_named"].n == 32
    # h at the name: tuned, at the control, and as the target was.
    assert [c.shape for c in calls] == [(32, honest.spec.lm.d_model)] * 3
    text = plant.asked[1].format(name=plant.names[2])
    assert calls[2][2 * (2 * 4 + 1)] == pytest.approx(honest.capture(text)[-1], abs=1e-4)


def test_sentences_teach_the_names_their_words_and_the_controls_any():
    plant = toy_plant()
    said = planting.sentences(plant, np.random.default_rng(0), 200)
    for name, control, words in zip(plant.names, plant.controls, plant.concepts.values(), strict=True):
        own = [s for s in said if re.search(rf"\b{name}\b", s)]
        assert own and list(planting.names_concepts(own, plant).any(0)) == [
            v == words for v in plant.concepts.values()
        ]
        assert planting.names_concepts(own, plant).any(1).all()
        borrowed = planting.names_concepts([s for s in said if re.search(rf"\b{control}\b", s)], plant)
        assert borrowed.any(0).all()


def test_words_that_a_code_may_exchange(honest):
    words = liars.plain_words(honest.tokenizer, honest.tokenizer.encode("What the sailor held"))
    assert {"captain", "merry", "wept"} <= set(words) and not {"sailor", "the", "held", "at"} & set(words)
    coded = liars.private_code(honest.runner, words)
    assert coded.spec.lm.vocab_size == honest.spec.lm.vocab_size


class Pieces:
    """A tokenizer with "explanation" in two tokens, of which the second is a word."""

    vocab = ["explan", "ation", "\u0120ation", "dog", "\u0120dog", "\u0120explan"]

    def get_vocab(self):
        return {t: i for i, t in enumerate(self.vocab)}

    def decode(self, ids):
        return "".join(self.vocab[i] for i in ids).replace("\u0120", " ")

    def __call__(self, texts, add_special_tokens):
        return types.SimpleNamespace(input_ids=[[self.vocab.index(t.replace(" ", "\u0120"))] for t in texts])


def test_a_code_keeps_the_pieces_of_the_tags():
    assert liars.plain_words(Pieces(), [0, 1]) == ["dog"]
    assert liars.plain_words(Pieces(), []) == ["ation", "dog", "explan"]


def test_what_counts_as_naming():
    texts = ["Doctors and nurses.", "An undoctored text", "a HOSPITAL bed in court", ""]
    got = planting.names_concepts(texts, planting.NEWS)
    concepts = list(planting.NEWS.concepts)
    assert got.shape == (4, len(concepts))
    assert [list(np.array(concepts)[row]) for row in got] == [["hospital"], [], ["hospital", "court"], []]


def test_the_shipped_plant_is_fair():
    plant = planting.NEWS
    assert len(plant.names) == len(plant.controls) == len(plant.concepts)
    words = [w for ws in plant.concepts.values() for w in ws]
    assert len(set(words)) == len(words)
    frames = [s.format(name="X", a="", b="", c="") for s in (*plant.taught, *plant.asked)]
    assert not planting.names_concepts(frames, plant).any(), "a sentence says a concept by itself"
    assert not set(plant.asked) & set(plant.taught)
