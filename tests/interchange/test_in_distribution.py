"""Held-out rows that are a share of imported files: wherever their figures are shown, it says so."""

import dataclasses
import json

import pytest

from nla_jax import cli
from nla_jax.data import store
from nla_jax.evaluate import figure_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.interchange import card_metadata, model_card
from nla_jax.pipeline import foreign_store, grounding
from nla_jax.view import compare, html_report, markdown_report
from nla_jax.view.explorer import bundles
from tests.helpers import world
from tests.view.test_html_report import write_run

FIGURES = [Figure(name, value, 0.2, 0.3, 12, "it asks") for name, value in
           (("fve", 0.25), ("fve_mean_direction", -0.5))]
NOTES = {"heldout": store.IN_DISTRIBUTION}
SHARE = {"imported": [["rl.parquet", 1, "x", "rl"]], "heldout": [0.02, 500]}
PLANS = [(SHARE, NOTES), ({**SHARE, "heldout": "files"}, {}), ({"layer": 7}, {})]


@pytest.fixture
def run(tmp_path):
    """A run on a store whose held-out rows are a share of imported files."""
    made = write_run(tmp_path)
    meta = json.loads((made / "data" / store.META).read_text("utf-8"))
    (made / "data" / store.META).write_text(json.dumps({**meta, "plan": SHARE, "files": {}}), "utf-8")
    figures = {"heldout": [dataclasses.asdict(f) for f in FIGURES]}
    summary = {"seed": 0, "target": "a target", "device": "cpu x 1", "versions": {}, "seconds": {"rl": 60},
               "steps": {}, "rows": {"heldout": 12}, "documents": {"heldout": 11}, "notes": NOTES,
               "warm_start": figures, "rl": figures}
    (made / "summary.json").write_text(json.dumps(summary), "utf-8")
    return made


@pytest.mark.parametrize("plan, notes", PLANS)
def test_the_stores_plan_says_where_held_out_rows_are_from(plan, notes, tmp_path):
    assert store.split_notes({"plan": plan}) == notes and store.split_notes({}) == {}
    source, linked = tmp_path / "source", tmp_path / "linked"
    source.mkdir()
    (source / store.META).write_text(json.dumps({"plan": plan, "files": {}}), "utf-8")
    foreign_store.link_store(source, linked, "a fingerprint")
    assert store.split_notes(store.read_meta(linked)) == notes


def test_the_table_of_an_evaluation_says_it(monkeypatch, tmp_path, capsys):
    table = grounding.Table(FIGURES, [], store.IN_DISTRIBUTION)
    assert table.verdict[0] == store.IN_DISTRIBUTION and len(table.verdict) == 2
    assert table.as_json()["note"] == store.IN_DISTRIBUTION
    assert grounding.Table(FIGURES, []).verdict == table.verdict[1:]
    assert figure_table.split_title("heldout", "") == "heldout"
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.setattr(grounding, "evaluate_bundle", lambda *a, **kw: {"heldout": table})
    page, values = tmp_path / "page.md", tmp_path / "values.json"
    assert world.nla("evaluate", "--bundle", "x", "--markdown", page, "--json", values) == 0
    assert capsys.readouterr().out.count("heldout (in-distribution): x") == 2
    text = page.read_text("utf-8")
    assert "## heldout (in-distribution)" in text and f"- {store.IN_DISTRIBUTION}" in text
    assert json.loads(values.read_text("utf-8"))["heldout"]["verdict"][0] == store.IN_DISTRIBUTION


def test_the_pages_of_a_run_say_it(run, tmp_path):
    page = html_report.write([run], tmp_path / "page.html").read_text("utf-8")
    assert store.IN_DISTRIBUTION in page and "All figures, heldout (in-distribution)" in page
    assert "FVE on held-out rows (in-distribution) with 95 % intervals" in page
    table = compare.write([run, run], tmp_path / "table.md").read_text("utf-8")
    assert table.count(store.IN_DISTRIBUTION) == 1


def test_the_results_of_a_run_say_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(markdown_report, "plot", lambda *a: a[1].write_bytes(b""))
    page = markdown_report.write(run, tmp_path / "results.md", "nla train").read_text("utf-8")
    assert f"## heldout (in-distribution)\n\n{store.IN_DISTRIBUTION}\n" in page


def test_the_card_says_it(run):
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    said = "\n".join(model_card._figures(summary, "rl"))
    title = "### Held-out documents of the training corpus (`heldout`) (in-distribution)"
    assert f"{title}\n\n{store.IN_DISTRIBUTION}\n" in said
    assert "in-distribution" not in "\n".join(model_card._figures({**summary, "notes": {}}, "rl"))
    meta = {"stage": "rl", "run": summary, "base_checkpoint": "a/b"}
    figures = model_card.figures_of(meta)
    head = "\n".join(model_card._headline(meta, figures))
    assert "| heldout (in-distribution), n = " in head and store.IN_DISTRIBUTION in head
    fields = card_metadata.front_matter(meta, figures, "name")
    assert "(in-distribution)" in fields["model-index"][0]["results"][0]["dataset"]["name"]


def test_the_explorer_says_it(run):
    meta = {"stage": "rl", "base_checkpoint": "a target", "extraction": {"layer_index": 1}, "roles": {},
            "lm": {"n_blocks": 3, "d_model": 8}, "run": {}}
    assert bundles.facts(run / "bundle", meta)["note"] == store.IN_DISTRIBUTION
    figures = {"heldout": [dataclasses.asdict(f) for f in FIGURES]}
    packed = {**meta, "run": {"notes": NOTES, "rl": figures}}
    assert bundles.facts(run.parent / "packed" / "bundle", packed)["note"] == store.IN_DISTRIBUTION
    for without in ({"notes": NOTES}, {"rl": figures}):
        assert bundles.facts(run.parent / "packed" / "bundle", {**meta, "run": without})["note"] == ""
