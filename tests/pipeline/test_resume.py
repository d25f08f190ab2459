"""Killed anywhere and started again, a run ends with the same numbers as one that was left alone."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.errors import UserError
from nla_jax.util import checkpoint
from tests.helpers import toys

SMALL = [
    "checkpoint_every=2", "data.explained_rows=40", "data.warm_windows=10", "data.rl_windows=10",
    "data.heldout_rows=24", "lessons_ar.steps=5", "lessons_av.steps=4", "lessons_av.form=drill",
    "warm_ar.steps=5", "warm_av.steps=6", "warm_av.lessons=0.5", "rl.steps=8", "rl.batch=4", "rl.group=4",
    "rl.max_new=36", "eval.batch=16",
]

DIE = "import os, signal\ndef die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"


def at_step(stage: str, step: int) -> str:
    return f"""
from nla_jax.training import loop
fit = loop.fit
def fatal_fit(stage, state, one, batch, *args, **kw):
    fatal = lambda i: die() if (stage, i) == ({stage!r}, {step}) else batch(i)
    return fit(stage, state, one, fatal, *args, **kw)
loop.fit = fatal_fit"""


def while_moving(name: str) -> str:
    """Just before the file `name` appears under its name."""
    return f"""
replace = os.replace
os.replace = lambda a, b: die() if str(b).endswith({name!r}) else replace(a, b)"""


CAPTURING = """
from nla_jax.data import request_batches
captured, seen = request_batches.rows_of_batch, []
request_batches.rows_of_batch = lambda *a: die() if len(seen) == 3 else seen.append(1) or captured(*a)"""
SAVING_PARAMETERS = """
import orbax.checkpoint as ocp
save = ocp.StandardCheckpointer.save
ocp.StandardCheckpointer.save = lambda self, *a, **k: (save(self, *a, **k), die())"""
SAVING_CHECKPOINT = """
from nla_jax.util import checkpoint
save = checkpoint.save
checkpoint.save = lambda m, step, s: (save(m, step, s), step == 4 and die())"""
BETWEEN_BUNDLE_FILES = "from nla_jax.lm import tokenizer; tokenizer.save = die"
EVALUATING = "from nla_jax.evaluate.runner import Runner; Runner._reconstruct_ids = die"

# (the first stage that must be missing afterwards, what kills the run)
DEATHS = [
    ("extract", CAPTURING),
    ("lessons_ar", at_step("lessons_ar", 3)),
    ("lessons_av", at_step("lessons_av", 1)),
    ("warm_ar", SAVING_PARAMETERS),
    ("warm_av", at_step("warm_av", 3)),  # between a drill step and a written one
    ("warm_av", while_moving("done/warm_av.json")),
    ("bundle_warm", BETWEEN_BUNDLE_FILES),
    ("eval_warm", EVALUATING),
    ("rl", SAVING_CHECKPOINT),
    ("rl", "from outside"),
    ("eval_rl", EVALUATING),
]


def kill_when(process, workdir: Path, steps: int) -> None:
    """kill -9 once the RL metrics show that `steps` steps are done."""
    path = workdir / "metrics" / "rl.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text("utf-8").count("\n") >= steps:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)


def done_files(workdir: Path) -> dict[str, int]:
    return {p.stem: p.stat().st_mtime_ns for p in (workdir / "done").glob("*.json")}


def metrics_of(workdir: Path) -> dict[str, str]:
    return {p.name: p.read_text("utf-8") for p in sorted((workdir / "metrics").glob("*.jsonl"))}


@pytest.fixture(scope="module")
def runs(toy_world, tmp_path_factory):
    """(a run left alone, a run killed in every stage, what was done after each death, what each printed)."""
    base = tmp_path_factory.mktemp("resume")
    alone, killed = base / "alone", base / "killed"
    toys.finish(toys.train(toy_world, alone, SMALL))
    history, outs = [], []
    for stage, how in DEATHS:
        outside = how == "from outside"
        process = toys.train(toy_world, killed, SMALL, "" if outside else DIE + how)
        if outside:
            kill_when(process, killed, 5)
        out, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{stage}: {out[-3000:]}"
        history.append((stage, done_files(killed)))
        outs.append(out)
    outs.append(toys.finish(toys.train(toy_world, killed, SMALL)))
    history.append(("", done_files(killed)))
    return alone, killed, history, outs


def test_the_summary_is_the_same_to_the_last_bit(runs):
    alone, killed, _, _ = runs
    a, b = toys.summary(alone), toys.summary(killed)
    a.pop("seconds"), b.pop("seconds")
    assert a == b


def test_so_is_every_step_that_was_logged(runs):
    alone, killed, _, _ = runs
    a, b = metrics_of(alone), metrics_of(killed)
    assert sorted(a) == [f"{s}.jsonl" for s in ("lessons_ar", "lessons_av", "rl", "warm_ar", "warm_av")]
    assert a == b
    assert [json.loads(line)["step"] for line in b["rl.jsonl"].splitlines()] == list(range(8))


def test_drill_and_written_steps_take_turns(runs):
    """An answer of a drill is an ending line of six words; a written one has tags and a description too."""
    alone, *_ = runs
    rows = [json.loads(x) for x in metrics_of(alone)["warm_av.jsonl"].splitlines()]
    tokens = [r["tokens"] / 32 for r in rows]  # of an answer
    assert len(rows) == 6 and all(t < 10 for t in tokens[1::2]) and all(t > 20 for t in tokens[::2])


def test_each_death_came_in_its_stage_and_no_finished_stage_ran_again(runs):
    _, _, history, outs = runs
    first = {}
    for stage, done in history:
        assert stage not in done
        for name, written in done.items():
            assert first.setdefault(name, written) == written, f"{name} ran twice"
    assert not any(name in outs[-1] for name in ("capture", "lessons", "warm_a", "rl  "))
    # What Python's loggers warn of. ("WARNING: All log messages before absl::InitializeLog()" heads what XLA
    # says of a compilation that takes it long, on a machine that does more than this.)
    lines = [line for out in outs for line in out.splitlines()]
    complaints = [x for x in lines if re.match(r"WARNING:\S", x) or "Traceback" in x]
    assert not complaints


def test_a_finished_run_is_not_run_again(runs, toy_world):
    alone, *_ = runs
    before = done_files(alone)
    no_model = "from nla_jax.lm import sharded_load; sharded_load.place = None"
    out = toys.finish(toys.train(toy_world, alone, SMALL, no_model))
    assert "summary" in out
    assert done_files(alone) == before
    assert not (alone / "checkpoints").exists()


def test_another_config_is_refused_and_the_key_named(runs, toy_world):
    alone, *_ = runs
    process = toys.train(toy_world, alone, [*SMALL, "rl.kl=0.5"])
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "was begun with rl.kl=0.01, the config now says 0.5" in out and "Traceback" not in out


def test_a_config_that_changes_no_number_is_not_refused(runs, toy_world):
    alone, *_ = runs
    before = toys.summary(alone)
    toys.finish(toys.train(toy_world, alone, [*SMALL, "log_every=3"]))
    assert toys.summary(alone) == before


# --- checkpoints alone ----------------------------------------------------------------------------


def state(value: float) -> dict:
    return {"a": jnp.full((4, 3), value), "n": jnp.int32(value)}


def saved(directory: Path, steps=(2, 4)) -> None:
    manager = checkpoint.manager(directory, keep=3)
    for step in steps:
        checkpoint.save(manager, step, state(step))
    manager.wait_until_finished()
    manager.close()


def restored(directory: Path, like):
    manager = checkpoint.manager(directory, keep=3)
    try:
        return checkpoint.restore_latest(manager, like)
    finally:
        manager.close()


def test_a_half_written_checkpoint_is_never_chosen(tmp_path):
    saved(tmp_path)
    # What Orbax leaves when it is killed while writing: a directory that was not renamed yet.
    half = tmp_path / "6.orbax-checkpoint-tmp"
    half.mkdir()
    for part in (tmp_path / "4").rglob("*"):
        if part.is_file() and part.name != "_METADATA":
            (half / part.name).write_bytes(part.read_bytes()[:10])
    step, found = restored(tmp_path, state(0))
    assert step == 4
    np.testing.assert_array_equal(found["a"], state(4)["a"])


def test_nothing_saved_means_the_beginning(tmp_path):
    step, found = restored(tmp_path, state(7))
    assert step == 0 and int(found["n"]) == 7


def test_a_donated_state_does_not_reach_into_a_checkpoint_being_written(tmp_path):
    manager = checkpoint.manager(tmp_path)
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    big = step({"a": jnp.zeros((512, 1024))})
    checkpoint.save(manager, 1, big)
    for _ in range(5):
        big = step(big)
    manager.wait_until_finished()
    manager.close()
    _, found = restored(tmp_path, big)
    np.testing.assert_array_equal(found["a"], 1.0)


def test_a_checkpoint_of_another_configuration_says_what_to_do(tmp_path):
    saved(tmp_path, steps=(2,))
    told = r"2: cannot be restored: it is damaged or .*\(a is \(4, 3\), not \(5, 3\)\); delete it to start"
    with pytest.raises(UserError, match=told):
        restored(tmp_path, {**state(0), "a": jnp.zeros((5, 3))})


def test_a_truncated_checkpoint_says_what_to_do(runs, toy_world, tmp_path):
    alone, *_ = runs
    workdir = tmp_path / "cut"
    shutil.copytree(alone, workdir)
    for name in ("summary.json", "done/rl.json", "done/eval_rl.json"):
        (workdir / name).unlink()
    for part in (workdir / "params" / "warm_ar").rglob("*"):
        if part.is_file():
            os.truncate(part, part.stat().st_size // 2)
    process = toys.train(toy_world, workdir, SMALL)
    out, _ = process.communicate()
    assert process.returncode == 2
    assert "params/warm_ar: cannot be restored: it is damaged or belongs to another configuration" in out
