"""Traces of a few steps: the files are there and have the steps' events, and a failure ends nothing."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.pipeline import config_checks
from nla_jax.training import loop, step_trace
from tests.helpers import buckets


def fit(workdir, profile: str, steps: int = 6):
    add = jax.jit(lambda s, b: ({"sum": s["sum"] + b}, {"loss": s["sum"]}))
    step, batch = lambda s, b, i: add(s, b), lambda i: np.float32(i + 1)
    return loop.fit("rl", {"sum": jnp.float32(0)}, step, batch, steps, workdir=workdir, profile=profile)


def events(directory) -> list[dict]:
    """The events of the one Perfetto trace in a directory."""
    (file,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def steps_of(directory) -> list[int]:
    """The numbers of the steps in a trace."""
    return sorted(int(e["args"]["step_num"]) for e in events(directory) if e.get("name") == "rl")


def test_the_trace_has_the_events_of_its_steps(tmp_path, capsys):
    assert float(fit(tmp_path, "2:4")["sum"]) == 21
    place = tmp_path / "profile" / "rl" / "process-0"
    assert steps_of(place) == [2, 3]
    assert any("add" in e.get("name", "") or "lambda" in e.get("name", "") for e in events(place))
    assert list(place.glob("plugins/profile/*/*.xplane.pb"))
    said = capsys.readouterr().err
    assert f"perfetto_trace.json.gz below {place} at https://ui.perfetto.dev" in said
    assert f"xprof --logdir {place}" in said


def test_a_stage_may_end_before_the_trace(tmp_path):
    fit(tmp_path, "rl:5:50")
    assert steps_of(tmp_path / "profile" / "rl" / "process-0") == [5]


def test_other_stages_are_not_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", None)
    fit(tmp_path, "warm_av:2:4")
    fit(tmp_path / "none", "")
    assert not (tmp_path / "profile").exists()


def test_each_process_of_a_pod_has_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    trace = step_trace.StepTrace("0:1", "rl", tmp_path)
    with trace, trace.step(0):
        pass
    assert [p.name for p in (tmp_path / "profile" / "rl").iterdir()] == ["process-3"]


def test_a_trace_goes_to_a_bucket(tmp_path):
    with buckets.stand_in(tmp_path / "buckets") as root:
        trace = step_trace.StepTrace("0:1", "rl", "gs://mine/run")
        with trace, trace.step(0):
            pass
        assert steps_of(root / "mine" / "run" / "profile" / "rl" / "process-0") == [0]


def test_a_failure_of_the_profiler_ends_nothing(tmp_path, monkeypatch, capsys):
    def fails(*args, **options):
        raise RuntimeError("only one profile\nat a time")

    monkeypatch.setattr(jax.profiler, "start_trace", fails)
    assert float(fit(tmp_path, "1:3")["sum"]) == 21
    said = capsys.readouterr().err
    assert said.count("the run goes on without a trace (RuntimeError: only one profile at a time)") == 1


@pytest.mark.parametrize("steps, named", [
    ("10", "give FIRST:END"),
    ("3:3", "give FIRST:END"),
    ("rl:-1:4", "give FIRST:END"),
    ("eval_rl:1:2", "must be one of 'lessons_ar'"),
    ("rl:100:101", "there are only 100 steps"),
    ("rl_drill:0:1", "there are only 0 steps"),
    ("1000:1001", "there are only 1000 steps"),
])
def test_steps_that_there_are_not(steps, named):
    config = configs.default()
    config.profile_steps = steps
    with pytest.raises(UserError, match=named):
        config_checks.validate(config)
