"""Runs that begin where another one is, and several runs on one page."""

import json
import shutil

import pytest

from nla_jax import configs
from nla_jax.pipeline import reuse, stages
from tests.helpers import world

pytestmark = pytest.mark.usefixtures("quick")
TRAINED = ["extract", "lessons_ar", "lessons_av", "warm_ar", "warm_av", "eval_warm"]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, [*TRAINED, "rl_drill"]),
        ({"rl": {"kl": 0.5}, "checkpoint_every": 7}, TRAINED),
        ({"rl": {"max_new": 9}}, TRAINED[:-1]),
        ({"data": {"explanation_lines": "last"}}, TRAINED[:3]),
        ({"data": {"ending_tokens": 3}}, TRAINED[:1]),
        ({"ar_template": "<a>\n{explanation}\n</a>"}, ["extract", "lessons_av"]),
        ({"ar": {"kind": "frozen"}}, ["extract", "lessons_av", "warm_av", "rl_drill"]),
        ({"lessons_av": {"form": "drill"}}, ["extract", "lessons_ar", "warm_ar"]),
        ({"warm_av": {"lessons": 0.5}}, TRAINED[:4]),
        ({"data": {"explained_positions": 2, "explanation_lines": "first"}}, []),
        ({"warm_av": {"lr": 0.01}}, TRAINED[:4]),
        ({"lessons_ar": {"lr": 0.01}}, ["extract", "lessons_av", "warm_av", "rl_drill"]),
        ({"rl_drill": {"kl": 0.5}}, TRAINED),
        ({"av": {"rank": 3}}, ["extract", "lessons_ar", "warm_ar"]),
        ({"alpha": 2.0}, ["extract", "lessons_ar", "warm_ar"]),
        ({"dtype": "float32"}, []),
        ({"data": {"positions": 3}}, []),
        ({"activations": "online"}, ["extract"]),
        ({"seed": 4}, []),
        ({"chat_template": "x"}, []),
    ],
)
def test_what_agrees(changes, stages):
    stored = configs.default()
    present = configs.default()
    present.update(changes)
    assert reuse.agreeing_stages(stored.to_dict(), present) == stages


def test_a_variant_runs_only_what_it_changes(finished, tmp_path, monkeypatch):
    """Equal settings give equal figures, and nothing of the other run is touched."""
    ran = []
    for name in ("extract", "lessons_ar", "lessons_av", "warm_ar", "warm_av", "eval_warm", "rl"):
        work = dict(stages.STAGES)[name]
        monkeypatch.setattr(
            stages, "STAGES",
            tuple((n, (lambda r, w=work, m=n: ran.append(m) or w(r)) if n == name else w0)
                  for n, w0 in stages.STAGES),
        )
    run = finished / "run"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    same = stages.run(world.config(finished), tmp_path / "same", source=run)
    assert ran == ["rl"]
    theirs = json.loads((run / "summary.json").read_text("utf-8"))
    assert same["warm_start"] == theirs["warm_start"] and same["rl"] == theirs["rl"]

    ran.clear()
    none = stages.run(world.config(finished, rl={"steps": 0}), tmp_path / "none", source=run)
    assert ran == ["rl"]  # which has nothing to do but write the bundle
    assert none["rl"] == none["warm_start"] == theirs["warm_start"]
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before

    # A begun run is resumed, whatever --from says.
    ran.clear()
    assert stages.run(world.config(finished), tmp_path / "same", source=run) == same and ran == []


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_refusals(finished, tmp_path, capsys, monkeypatch):
    def refused(source, workdir, *argv):
        where = ("--config", finished / "experiment.py", "--workdir", workdir, "--from", source)
        assert world.nla("train", *where, *argv) == 2
        return capsys.readouterr().err

    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    run = finished / "run"
    assert "not a run" in refused(tmp_path, tmp_path / "new")
    assert "is the --workdir itself" in refused(run, run)
    line = refused(run, tmp_path / "new", "--config.seed=4")
    assert "no finished stage agrees with this config (it differs in seed)" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_compared(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    run = finished / "run"
    other = shutil.copytree(run, tmp_path / "no_rl")
    config = json.loads((other / "config.json").read_text("utf-8"))
    config["rl"]["steps"] = 0
    config["av"]["affine"] = "a|b"
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    page = tmp_path / "page.md"
    command = ("results", run, other, "--out", page, "--made-by", "nla train X")
    assert world.nla(*command) == 0
    lines = page.read_text("utf-8").splitlines()
    first, second = lines[-2:]
    fve = json.loads((run / "summary.json").read_text("utf-8"))["fve_rl"]
    assert first.startswith("| run |  | ") and f"→ {fve:.3f} [" in first
    assert "av.affine a&#124;b, rl.steps 0" in second and "→" not in second
    assert first.count("|") == second.count("|") == lines[-4].count("|")
    assert "    nla train X" in lines
    assert world.nla(*command, "--figures", "ok,fve") == 0
    head = page.read_text("utf-8").splitlines()[-4]
    assert "| ok | fve | steps of RL |" in head and "fve_shuffled" not in head
    assert world.nla(*command, "--figures", "same_document") == 2
    assert "no run has the figure 'same_document'" in capsys.readouterr().err

    summary = json.loads((other / "summary.json").read_text("utf-8"))
    summary["rows"]["heldout"] += 1
    (other / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert world.nla(*command) == 2
    assert "they cannot be compared" in capsys.readouterr().err
