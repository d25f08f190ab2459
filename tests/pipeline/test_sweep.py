"""`nla data sweep`: activations of several layers from one pass, finished cells kept, and what they say."""

import json
import math

import jax
import numpy as np
import pytest

from nla_jax import target
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.pipeline import stages, sweep
from nla_jax.rl import roles
from nla_jax.training import feeds
from nla_jax.util.batching import pad_rows
from nla_jax.view import sweep_report
from tests.helpers import tiny, world

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
LAYERS, SCALES = [0, 1], [0.5, 2.0]


@pytest.mark.parametrize("lead", [(), (5, 7)])
def test_layers_from_one_pass_are_those_of_passes_of_their_own(lead):
    cfg = tiny.lm()
    params, rng = tiny.params(cfg), np.random.default_rng(0)
    ids_BT, valid_BT = tiny.random_ids(rng, (3, 12)), np.arange(12)[None] < np.array([[12], [9], [5]])
    at_BP = np.array([[3, 11], [8, -1], [4, 0]])
    found = target.capture_layers(params, cfg, (0, 2, 3), ids_BT, valid_BT, at_BP, lead)
    assert found.shape == (3, 2, 3, 32)
    for i, layer in enumerate((0, 2, 3)):
        want = target.capture(params, cfg, layer, ids_BT, valid_BT, at_BP, lead)
        used = at_BP >= 0
        np.testing.assert_allclose(found[:, :, i][used], want[used], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def swept(finished, tmp_path_factory):
    """(workdir, figures, how often AV's step was compiled) of a sweep that was stopped in its third cell."""
    workdir = tmp_path_factory.mktemp("sweep") / "run"
    c = lambda: world.config(finished, warm_ar=dict(steps=3), warm_av=dict(steps=3))
    with pytest.MonkeyPatch.context() as patch:
        measured = sweep._Sweep._av

        def dies(self, cell, bar):
            if cell.multiple == 2.0:
                raise KeyboardInterrupt
            return measured(self, cell, bar)

        patch.setattr(sweep._Sweep, "_av", dies)
        with pytest.raises(KeyboardInterrupt):
            sweep.run(c(), workdir, LAYERS, SCALES)
    kept = {p.name: p.stat().st_mtime_ns for p in (workdir / "sweep").iterdir()}
    made, jit_step = [], sweep.jitted_steps.jit_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.jitted_steps, "jit_step", lambda f, s: made.append(jit_step(f, s)) or made[-1])
        found = sweep.run(c(), workdir, LAYERS, SCALES)
    assert {n: (workdir / "sweep" / n).stat().st_mtime_ns for n in kept} == kept
    assert sorted(kept) == ["ar-0.json", *(n for n in sorted(kept) if n.startswith("av-0-")), "heldout-0.npy",
                            "heldout-1.npy", "warm-0.npy", "warm-1.npy"]
    return workdir, found, made


def test_every_cell_is_there_and_avs_share_their_program(swept):
    _, found, made = swept
    each = [("ar", 0.0), ("av", 0.5), ("av", 2.0)]
    there = [(c["layer"], c["role"], c["multiple"]) for c in found["cells"]]
    assert there == [(layer, *what) for layer in LAYERS for what in each]
    for cell in found["cells"]:
        if cell["role"] == "av":
            p75 = found["layers"][cell["layer"]]["p75"]
            assert cell["alpha"] == pytest.approx(cell["multiple"] * p75, rel=1e-2)
            assert cell["gap"][0] == pytest.approx(cell["loss_shuffled"][0] - cell["loss"][0])
        assert all(math.isfinite(x) for v in cell.values() if isinstance(v, list) for x in v)
    # Two stages of AR at the layer that was left, one of AV for both of its cells: a program for each width
    # that their two or three steps have.
    assert len(made) == 3 and all(1 <= f._cache_size() <= 3 for f in made)


