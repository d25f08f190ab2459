"""Two processes do what one does; what SIGTERM and kill -9 leave, in one process and in a pod."""

import json
import os
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.errors import UserError
from nla_jax.training import loop
from nla_jax.util import distributed, metrics_log
from tests.helpers import chaos, parity, world

# Largest difference between one process with one device and two with two each, as `parity` measures:
# sums are taken in another order.
TOLERANCE = 1e-4


# --- a pod ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pod_run(finished):
    """The workdir of the run of `finished` made by two processes of two devices, which were killed in a
    save and stopped in the middle of RL, and what was printed each time. Its name is an odd one, and a second
    start in it is tried."""
    workdir, printed = finished.parent / f"pod {chaos.ODD}", []

    def start():
        return chaos.Run(finished, workdir, 2, 2, ["checkpoint_every=1"])

    run = start()
    assert chaos.second_start(run, finished, 1) == ""
    run.wait_for(lambda: chaos.saving(workdir))
    run.send(signal.SIGKILL, [1])
    assert run.end() != 0, run.printed()
    assert not (workdir / "done" / "warm_av.json").exists()

    run = start()
    run.wait_for((workdir / "metrics" / "rl.jsonl").exists)
    run.send(signal.SIGTERM, [1])
    assert run.end() == 0, run.printed()
    printed.append([(run.logs / f"process-{i}.log").read_text("utf-8") for i in range(2)])
    assert not (workdir / "done" / "rl.json").exists()

    run = start()
    assert run.end() == 0, run.printed()
    printed.append([(run.logs / f"process-{i}.log").read_text("utf-8") for i in range(2)])
    return workdir, printed


def rows(workdir, stage: str) -> list[dict]:
    return metrics_log.read(workdir / "metrics" / f"{stage}.jsonl")


@pytest.mark.parametrize("stage", ["lessons_ar", "warm_ar", "warm_av", "rl"])
def test_two_processes_log_what_one_logs(finished, pod_run, stage):
    apart = parity.differences(finished / "run", pod_run[0], stage)
    assert len(rows(pod_run[0], stage)) == 2 and len(apart) > 4
    assert {name: d for name, d in apart.items() if d > TOLERANCE} == {}


def test_and_evaluate_to_the_same_figures(finished, pod_run):
    want, got = (json.loads((w / "summary.json").read_text("utf-8")) for w in (finished / "run", pod_run[0]))
    assert (got["rows"], got["documents"]) == (want["rows"], want["documents"])
    assert got["device"] == "cpu x 4"
    for bundle in ("warm_start", "rl"):
        assert got[bundle].keys() == want[bundle].keys() == {"heldout", "ood"}
        for split in want[bundle]:
            for a, b in zip(got[bundle][split], want[bundle][split], strict=True):
                assert a["name"] == b["name"]
                np.testing.assert_allclose(a["value"], b["value"], rtol=1e-3, atol=1e-5, err_msg=a["name"])


def test_sigterm_on_one_process_stops_all_at_one_step(pod_run):
    for printed in pod_run[1][0]:
        assert "nla: stopped by SIGTERM, rl is saved at step 1; run the same command again" in printed
        assert "Traceback" not in printed


def test_only_process_0_reports(pod_run):
    first, second = pod_run[1][1]
    assert "summary: " in first and "eval" not in second
    # Gloo's threads write parts of lines.
    said = [line for line in second.splitlines() if line and "Gloo" not in line and "peer ranks" not in line]
    assert said == []


# --- SIGTERM in one process -----------------------------------------------------------------------


def fit(workdir, step, steps=6, **options):
    add = jax.jit(lambda s, b: ({"sum": s["sum"] + b}, {"loss": s["sum"]}))

    def one(state, batch, i):
        step(i)
        return add(state, batch)

    state = {"sum": jnp.float32(0)}
    return loop.fit("toy", state, one, lambda i: np.float32(i + 1), steps, workdir=workdir, **options)


def terminate(at):
    return lambda i: os.kill(os.getpid(), signal.SIGTERM) if i == at else None


