"""The whole table of a bundle: what it needs, what it repeats, what it refuses, and its verdict."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate import probe_table, trained_readers
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.probes import language, samples, surface
from nla_jax.evaluate.verdict import verdict
from nla_jax.pipeline import grounding
from nla_jax.util.keys import key_for

CHEAP = ("round_trip", "samples", "independent", "surface", "language")


@pytest.fixture(scope="module")
def small(finished, quick, tmp_path_factory):
    """A finished run whose readers train two steps."""
    run = tmp_path_factory.mktemp("table") / "run"
    shutil.copytree(finished / "run", run)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROWS": 16, "STEPS": 2, "BATCH": 4}.items():
            patch.setattr(surface, name, value)
        yield run


def test_same_seed_same_table_and_readers_are_trained_once(small, monkeypatch):
    first = grounding.evaluate_bundle(small / "bundle", probes=CHEAP, batch=8)["heldout"].figures
    names = {f.name for f in first}
    assert names >= {"fve", "fve_best_of_4", "fve_warm_ar", "fve_other_ar", "fve_last_4", "beyond_last_30",
                     "fve_frozen_target", "fve_greedy", "fve_quotation_equal_frozen", "last_word",
                     "logp_warm_av", "copied"}
    assert (small / "readers" / "surface" / "params").is_dir()
    monkeypatch.setattr(trained_readers.loop, "fit", None)  # nothing is trained again
    again = grounding.evaluate_bundle(small / "bundle", probes=CHEAP, batch=8)["heldout"].figures
    assert again == first
    for f in first:
        assert np.isfinite(f.value) and f.n > 0 and f.asks, f
        assert f.low is None or f.low - 1e-9 <= f.value <= f.high + 1e-9, f


def test_readers_of_other_settings_are_not_taken(small, monkeypatch):
    grounding.evaluate_bundle(small / "bundle", probes=["surface"], batch=8)
    monkeypatch.setattr(surface, "LR", 2e-3)
    trained = []
    fit = trained_readers.loop.fit
    monkeypatch.setattr(
        trained_readers.loop, "fit", lambda name, *a, **k: trained.append(name) or fit(name, *a, **k)
    )
    grounding.evaluate_bundle(small / "bundle", probes=["surface"], batch=8)
    assert trained == ["surface"]


def test_a_bundle_alone_gives_the_figures_that_need_nothing_else(small, tmp_path):
    """Without its warm start, probes leave out what they cannot say."""
    shutil.copytree(small / "bundle", tmp_path / "bundle")
    found = grounding.evaluate_bundle(
        tmp_path / "bundle", data=small / "data", probes=["independent", "language"], batch=8
    )
    names = {f.name for f in found["heldout"].figures}
    assert "fve_warm_ar" not in names and "logp_warm_av" not in names
    assert {"fve_other_ar", "logp_target", "copied"} <= names
    assert any(t.startswith("fve_warm_ar: needs") for t in found["heldout"].left_out)


def test_figures_that_the_rows_are_too_few_for_are_named(small):
    found = grounding.evaluate_bundle(small / "bundle", probes=["retrieval", "form"], rows=3, batch=8)[
        "heldout"
    ]
    assert {f.n for f in found.figures if f.name.startswith("fve_")} == {3}
    assert [t.split(":")[0] for t in found.left_out] == [
        "retrieval_logp_4, retrieval_logp_16, retrieval_logp_64",
        "retrieval_embed_4, retrieval_embed_16, retrieval_embed_64, retrieval_embed_256",
        "suffix_10",
    ]
    assert found.as_json()["left_out"] == found.left_out and found.as_json()["verdict"] == found.verdict


def test_refuses_before_any_work(small, tmp_path):
    with pytest.raises(UserError, match="probe='magic': must be one of 'round_trip', "):
        grounding.evaluate_bundle(small / "bundle", probes=["magic"])
    with pytest.raises(UserError, match="no split 'test'; it has heldout, ood, rl, warm"):
        grounding.evaluate_bundle(small / "bundle", splits=["test"])
    with pytest.raises(UserError, match="9999 rows requested; split 'heldout' of .* has "):
        grounding.evaluate_bundle(small / "bundle", rows=9999)
    shutil.copytree(small / "bundle", tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle" / "params")  # a bundle without its AR
    with pytest.raises(UserError, match="damaged or half copied"):
        grounding.evaluate_bundle(tmp_path / "bundle", data=small / "data")


def test_another_seed_stays_within_the_intervals(toy_run):
    def figures(seed):
        found = grounding.evaluate_bundle(toy_run / "bundle", probes=["round_trip"], seed=seed)[
            "heldout"
        ].figures
        return {f.name: f for f in found}

    first, other = figures(0), figures(1)
    moved = [n for n, f in first.items() if f.value != other[n].value]
    assert {"fve", "fve_shuffled"} <= set(moved)
    for name in ("fve", "fve_shuffled", "fve_token_path"):
        assert first[name].low <= other[name].value <= first[name].high, name


def test_copied_counts_words_in_long_known_passages():
    n = language.RUN
    known = [f"word{i}" for i in range(n + 1)]
    runs = language._runs([" ".join(known)])
    assert language._count_copied(known, runs) == n + 1
    assert language._count_copied(known[: n - 1], runs) == 0
    assert language._count_copied(["zero", *known[:n], "last"], runs) == n


def figure(name, value, low, high):
    return Figure(name, value, low, high, 10, "asks")


def test_verdict_is_no_stronger_than_the_intervals():
    mean = figure("fve_mean_direction", -0.15, -0.16, -0.14)
    good = [figure("fve", 0.31, 0.25, 0.37), mean, figure("fve_shuffled", -0.5, -0.6, -0.4)]
    assert verdict(good)[0].startswith("Words carry 0.31 of the variance [0.25, 0.37]")
    assert verdict(good)[1].startswith("They are about this activation")
    weak = [figure("fve", -0.1, -0.2, 0.0), mean, figure("fve_shuffled", -0.15, -0.25, -0.05)]
    assert [s.split(":")[0] for s in verdict(weak)] == [
        "Not shown that words carry anything",
        "Not shown that they are about this activation",
    ]
    margin = figure("opposite_margin", 0.02, -0.01, 0.05)
    assert "Not shown that AR tells a claim from its opposite" in verdict([margin])[0]
    assert verdict([figure("opposite_margin_frozen", 0.02, -0.01, 0.05)]) == []
    assert verdict([figure("opposite_margin_frozen", -0.03, -0.05, -0.01)])[0].startswith("OPPOSITES")
    margin = dataclasses.replace(margin, low=0.01)
    assert "Not shown" not in verdict([margin])[0]
    assert not verdict([])
    claims = [figure("claim_precision", 0.3, 0.25, 0.35),
              figure("claim_precision_shuffled", 0.02, 0.01, 0.03)]
    (said,) = verdict(claims)
    assert said == "Of their claims, 30% are true of the text by rules (2% are true of another text)."
    claims[0] = dataclasses.replace(claims[0], low=0.02)
    assert verdict(claims)[0].startswith("Not shown that their claims are true")


def test_verdict_begins_with_the_frozen_target():
    mean = figure("fve_mean_direction", -0.15, -0.16, -0.14)
    fve, frozen = figure("fve", 0.31, 0.25, 0.37), figure("fve_frozen_target", 0.3, 0.2, 0.4)
    first = verdict([fve, frozen, mean])[0]
    assert first.startswith("The frozen target can read the bare words: FVE 0.30 [0.20, 0.40]")
    assert "no private code can raise this" in first and "never trained" in first
    little = dataclasses.replace(frozen, value=-0.05, low=-0.1, high=0.0)
    assert verdict([fve, little, mean])[0].startswith("The frozen target gets something")
    none = dataclasses.replace(frozen, value=-0.2, low=-0.3, high=-0.1)
    assert verdict([fve, none, mean])[0].startswith("Not shown that the frozen target can read")


def test_verdict_on_description_lines_and_quotations_of_equal_length():
    gain = figure("description_gain", 0.05, 0.02, 0.08)
    frozen = figure("description_gain_frozen", -0.01, -0.02, 0.01)
    (said,) = verdict([gain, frozen])
    assert said.startswith("The description lines add 0.05 [0.02, 0.08]") and "-0.01" in said
    (said,) = verdict([dataclasses.replace(gain, low=-0.01)])
    assert said.startswith("Not shown that the description lines add anything")
    quoted = [figure("fve", 0.4, 0.3, 0.5), figure("fve_quotation_equal", 0.2, 0.1, 0.3),
              figure("fve_quotation_equal_frozen", 0.5, 0.4, 0.6)]
    for low, high, told in ((0.7, 0.9, "they say less"), (0.9, 1.1, "not shown"), (1.1, 1.3, "say more")):
        (said,) = verdict([*quoted, figure("over_quotation", 0.8, low, high)])
        assert told in said and "0.50 [0.40, 0.60], the explanation 0.40" in said
    assert verdict(quoted)[0].startswith("Of equal length: a quotation")


def test_verdict_on_strangers_channels_quotations_and_readers():
    fve, mean = figure("fve", 0.31, 0.25, 0.37), figure("fve_mean_direction", -0.15, -0.16, -0.14)
    stranger = [figure("fve_other_ar", 0.227, 0.2, 0.25), figure("fve_other_ar_shuffled", -0.5, -0.6, -0.4)]
    said = verdict([fve, mean, *stranger])[-1]
    assert said.startswith("A stranger can read them: an AR that never met this AV") and "82%" in said
    # A reader who knows the genre and not the text is no reader.
    genre = [stranger[0], figure("fve_other_ar_shuffled", 0.21, 0.19, 0.23)]
    assert verdict([fve, mean, *genre])[-1].startswith("Not shown that anyone but their own AR")
    assert verdict([figure("token_path_gain", 0.2, 0.1, 0.3)])[0].startswith("CHANNEL")
    for low in (-0.1, 0.001):  # shown, but next to nothing
        assert verdict([figure("token_path_gain", 0.01, low, 0.1)])[0].startswith("No hidden channel")
    swap = figure("counterfactual_cos", 0.45, 0.4, 0.5)
    for low, told in ((0.1, "AR moves where the target moves"), (-0.1, "Not shown")):
        assert told in verdict([swap, figure("counterfactual_margin", 0.2, low, 0.3)])[0]
    words = [figure("fve_last_4", 0.5, 0.4, 0.6), figure("beyond_last_4", 0.1, 0.05, 0.15),
             figure("beyond_last_4_shuffled", -0.2, -0.3, -0.1)]
    assert "more than the last 4 words" in verdict(words)[0]
    more = [figure("fve_last_30", 0.6, 0.5, 0.7), figure("beyond_last_30", 0.02, 0.01, 0.03),
            figure("beyond_last_30_shuffled", -0.2, -0.3, -0.1)]
    assert "more than the last 30 words" in verdict(words + more)[0]
    crossing = [words[0], figure("beyond_last_4", 0.1, -0.05, 0.15), words[2]]
    assert verdict(crossing)[0].startswith("Not shown that they say more than a quotation")
    assert "(chance 6%)" in verdict([figure("retrieval_embed_16", 0.5, 0.4, 0.6)])[0]
    assert verdict([figure("retrieval_logp_16", 0.07, 0.02, 0.1)])[0].startswith("Not shown that the target")
    assert verdict([figure("copied", 0.9, 0.8, 1.0)])[0].startswith("COPIED: 90%")
    assert "31%" in verdict([figure("kl_recovered", 0.31, 0.2, 0.4)])[0]
    assert verdict([figure("kl_recovered", 0.31, -0.2, 0.4)])[0].startswith("Not shown that the target")


def test_few_documents_give_no_interval():
    assert F.ratio_interval(np.ones(6), np.ones(6), list("aabbcc")) == (None, None)
    assert F.interval(np.ones(6), np.ones(6), list("aabbcc")) == (None, None)
    assert F.ratio_interval(np.ones(4), np.ones(4), list("abcd")) == (1.0, 1.0)


def test_samples_by_hand(nla, finished):
    columns = store.load_columns(finished / "run" / "data", "rl")
    columns = {k: v[:8] for k, v in columns.items()}
    trip = nla.runner.round_trip(columns["h"], jax.random.key(0), temperature=1.0, max_new=16, label="")
    ev = Evidence(nla.runner, columns, trip, np.asarray(nla.mean_direction), max_new=16)
    found = {f.name: f.value for f in samples.samples(ev)}
    h, errors, kept = columns["h"], [], []
    for i in range(4):
        key = key_for(0, "samples", i)
        texts = trip.explanations if not i else nla.runner.explain(h, key, temperature=1.0, max_new=16)
        ok, rebuilt = np.array([bool(t) for t in texts]), nla.runner.reconstruct(texts)
        errors.append(F.errors(rebuilt, h, ok))
        kept.append(np.where(ok[:, None], F.normalise(rebuilt), 0.0))
    variance = F.variances(h)
    assert found["fve_best_of_4"] == pytest.approx(F.fve(np.min(errors, 0), variance), abs=1e-5)
    assert found["fve_one_of_4"] == pytest.approx(F.fve(np.mean(errors, 0), variance), abs=1e-5)
    read = np.any([k.any(1) for k in kept], 0)
    of_mean = F.errors(np.sum(kept, 0), h, read)
    assert found["fve_mean_of_4"] == pytest.approx(F.fve(of_mean, variance), abs=1e-5)
    assert not samples.samples(dataclasses.replace(ev, temperature=0.0))


def test_every_probe_is_documented():
    page = (Path(__file__).parent.parent.parent / "docs" / "grounding.md").read_text("utf-8")
    for name in probe_table.PROBES:
        assert f"## `{name}`" in page, name