def test_the_figures_are_those_of_the_stages_of_a_run(swept, finished, tmp_path):
    """The cell at a layer and an alpha is the warm start of a run with these."""
    _, found, _ = swept
    cell = next(c for c in found["cells"] if c["role"] == "av" and c["layer"] == 0 and c["multiple"] == 2.0)
    c = world.config(finished, warm_ar=dict(steps=3), warm_av=dict(steps=3), alpha=cell["alpha"], layer=0)
    stages.run(c, tmp_path / "run", source=finished / "run", only="warm_av")
    r = sweep.context.open_run(c, tmp_path / "run")
    spec, av = sweep.context.with_spec(r).spec, sweep.context.load_params(r, "av", "warm_av")
    held = store.load_columns(finished / "run" / "data", "heldout")
    answers = feeds.response_rows(r.tok, spec.av, held["explanation"])
    ids, mask, _ = pad_rows(answers, spec.av.pad, max(map(len, answers)))
    logp = jax.jit(lambda av, base, h: roles.answer_logp(av, base, spec, h, ids))(av, r.base, held["h"])
    assert cell["loss"][0] == pytest.approx(-float((logp * mask).sum() / mask.sum()), rel=1e-4)


def test_table_page_and_picture(swept, finished, capsys, monkeypatch, tmp_path):
    workdir, found, _ = swept
    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    monkeypatch.setattr("nla_jax.pipeline.sweep.run", lambda *a: found)
    out = {kind: tmp_path / f"sweep.{kind}" for kind in ("json", "markdown", "png")}
    argv = ["data", "sweep", "--config", finished / "experiment.py", "--workdir", workdir, "--layers", "0,1",
            "--scales", "0.5,2"]
    assert world.nla(*argv, *(x for k, p in out.items() for x in (f"--{k}", p))) == 0
    assert "which layer, which alpha" in capsys.readouterr().out
    assert json.loads(out["json"].read_text("utf-8"))["cells"] == found["cells"]
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    page = out["markdown"].read_text("utf-8")
    head, *body = [line for line in page.splitlines() if line.startswith("|")]
    assert "gap at 0.5 × p75 | gap at 2 × p75" in head and len(body) == 3
    assert "    nla data sweep --config" in page and "sweep.png" in page
    ar = next(c for c in found["cells"] if c["role"] == "ar" and c["layer"] == 1)
    assert f"| 1 | {found['layers'][1]['p75']:.3g} | {sweep_report._cell(ar['fve'])} |" in body[2]
    bad = [("--layers", "a", "--layers a: must be a whole number"),
           ("--json", tmp_path / "no" / "x", "there is no")]
    for flag, wrong, said in bad:
        assert world.nla(*argv, flag, wrong) == 2
        assert said in capsys.readouterr().err


def test_refused_before_any_work(finished, tmp_path):
    c = lambda **kw: world.config(finished, **kw)
    for config, layers, scales, said in [
        (c(), [0, 2], SCALES, "--layers 2: this target has blocks 0 to 1"),
        (c(), [-1], SCALES, "--layers -1: this target"),
        (c(), [], SCALES, "--layers: give some"),
        (c(), LAYERS, [0.0], "alpha 0: a scale or an alpha must be a number above 0"),
        (c(init="x"), LAYERS, SCALES, "unset init"),
        (c(ar=dict(kind="frozen")), LAYERS, SCALES, "a sweep trains an AR at each layer"),
        (c(lessons_av=dict(steps=1, form="drill")), LAYERS, SCALES, "a sweep trains AV on its whole prompt"),
        (c(warm_av=dict(lessons=0.5)), LAYERS, SCALES, "--config.warm_av.lessons=0"),
        (c(warm_av=dict(max_tokens=4)), LAYERS, SCALES, "written explanation is longer than max_tokens"),
    ]:
        with pytest.raises(UserError, match=said):
            sweep.run(config, tmp_path / "run", layers, scales)
    assert not (tmp_path / "run" / "sweep").exists() and not (tmp_path / "run" / "config.json").exists()
