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
from nla_jax.rl import roles
from nla_jax.studies import (
    facts,
    fresh_nla,
    hiders,
    hiding,
    hiding_table,
    known_readers,
    planted_facts,
    planting,
    stages,
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
    kinds = (hiders.Hider("near", 1.0), hiders.Hider("reinforce", 1.0), hiders.Hider("late"))
    made = hiding.Settings("tiny", kinds, (0.1,), ("reinforce",), plant_steps=2, hide_steps=1,
                           reinforce_steps=1, attack_steps=2, sentences=2, attacked=1)
    return dataclasses.replace(made, **changes)


NATURAL = {"h": tiny.activations(6), "text": [f"text {i}" for i in range(6)]}
COLUMNS = {"text": ["a b c", "c d e", "e f g"], "explanation": ["words\nmore words", "", "other words"]}
COURSE = fresh_nla.Course(COLUMNS, {"explanation_lines": "first", "ending_tokens": 4}, 6, lr=1e-2, batch=4,
                          most=128)


def run(runner, out, **changes) -> dict:
    return hiding.study(runner, NATURAL, np.eye(32, dtype=np.float32), settings(**changes), out, max_new=12,
                        course=COURSE, plant=PLANT)


def test_a_study_from_end_to_end_is_resumed(runner, tmp_path, monkeypatch):
    found = run(runner, tmp_path)
    assert list(found["targets"]) == ["honest", "planted", "near 1", "reinforce 1", "late"]
    assert list(found["attacks"]) == ["none 0", "random 0.1", "innocent 0.1", "chosen 0.1", "silent 0.1"]
    by = {n: hiding_table.by_name(fs) for n, fs in found["targets"].items()}
    # Blocks up to K are the honest target's, so h is, and nothing that reads h there can see a difference.
    assert by["honest"]["distance"].value == by["late"]["distance"].value == 0
    assert by["late"]["bypass"].value == pytest.approx(1)
    assert by["planted"]["kept"].value == 1 and by["planted"]["distance"].value > 0
    assert by["honest"]["named"].value == by["late"]["named"].value
    rows = json.loads((tmp_path / "measure_near_1.json").read_text("utf-8"))
    assert {len(rows[k]) for n in ROWS for k in (n, f"{n}_control")} == {4}
    rows = json.loads((tmp_path / "fresh_reinforce_1.json").read_text("utf-8"))
    assert {len(rows[f"{n}_fresh{t}"]) for n in ("named", "error", "said") for t in ("", "_control")} == {4}
    assert len(rows["fresh_learned"]) == len(rows["fresh_learned_control"]) == fresh_nla.TRIED
    has = {n: "named_fresh_margin" in figures for n, figures in by.items()}
    assert has == {"honest": True, "planted": True, "near 1": False, "reinforce 1": True, "late": False}
    assert by["honest"]["named_fresh_margin"].value == 0  # it is what the others' margins are measured from
    lines = hiding.markdown(found)
    text = "\n".join(lines)
    assert "| near 1 |" in text and "silent 0.1" in text
    cells = {x.split(" | ")[0]: x.split(" | ")[4] for x in lines if x.startswith("| ")}
    assert cells["| near 1"] == "–" and cells["| reinforce 1"].startswith(("0", "-", "**"))
    def work(*_, **__):
        raise AssertionError("a second start does no work")

    monkeypatch.setattr(planting, "teach", work)
    monkeypatch.setattr(hiders, "hide", work)
    monkeypatch.setattr(fresh_nla, "train", work)
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

    hider = hiders.Hider(kind, 100.0)
    hidden = hiders.hide(runner, PLANT, adapter, hider, honest, 1.0, n_steps=20, lr=1e-2, max_new=12)
    assert pull(hiders.attach(runner, hidden, hider)) < pull(hiders.attach(runner, adapter, hider))


def test_the_estimate_of_reinforce_is_the_gradient_of_the_mean_cost(runner):
    """Of answers of one token all probabilities are known, and so is the gradient of the mean cost."""
    spec, ids = runner.spec, np.arange(20, 36, dtype=np.int32)
    cost_K = (ids % 3 == 0).astype(np.float32)
    h_BD = jnp.asarray(tiny.activations(2))

    def mean_cost(h_BD):
        rows = jnp.repeat(h_BD[:1], len(ids), 0)
        logp_K = roles.answer_logp(runner.av, runner.base, spec, rows, ids[:, None])[:, 0]
        p_K = jnp.exp(logp_K)
        return (p_K * cost_K).sum(), p_K

    exact_BD, p_K = jax.jit(jax.grad(mean_cost, has_aux=True))(h_BD)
    # Each answer counts as often as it is sampled.
    weight_NT = np.zeros((2 * len(ids), 1), np.float32)
    weight_NT[: len(ids), 0] = np.asarray(p_K) * cost_K
    batch = {"said_NT": np.tile(ids, 2)[:, None], "weight_NT": weight_NT,
             "from_N": np.repeat([0, 1], len(ids))}
    loss = lambda h_BD: hiders.score_loss(runner.av, runner.base, spec, h_BD, batch)
    got_BD, exact_BD = np.asarray(jax.jit(jax.grad(loss))(h_BD)), np.asarray(exact_BD)
    assert got_BD == pytest.approx(exact_BD, rel=1e-3, abs=1e-3 * float(np.abs(exact_BD).max()))
    assert np.abs(exact_BD[0]).max() > 0 and not got_BD[1].any()


def test_the_cost_of_an_answer_by_hand():
    cost = hiders.naming_cost(["news of there", "the there", "", "nothing"], np.array([0, 1, 1, 0]), PLANT)
    assert cost.tolist() == [1, 0, 1, 0]  # "of" is the other concept's; a failed answer costs as much


def test_advantages_are_of_answers_to_one_activation(runner, monkeypatch):
    texts = ["the", "no", "no", "no", "no", "of", "of", "no"]
    ids = np.zeros((8, 5), np.int32)
    length = np.array([2, 3, 1, 1, 5, 1, 1, 1])
    seen, said = {}, iter(texts)

    def write(self, h_ND, key, **options):
        seen.update(h=h_ND, **options)
        return ids, length, None, None, None, None, None

    monkeypatch.setattr(type(runner), "write", write)
    monkeypatch.setattr(hiders, "read_tag", lambda _: next(said))
    h = tiny.activations(2)
    got = hiders.sampled_answers(runner, PLANT, h, np.array([0, 1]), 0, max_new=5, seed=0)
    assert np.array_equal(seen["h"], np.repeat(h, 4, 0)) and seen["temperature"] == 1.0
    per_answer = got["weight_NT"].sum(1) / length * 8
    assert per_answer.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25, -0.5, 0.5, 0.5, -0.5])
    assert (got["weight_NT"] != 0).sum(1).tolist() == length.tolist()
    assert got["from_N"].tolist() == [0] * 4 + [1] * 4


