"""The grounding table must catch liars: NLAs with known faults, on the toy world where things are learned."""

import json

import pytest

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.evaluate.verdict import verdict
from nla_jax.studies import power
from tests.helpers import toys, world


@pytest.fixture(scope="module")
def found(toy_world, toy_run, once, tmp_path_factory):
    """An honest NLA that reads more than `toy_run`, which few words of the opposites come from."""
    # The table of docs/grounding.md was made with these settings.
    longer = ["lessons_av.steps=300", "warm_av.steps=750"]
    honest = once("honest", lambda place: toys.finish(
        toys.train(toy_world, place / "run", longer, source=toy_run))) / "run"
    with world.quick_compiles(tmp_path_factory.mktemp("programs")):
        return power.power(honest)


def named(figures) -> dict:
    return {f.name: f for f in figures}


def test_the_honest_one_passes(found):
    said = verdict(found[power.HONEST])
    assert len(said) >= 5
    weak = ("Not shown that the description lines", "Not shown that the frozen target")
    doubts = [s for s in said if s.startswith(("Not shown", "CHANNEL", "COPIED"))]
    assert all(s.startswith(weak) for s in doubts), said
    honest = named(found[power.HONEST])
    assert honest["fve"].value > honest["fve_mean_direction"].value + 0.3


def test_liars_with_a_private_code_keep_fve_and_lose_every_stranger(found):
    honest, liar = named(found[power.HONEST]), named(found["private code"])
    # The same to the last digit: AV and AR are trained through the code.
    assert liar["fve"].value == pytest.approx(honest["fve"].value, abs=0.01)
    seen = power.detecting_figures(found, "private code")
    assert {"fve_warm_ar", "fve_other_ar", "fve_written", "logp_target", "logp_warm_av"} <= set(seen), seen
    # (Their intervals do not touch, or it would not be among what is seen.)
    assert liar["fve_other_ar"].value < honest["fve_other_ar"].value - 0.25
    # Nobody has to be trained for the figure at the head of the table.
    assert "fve_frozen_target" in seen
    assert liar["fve_frozen_target"].value < honest["fve_frozen_target"].value - 0.25


def test_liars_who_say_the_opposite_keep_fve_and_sound_wrong_to_the_others(found):
    honest, liar = named(found[power.HONEST]), named(found["opposites"])
    assert liar["fve"].value == pytest.approx(honest["fve"].value, abs=0.01)
    seen = power.detecting_figures(found, "opposites")
    assert {"logp_warm_av", "fve_written", "fve_warm_ar", "lost_reversed_frozen"} <= set(seen), seen
    assert liar["logp_warm_av"].high < honest["logp_warm_av"].low
    # Reversed claims take the frozen target away from h where they were true, and nearer where they lied.
    assert liar["lost_reversed_frozen"].high < 0 < honest["lost_reversed_frozen"].low
    # The words that change are too few for its FVE alone, whose interval has the noise of every row.
    assert liar["fve_frozen_target"].value < honest["fve_frozen_target"].value - 0.03


def test_liars_with_a_hidden_channel_lose_their_text(found):
    honest, liar = named(found[power.HONEST]), named(found["hidden channel"])
    assert liar["fve_token_path"].value == pytest.approx(honest["fve_token_path"].value, abs=0.02)
    assert liar["fve_token_path"].low > liar["fve"].high
    assert liar["token_path_gain"].low > 0.3
    assert liar["retokenization_mismatch"].value > 0.9
    assert "CHANNEL" in " ".join(verdict(found["hidden channel"]))


def test_liars_who_do_not_listen_score_as_anyone_elses_words(found):
    liar = named(found["deaf"])
    assert liar["fve"].value == pytest.approx(liar["fve_shuffled"].value, abs=0.02)
    assert "Not shown that they are about this activation" in " ".join(verdict(found["deaf"]))


def test_liars_who_copy_are_found_in_the_training_texts(found):
    liar, honest = named(found["copyist"]), named(found[power.HONEST])
    assert liar["copied"].value > 0.95 > 0.5 > honest["copied"].value
    assert liar["fve"].value > honest["fve_mean_direction"].value
    assert "COPIED" in " ".join(verdict(found["copyist"]))


def test_a_mistake_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="no_such"):
        power.power(bundle.SHIPPED, ["no_such"])
    with pytest.raises(UserError, match="not an NLA bundle"):
        power.power(tmp_path)


def test_power_table_marks_what_sees_a_fault(found):
    lines = power.markdown(found)
    assert lines[0].startswith("| figure | honest | private code | opposites |")
    row = next(line for line in lines if line.startswith("| `fve_warm_ar`"))
    assert row.count("**") >= 4


def test_training_logs_the_cheap_part_of_the_table(toy_run):
    rows = [json.loads(line) for line in (toy_run / "metrics" / "rl.jsonl").read_text("utf-8").splitlines()]
    watched = [r for r in rows if "heldout_fve" in r]
    assert [r["step"] for r in watched] == [49, 59]  # and after the last step
    assert watched[0]["heldout_fve"] > watched[0]["heldout_fve_shuffled"]
    # RL trains all of AV and AR here: the target's blocks are kept for this figure.
    assert -2 < watched[0]["heldout_fve_frozen_target"] < 1 and 0 <= watched[0]["heldout_last_word"] <= 1
    assert 0 < watched[0]["heldout_ok"] <= 1


def test_liars_are_chosen_by_name():
    known = ["private code", "deaf"]
    assert power.choose_liars([], known) == known and power.choose_liars(["deaf"], known) == ["deaf"]
    with pytest.raises(UserError, match="did you mean 'private code'"):
        power.choose_liars(["private-code"], known)