def test_sigterm_saves_the_step_under_way(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(distributed.Stopped, match="toy is saved at step 3") as stopped:
        fit(tmp_path, terminate(2))
    assert stopped.value.together and signal.getsignal(signal.SIGTERM) is before
    seen = []
    assert float(fit(tmp_path, seen.append)["sum"]) == 21
    assert seen == [3, 4, 5]
    assert [r["loss"] for r in rows(tmp_path, "toy")] == [0, 1, 3, 6, 10, 15]


def test_sigterm_at_the_last_step_loses_nothing(tmp_path):
    with pytest.raises(distributed.Stopped, match="saved at step 6"):
        fit(tmp_path, terminate(5))
    seen = []
    assert float(fit(tmp_path, seen.append)["sum"]) == 21
    assert seen == []


def test_a_stage_ends_when_its_minutes_are_over(tmp_path, monkeypatch, capsys):
    """A clock that goes on by half a minute a step: the step under way after two minutes is the last. The
    first step, which compiles, does not count."""
    now, seen = [0.0], []

    def step(i):
        seen.append(i)
        now[0] += 30

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watch = lambda state, i: {"watched": float(state["sum"])}
    state = fit(tmp_path, step, 100, minutes=2.0, watch=watch, watch_every=50)
    assert seen == [0, 1, 2, 3, 4, 5] and float(state["sum"]) == 21
    assert "toy: 2.0 minutes are over after step 6 of 100" in capsys.readouterr().err
    assert rows(tmp_path, "toy")[-1]["watched"] == 21


def test_sigterm_elsewhere_stops_at_once_and_inside_waiting_work_later():
    with distributed.raise_on_sigterm():
        with pytest.raises(distributed.Stopped, match="stopped by SIGTERM") as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert not stopped.value.together
        with distributed.defer_sigterm() as outer, distributed.defer_sigterm() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner is outer and inner.asked
        with pytest.raises(distributed.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_thread_cannot_listen_and_does_not_fail():
    found = []

    def work():
        with distributed.defer_sigterm() as sigterm:
            found.append(sigterm.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_stopped_command_ends_well(monkeypatch, capsys, tmp_path):
    from nla_jax import cli
    from nla_jax.cli import train

    def stopped(*_):
        raise distributed.Stopped("stopped by SIGTERM, rl is saved at step 7", together=True)

    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.setattr(train, "_train", stopped)
    assert world.nla("train", "--config", "x.py", "--workdir", tmp_path) == 0
    said = capsys.readouterr().err
    assert said == "nla: stopped by SIGTERM, rl is saved at step 7; run the same command again to continue\n"


# --- alone, and joining ---------------------------------------------------------------------------


def test_alone_every_decision_is_ones_own():
    assert distributed.is_first() and not distributed.is_in_pod()
    assert distributed.broadcast_flags([True, False]).tolist() == [True, False]
    assert (distributed.any_process(True), distributed.any_process(False)) == (True, False)
    assert distributed.run_on_first(lambda: 3) == 3
    with pytest.raises(UserError, match="as it was"):
        distributed.run_on_first(lambda: (_ for _ in ()).throw(UserError("as it was")))


POD = {"NLA_COORDINATOR": "10.0.0.1:1234", "NLA_PROCESSES": "4", "NLA_PROCESS": "3"}


def test_the_environment_of_a_pod(monkeypatch):
    asked = []
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: asked.append(kw))
    before = jax.config.values["jax_enable_preemption_service"]
    distributed.join()
    jax.config.update("jax_enable_preemption_service", before)
    assert asked == [dict(coordinator_address="10.0.0.1:1234", num_processes=4, process_id=3,
                          cluster_detection_method="deactivate")]


@pytest.mark.parametrize("changes, named", [
    ({"NLA_PROCESS": ""}, "NLA_PROCESS is not set"),
    ({"NLA_COORDINATOR": "host"}, "NLA_COORDINATOR=host: must be HOST:PORT"),
    ({"NLA_PROCESS": "4"}, "NLA_PROCESS=4 of NLA_PROCESSES=4"),
    ({"NLA_PROCESSES": "two"}, "NLA_PROCESS=3 of NLA_PROCESSES=two"),
])
def test_half_an_environment_is_refused(monkeypatch, changes, named):
    for name, value in {**POD, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        distributed.join()


def test_no_pod_around(monkeypatch, capsys, tmp_path):
    """What `nla train --distributed` says on a laptop: one line, and before it reads anything."""
    from nla_jax import cli

    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    for name in POD:
        monkeypatch.delenv(name, raising=False)

    def fails(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    before = jax.config.values["jax_enable_preemption_service"]
    status = world.nla("train", "--distributed", "--config", "none.py", "--workdir", tmp_path / "run")
    jax.config.update("jax_enable_preemption_service", before)
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert "could not join (coordinator_address should be defined.)" in said and "NLA_PROCESSES" in said