def test_answers_without_a_gradient_are_left_out(runner, monkeypatch):
    said = iter(["no"] * 8 + ["no", "the", "no", "no"] + ["the"] * 4)
    ids, length = np.arange(16 * 40).reshape(16, 40), np.full(16, 30)
    monkeypatch.setattr(type(runner), "write", lambda *a, **k: (ids, length, *[None] * 5))
    monkeypatch.setattr(hiders, "read_tag", lambda _: next(said))
    got = hiders.sampled_answers(
        runner, PLANT, tiny.activations(4), np.array([0, 1, 0, 0]), 0, max_new=40, seed=0)
    # Only the answers to the third h differ in their cost; 32 columns hold the longest answer.
    assert np.array_equal(got["said_NT"], ids[8:12, :32])
    assert got["from_N"].tolist() == [2] * 4
    assert (got["weight_NT"][:, 0] * 16).tolist() == pytest.approx([-0.25, 0.75, -0.25, -0.25])


def test_lessons_are_fair_and_say_concepts():
    plant = planting.NEWS
    texts, said = fresh_nla.told_texts(plant, np.random.default_rng(0), 64, plant.carriers)
    own = np.arange(64) % len(plant.concepts)
    for part in (texts, said):
        found = planting.names_concepts(part, plant)
        assert found[np.arange(64), own].all() and found.sum() == 64
    held = fresh_nla.told_texts(plant, np.random.default_rng(0), 64, plant.carriers, held=True)[0]
    assert not {t.split()[-1] for t in held} & {t.split()[-1] for t in texts}
    texts, said = fresh_nla.untold_texts(np.random.default_rng(0), 64, fresh_nla.NAMES, plant.carriers)
    assert not planting.names_concepts([*texts, *said], plant).any()
    columns = fresh_nla.lessons(plant, COLUMNS, 0)
    assert columns["text"][:2] == ["a b c", "e f g"] and columns["explanation"][1] == "other words"
    assert len(columns["text"]) == len(columns["explanation"]) == 2 + fresh_nla.TOLD + fresh_nla.UNTOLD
    everything = " ".join([*columns["text"], *columns["explanation"]])
    learned, tried = fresh_nla.split_carriers(plant)
    hidden = (*plant.names, *plant.controls, *fresh_nla.NAMES[-fresh_nla.HELD:],
              *(s.format(name="") for s in (*plant.asked, *tried)))
    assert not [part for part in hidden if part in everything]
    assert learned and tried and not set(learned) & set(tried)
    assert not {*fresh_nla.NAMES} & {*plant.names, *plant.controls}


