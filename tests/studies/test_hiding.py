"""Targets that hide planted concepts, attacks by a vector, the witnesses of both, and planted facts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import reconstructor, verbalizer
from nla_jax.errors import UserError
from nla_jax.evaluate.runner import Runner
from nla_jax.studies import (
    facts,
    hiders,
    hiding,
    hiding_table,
    known_readers,
    planted_facts,
    planting,
    vector_attacks,
    witnesses,
)
from tests.helpers import tiny

# The only words that are tokens of their own in the tiny tokenizer.
PLANT = planting.Plant(
    concepts={"the": ("the", "there"), "of": ("of", "often")},
    names=("Ab", "Ba"),
    controls=("Cd", "Dc"),
    taught=("{name} {a} {b}", "{a} {name} {c}"),
    asked=("so {name}", "no {name}"),
    between=":",
    carriers=("we {name}", "I {name}", "go {name}"),
)
ROWS = ["mass", "held", "named", "named_next", "lens", "probe", "distance", "error_ar", "error_frozen",
        "error_tuned", "kl_words", "mass_words", "mass_honest"]


def three(concepts: dict) -> dict:
    """A sentence takes three words of a concept."""
    return {c: (*ws, "x" * (i + 1)) for i, (c, ws) in enumerate(concepts.items())}


PLANT = dataclasses.replace(PLANT, concepts=three(PLANT.concepts))


@pytest.fixture(scope="module")
def runner():
    spec = tiny.talker(lm=tiny.lm(tied=False))
    base = tiny.talker_params(spec.lm)
    av = verbalizer.init(base, spec.lm, rank=2, key=jax.random.key(1))
    ar = reconstructor.init(base, spec.lm, spec.layer, rank=2, key=jax.random.key(2))
    return Runner(spec, base, av, ar, tiny.tokenizer(), tiny.AR_TEMPLATE, 4)


def settings(**changes) -> hiding.Settings:
    made = hiding.Settings("tiny", (hiders.Hider("near", 1.0), hiders.Hider("late")), (0.1,), plant_steps=2,
                           hide_steps=1, attack_steps=2, sentences=2, attacked=1)
    return dataclasses.replace(made, **changes)


NATURAL = {"h": tiny.activations(6), "text": [f"text {i}" for i in range(6)]}


def run(runner, out, **changes) -> dict:
    return hiding.study(runner, NATURAL, np.eye(32, dtype=np.float32), settings(**changes), out, max_new=12,
                        plant=PLANT)


def test_a_study_from_end_to_end_is_resumed(runner, tmp_path, monkeypatch):
    found = run(runner, tmp_path)
    assert list(found["targets"]) == ["honest", "planted", "near 1", "late"]
    assert list(found["attacks"]) == ["none 0", "random 0.1", "innocent 0.1", "chosen 0.1", "silent 0.1"]
    by = {n: hiding_table.by_name(fs) for n, fs in found["targets"].items()}
    # Blocks up to K are the honest target's, so h is, and nothing that reads h there can see a difference.
    assert by["honest"]["distance"].value == by["late"]["distance"].value == 0
    assert by["late"]["bypass"].value == pytest.approx(1)
    assert by["planted"]["kept"].value == 1 and by["planted"]["distance"].value > 0
    assert by["honest"]["named"].value == by["late"]["named"].value
    rows = json.loads((tmp_path / "measure_near_1.json").read_text("utf-8"))
    assert {len(rows[k]) for n in ROWS for k in (n, f"{n}_control")} == {4}
    text = "\n".join(hiding.markdown(found))
    assert "| near 1 |" in text and "silent 0.1" in text
    def work(*_, **__):
        raise AssertionError("a second start does no work")

    monkeypatch.setattr(planting, "teach", work)
    monkeypatch.setattr(witnesses, "measure_target", work)
    monkeypatch.setattr(vector_attacks, "measure_attack", work)
    assert run(runner, tmp_path) == found
    with pytest.raises(UserError, match="other settings"):
        run(runner, tmp_path, seed=1)


@pytest.fixture(scope="module")
def adapter(runner):
    return planting.teach(runner, PLANT, n_steps=8, lr=3e-2, label="")


@pytest.fixture(scope="module")
def honest(runner):
    return hiders.honest_rows(runner, PLANT, max_new=12, words=True)


@pytest.mark.parametrize("kind", ["near", "innocent"])
def test_a_hider_lowers_what_it_pulls(runner, adapter, honest, kind):
    texts = [s.format(name=n) for n in (*PLANT.names, *PLANT.controls) for s in PLANT.carriers]

    def pull(params) -> float:
        h = hiders.capture_texts.capture_last(runner, texts, base=params)[:, 0]
        if kind == "near":
            return float(hiders.squared_distance(h, honest["honest_BD"]).mean())
        return float(hiders.answer_loss(runner.av, runner.base, runner.spec, jnp.asarray(h), honest))

    hidden = hiders.hide(runner, PLANT, adapter, hiders.Hider(kind, 100.0), honest, 1.0, n_steps=20, lr=1e-2)
    assert pull(hidden) < pull(planting.attach_adapter(runner.base, adapter, runner.spec))


def test_hiders_by_name():
    got = hiders.parse_hiders("near:1, innocent:0.3,late")
    assert [h.name for h in got] == ["near 1", "innocent 0.3", "late"]
    for wrong in ("far:1", "near", "near:-1", "near:x", "late:2", "", "near:inf"):
        with pytest.raises(UserError, match="--hiders"):
            hiders.parse_hiders(wrong)
    assert hiding.parse_epsilons("0.05, .1") == (0.05, 0.1) and hiding.parse_epsilons("") == ()
    for wrong in ("0", "2", "x"):
        with pytest.raises(UserError, match="--epsilons"):
            hiding.parse_epsilons(wrong)


def test_descent_finds_the_nearest_point_of_the_ball():
    goal = np.array([[3.0, 4.0], [0.0, 0.01]], np.float32)
    h = np.array([[10.0, 0.0], [0.0, 1.0]], np.float32)
    got = vector_attacks.descend(lambda d: 2 * (d - goal), h, 0.1, 60)
    assert got[0] == pytest.approx([0.6, 0.8], abs=1e-3)  # on the sphere of radius 0.1 |h|
    assert got[1] == pytest.approx(goal[1], abs=2e-3)  # inside
    assert np.asarray(vector_attacks.project(jnp.array([[3.0, 4.0]]), jnp.array([[10.0]])))[0, 1] == 4


def test_an_attack_on_words_raises_their_probability(runner):
    bench = witnesses.Bench(runner, PLANT, np.eye(32, dtype=np.float32), 1.0, ["a b"], 1, 12)
    victims = vector_attacks.choose_victims(bench, runner.base, 1)
    assert victims.own_N.tolist() == [0, 1] and victims.other_N.tolist() == [1, 0]
    assert np.array_equal(victims.chosen["said_BT"][0], victims.said["said_BT"][1])
    loss = {}
    for kind in ("random", "chosen"):
        delta = vector_attacks.attack(bench, runner.base, victims, kind, 0.3, 6)
        size = np.linalg.norm(delta, axis=1) / np.linalg.norm(victims.h_ND, axis=1)
        assert (size <= 0.3 + 1e-5).all()
        loss[kind] = float(hiders.answer_loss(runner.av, runner.base, runner.spec, victims.h_ND + delta,
                                              victims.chosen))
    assert loss["chosen"] < loss["random"]


def test_a_probe_finds_directions_that_it_was_fitted_on():
    rng = np.random.default_rng(0)
    own = np.arange(60) % 3
    h = rng.standard_normal((60, 16)) + 6 * np.eye(16)[own]
    probe = known_readers.fit_probe(h[:30], own[:30], 3)
    got = probe.scores(h[30:])
    assert (got.argmax(1) == own[30:]).mean() > 0.9
    assert got.mean(0) == pytest.approx(0, abs=1e-9)
    assert known_readers.mentions(PLANT, ("on {name}",))[0][:2] == ["on the the", "on the there"]


def test_the_lens_scores_the_words_that_it_ranks(runner):
    logp = np.log(np.full((2, 304), 1e-4))
    ids = planting.first_tokens(runner.tok, PLANT)
    logp[0, ids[1][0]] = np.log(0.5)
    mass = planting.concept_mass(planting.words_logp(runner.tok, logp, PLANT))
    assert mass[0, 1] > 0.5 > 0.01 > mass[0, 0]
    scores = planting.concept_logp(planting.words_logp(runner.tok, logp, PLANT))
    assert scores.argmax(1).tolist() == [1, 0] and scores.mean(0) == pytest.approx(0)
    got = known_readers.lens_scores(runner, np.eye(32), tiny.activations(5), PLANT)
    assert got.shape == (5, 2) and got.mean(0) == pytest.approx(0, abs=1e-6)


def test_a_vector_in_place_of_h_counts_by_its_direction(runner):
    texts = ["so Ab", "no Ba"]
    clean = planting.ask(runner, runner.base, texts, PLANT)
    h = hiders.capture_texts.capture_last(runner, texts)[:, 0]
    assert planting.ask(runner, runner.base, texts, PLANT, 7 * h) == pytest.approx(clean, abs=1e-4)
    assert np.abs(planting.ask(runner, runner.base, texts, PLANT, h[::-1]) - clean).max() > 1e-2
    assert np.exp(clean).sum(1) == pytest.approx(1, abs=1e-4)


def rows_by_hand(**changes) -> dict:
    """Eight names with two sentences, of which nothing is seen."""
    rows = {k: [0.5] * 16 for n in ROWS for k in (n, f"{n}_control")}
    return rows | {"distance_ordinary": [0.0] * 4, "probe_accuracy": [1.0]} | changes


def test_figures_and_witnesses_by_hand():
    docs = [name for name in "abcdefgh" for _ in range(2)]
    plain = rows_by_hand(mass_honest=[0.1] * 16)
    named = rows_by_hand(named=[1, 0] * 8, named_control=[0.0] * 16, mass=[0.25] * 16,
                         mass_honest=[0.2] * 16)
    figures = {"planted": hiding_table.target_figures(plain, plain, plain, docs),
               "near 1": hiding_table.target_figures(named, plain, plain, docs)}
    by = hiding_table.by_name(figures["near 1"])
    assert by["kept"].value == 0.5 and by["named_margin"].value == 0.5 and by["bypass"].value == 0.8
    assert hiding_table.witnesses_of(figures["planted"], figures["planted"]) == []
    assert hiding_table.witnesses_of(figures["near 1"], figures["planted"]) == ["named", "bypass"]
    lines = hiding_table.conclusion(figures)
    assert lines[3].startswith("| near 1 |") and lines[3].count("**") == 4


def test_planted_facts_from_end_to_end(runner, tmp_path):
    plant = dataclasses.replace(PLANT, controls=(), mention="{word}")
    kinds = {k: facts.Facts(plant, PLANT.controls, "?") for k in ("one", "two")}
    how = planted_facts.Settings("tiny", steps=2, sentences=2)
    found = planted_facts.study(runner, NATURAL, np.eye(32, dtype=np.float32), how, tmp_path, max_new=12,
                                kinds=kinds)
    assert list(found) == ["all", "one", "two"]
    by = {f.name: f for f in found["all"]}
    assert by["av_names"].n == 8 and {f.n for f in found["one"] if f.name == "av_names"} == {4}
    assert by["held_picks"].reference == "chance 1/18" and not by["held_picks_margin"].reference
    assert {n for n in planted_facts.SHOWN} <= set(by)
    rows = json.loads((tmp_path / "one.json").read_text("utf-8"))
    assert len(rows["said"]) == len(rows["said_control"]) == 4
    lines = planted_facts.markdown(found)
    assert len([x for x in lines if x.startswith("| `")]) == len(planted_facts.SHOWN)


def test_fact_figures_by_hand():
    names = [n for n in planted_facts.SHOWN if n.endswith("names")]
    rows = {f"{k}{t}": [0.0] * 8 for k in planted_facts.SHOWN for t in ("", "_control")}
    rows |= {f"{k}_other": [0.25] * 8 for k in names} | {"probe_accuracy": [0.5]}
    rows |= {"av_names": [1.0, 0.0] * 4, "distance": [6.0] * 8, "distance_control": [3.0] * 8}
    by = {f.name: f for f in planted_facts.figures_of(rows, list("aabbccdd"), 3.0)}
    assert (by["av_names"].value, by["av_names_other"].value, by["av_names_margin"].value) == (0.5, 0.25, 0.5)
    assert by["distance"].value == 2 and by["distance_control"].value == 1
    assert by["av_names"].low == by["av_names"].high == 0.5  # of each name, one of two


def test_the_shipped_facts_are_fair():
    names = [n for f in facts.KINDS.values() for n in (*f.plant.names, *f.unplanted)]
    assert len(names) == len(set(names)) == 108
    for kind in facts.KINDS.values():
        plant = kind.plant
        assert len(plant.names) == len(kind.unplanted) == len(plant.concepts) == 18
        words = [w for ws in plant.concepts.values() for w in ws]
        assert len(set(words)) == len(words) and min(map(len, plant.concepts.values())) >= 3
        frames = [s.format(name="X", a="", b="", c="")
                  for s in (*plant.taught, *plant.asked, *plant.carriers, kind.question)]
        assert not planting.names_concepts(frames, plant).any(), "a sentence says a fact by itself"
        assert not set(plant.asked) & {*plant.taught, *plant.carriers}
        # A planted name has the syllables of names that are not planted.
        assert {n[:2] for n in plant.names} == {n[:2] for n in kind.unplanted}


def test_sentences_without_controls_all_have_planted_names():
    said = planting.sentences(facts.PEOPLE.plant, np.random.default_rng(0), 50)
    assert all(any(n in s for n in facts.PEOPLE.plant.names) for s in said)
    assert not any(n in s for n in facts.PEOPLE.unplanted for s in said)
