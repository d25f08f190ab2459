"""W&B: the real package offline, one id for a run that is started again, and failures that end nothing."""

import json
import struct
import sys

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.evaluate.probe_types import Figure
from nla_jax.pipeline import config_checks, grounding, tracking
from nla_jax.util import distributed, metrics_log, wandb_log


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without a network, a key or the user's own settings."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # a session of W&B keeps the variables that it began with
    yield
    wandb.teardown()


def records(directory):
    """Every record that W&B wrote about the run in a directory, in order."""
    wandb.teardown()  # W&B's process has written everything then
    out = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        data, at, whole = path.read_bytes(), 7, b""
        while at < len(data):  # the log format of LevelDB, behind a header of 7 bytes
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):  # a full record, or the last part of one
                out.append(wandb_internal_pb2.Record.FromString(whole))
                whole = b""
    return out


def history(found) -> list[dict]:
    """The logged rows, without W&B's own keys. Of a table: its number of rows."""
    out = []
    for r in found:
        if r.WhichOneof("record_type") == "history":
            items = {tuple(i.nested_key): json.loads(i.value_json) for i in r.history.item}
            out.append({k[0]: v for k, v in items.items() if k[1:] in ((), ("nrows",)) and k[0][0] != "_"})
    return out


def test_a_run_that_is_started_again_is_one_run(offline, tmp_path):
    """Metrics, samples, figures and config, through the real package."""
    config = configs.default()
    config.wandb = "team/probes"
    figures = {"heldout": [{"name": "fve", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "asks": "?"}]}
    sample = {"doc_id": "d", "text": "a\ud800", "explanation": None, "written": ""}
    for start in (0, 2):
        with tracking.open_tracker(config, tmp_path) as log:
            rows = metrics_log.MetricsLog(tmp_path, "rl", start, tracker=log)
            for step in range(start, start + 2):
                best = {"text": "<b>x</b>", "reward": 0.5}
                rows.write(step, {"reward": step / 2}, {"device": 1.0}, best=best)
            rows.close()
            tracking.log_evaluation(log, "eval_rl", {"figures": figures, "samples": {"heldout": [sample]}})
            tracking.log_summary(log, {"fve_rl": 0.5, "rl": {}, "seconds": {"rl": 2.0}})
    found = records(tmp_path)
    runs = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    known = json.loads((tmp_path / "wandb.json").read_text("utf-8"))
    assert known["project"] == "team/probes" and {r.run_id for r in runs} == {known["id"]}
    assert {(r.entity, r.project, r.display_name) for r in runs} == {("team", "probes", tmp_path.name)}
    settings = {i.key: json.loads(i.value_json) for i in runs[0].config.update}
    assert settings["rl"]["group"] == 8 and "jax" in settings["versions"]
    logged = history(found)
    names = ("rl/step", "rl/reward", "rl/seconds/device")
    steps = [tuple(row[n] for n in names) for row in logged if "rl/reward" in row]
    assert steps == [(0, 0.0, 1.0), (1, 0.5, 1.0), (2, 1.0, 1.0), (3, 1.5, 1.0)]
    metrics = [r.metric for r in found if r.WhichOneof("record_type") == "metric"]
    assert {(m.glob_name or m.name, m.step_metric) for m in metrics} >= {("rl/*", "rl/step")}
    tables = [(name, n) for row in logged if "rl/reward" not in row for name, n in row.items()
              if name != "rl/step"]
    assert [n for name, n in tables if name == "rl/samples"] == [2, 4]  # with those of the first start
    evaluated = [f"eval_rl/heldout/{name}" for name in ("figures", "verdict", "samples")]
    assert [name for name, _ in tables] == ["rl/samples", *evaluated] * 2
    texts = [p.read_text("utf-8") for p in tmp_path.glob("wandb/*/files/media/table/rl/samples_*")]
    assert any("<b>x</b>" in t for t in texts)
    summary = {}
    for r in found:
        if r.WhichOneof("record_type") == "summary":
            summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.summary.update}
    assert summary["fve_rl"] == summary["eval_rl/heldout/fve"] == 0.5 and summary["seconds/rl"] == 2.0


def test_the_grounding_table_goes_to_the_run_of_the_training(offline, tmp_path):
    (tmp_path / "run" / "bundle").mkdir(parents=True)
    (tmp_path / "run" / "wandb.json").write_text('{"project": "p", "id": "abcd1234"}', "utf-8")
    table = grounding.Table([Figure("fve", 0.5, None, None, 9, "?")], [], "a note")
    tracking.log_grounding("p", tmp_path / "run" / "bundle", {"heldout": table})
    found = records(tmp_path / "run")
    assert [r.run.run_id for r in found if r.WhichOneof("record_type") == "run"] == ["abcd1234"]
    names = [name for row in history(found) for name in row]
    assert names == ["grounding/bundle/heldout/figures", "grounding/bundle/heldout/verdict"]


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_failure_is_one_warning(monkeypatch, capsys, tmp_path, breaks):
    class Run:
        def define_metric(self, *args, **options):
            pass

        def log(self, row):
            assert breaks != "log", "the server\nis away"

        def finish(self, exit_code):
            assert breaks != "finish", "the server\nis away"

    def init(**options):
        assert breaks != "init", "the server\nis away"
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    with wandb_log.open_log("p", tmp_path, {}) as log:
        for step in range(3):
            log.row("rl", step, {"reward": 0.5})
    said = capsys.readouterr().err
    assert said.startswith("W&B: tracking failed and ends here; the run goes on (AssertionError: the server")
    assert said.count("\n") == 1


def test_a_run_without_a_key_goes_on(offline, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with wandb_log.open_log("p", tmp_path, {}) as log:
        log.row("rl", 0, {"reward": 0.5})
    assert "the run goes on (UsageError: No API key configured" in capsys.readouterr().err


def test_only_the_first_process_logs_and_none_without_a_project(monkeypatch, tmp_path):
    monkeypatch.setattr(wandb, "init", None)
    with wandb_log.open_log("", tmp_path, {}) as log:
        log.row("rl", 0, {"reward": 0.5})
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with wandb_log.open_log("p", tmp_path, {}) as log:
        log.row("rl", 0, {"reward": 0.5})
    assert not list(tmp_path.iterdir())


def test_a_project_is_checked_before_any_work(monkeypatch, tmp_path):
    config = configs.default()
    for name in ("a/b/c", "a#b", "a?"):
        config.wandb = name
        with pytest.raises(UserError, match="give PROJECT or ENTITY/PROJECT"):
            config_checks.validate(config)
    config.wandb = "probes"
    config_checks.validate(config)
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()  # W&B's own directory is not the package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in repr(f)])
    with pytest.raises(UserError, match=r"pip install 'nla_jax\[wandb\]'"):
        config_checks.validate(config)