def test_a_fresh_nla_learns_its_lessons(runner):
    fresh = fresh_nla.train(runner, runner.base, PLANT, COURSE, 0)
    columns = fresh_nla.lessons(PLANT, COLUMNS, 0)
    texts, words = columns["text"][-8:], columns["explanation"][-8:]
    h = hiders.capture_texts.capture_last(runner, texts)[:, 0]
    rows = [r[: COURSE.most] for r in fresh_nla.feeds.response_rows(runner.tok, runner.spec.av, words)]
    ids, valid, _ = fresh_nla.feeds.pad_rows(rows, runner.spec.av.pad)
    loss = {name: float(hiders.answer_loss(r.av, r.base, r.spec, jnp.asarray(h),
                                           {"said_BT": ids, "said_mask_BT": valid}))
            for name, r in (("old", runner), ("fresh", fresh))}
    assert loss["fresh"] < loss["old"]
    assert not np.array_equal(fresh.ar["head"], runner.ar["head"])


def test_hiders_by_name():
    got = hiders.parse_hiders("near:1, innocent:0.3,reinforce:3,late")
    assert [h.name for h in got] == ["near 1", "innocent 0.3", "reinforce 3", "late"]
    for wrong in ("far:1", "near", "near:-1", "near:x", "late:2", "", "near:inf"):
        with pytest.raises(UserError, match="--hiders"):
            hiders.parse_hiders(wrong)
    assert hiding.parse_kinds("near, innocent") == ("near", "innocent") and hiding.parse_kinds("") == ()
    with pytest.raises(UserError, match="--fresh: 'far'"):
        hiding.parse_kinds("far")
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


def test_a_chance_difference_of_the_honest_target_is_no_witness():
    docs = [name for name in "abcdefgh" for _ in range(2)]
    plain, honest = rows_by_hand(), rows_by_hand(named=[0.0] * 16, named_control=[1.0] * 16)
    planted = hiding_table.target_figures(plain, plain, plain, docs)
    found = hiding_table.target_figures(plain, plain, honest, docs)
    by = hiding_table.by_name(found)
    assert by["named_margin"].low == 1 and by["named_above"].value == 0
    assert hiding_table.witnesses_of(found, planted) == []


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


def test_a_study_does_not_continue_in_another_dtype(tmp_path):
    settings = planted_facts.Settings("tiny")
    for _ in range(2):
        stages.open_stages(tmp_path, settings, "float32", ["a"])
    with pytest.raises(UserError, match="in another dtype"):
        stages.open_stages(tmp_path, settings, "bfloat16", ["a"])
