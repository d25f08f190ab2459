"""A full disk: one clear line, and what was whole before is still there and is gone on from.

The limit is one on the size of a file (RLIMIT_FSIZE), at which the operating system refuses writes as it
does on a full disk, whoever makes them: Python, or the C++ of Orbax and ArrayRecord.
"""

import contextlib
import errno
import json
import os
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import cli, errors
from nla_jax.cli import results
from nla_jax.data import store_writer
from nla_jax.errors import UserError
from nla_jax.training import loop
from nla_jax.util import distributed, metrics_log
from tests.helpers import world


@contextlib.contextmanager
def no_file_beyond(n_bytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def finds_no_room():
    """What is raised inside is told in one line: there is no room."""
    with pytest.raises(Exception) as raised:
        yield
    said = errors.disk_fault(raised.value)
    assert re.search("no room left on the disk, or in a quota; .* make room, and the same", said)
    assert "\n" not in said


def row(i: int) -> dict:
    """A row of the store, with 256 numbers that no compression makes small."""
    h = np.random.default_rng(i).normal(size=256).astype(np.float32)
    return {"doc_id": f"doc {i}", "position": 1, "n_tokens": 2, "text": "t", "next_text": "",
            "explanation": "", "h": h}


def fit(workdir, limit_at: int | None):
    """Six steps over random numbers that no compression makes small, each saved; from `limit_at` on no
    file may be larger than 100 kB. Returns (the state's sum, steps that were run)."""
    add = jax.jit(lambda s, b: ({"sum": s["sum"] + b, "noise": s["noise"]}, {"loss": b}))
    seen, limit = [], contextlib.ExitStack()

    def one(state, batch, i):
        seen.append(i)
        if i == limit_at:
            limit.enter_context(no_file_beyond(100_000))
        return add(state, batch)

    state = {"sum": jnp.float32(0), "noise": jax.random.normal(jax.random.key(0), (512, 512))}
    with limit:
        state = loop.fit("toy", state, one, lambda i: np.float32(i + 1), 6, workdir=workdir, every=1)
    return float(state["sum"]), seen


# Threads of Orbax tidy up beside each other, and some do so after all is told.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_a_checkpoint_that_finds_no_room(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.setattr(results, "_results", lambda *_: fit(tmp_path, limit_at=3))
    assert world.nla("results", tmp_path, "--out", tmp_path / "x.md") == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nla: ")]
    assert str(tmp_path) in said and "no room left on the disk, or in a quota; what was whole" in said
    # Step 2 is whole, and step 3 if it was before the limit came; nothing later is chosen.
    kept = max(int(p.name) for p in (tmp_path / "checkpoints" / "toy").iterdir() if p.name.isdecimal())
    assert kept in (2, 3)
    assert fit(tmp_path, limit_at=None) == (21, list(range(kept, 6)))
    assert [r["loss"] for r in metrics_log.read(tmp_path / "metrics" / "toy.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_metrics_that_find_no_room(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, "rl")
    log.write(0, {"loss": 1.0})
    with no_file_beyond(2000), finds_no_room():
        for step in range(1, 100):
            log.write(step, {"loss": 1.0}, text="x" * 60)
    log.close()
    rows = metrics_log.read(tmp_path / "metrics" / "rl.jsonl")
    assert [r["step"] for r in rows] == list(range(len(rows))) and len(rows) > 10


def test_a_board_that_finds_no_room_does_not_wait(tmp_path):
    board = metrics_log.TensorBoardWriter(tmp_path)
    with no_file_beyond(2000), finds_no_room():
        for step in range(1000):
            board.write(step, {"loss": 1.0, "reward": 2.0})
            board.flush()
    board.close()


def test_a_shard_that_finds_no_room(tmp_path):
    writer = store_writer.Writer(tmp_path / "data", 256, {"target": "t"})
    rows = [row(i) for i in range(40)]
    writer.write_shard("warm", 0, 2, rows)
    with no_file_beyond(20_000), finds_no_room():
        writer.write_shard("warm", 1, 2, rows)
    assert writer.done_shards("warm", 2) == {0}
    again = store_writer.Writer(tmp_path / "data", 256, {"target": "t"})
    again.write_shard("warm", 1, 2, [row(i) for i in range(40, 80)])
    assert again.commit()["splits"]["warm"]["rows"] == 80


def test_a_small_file_that_finds_no_room_is_as_it_was(tmp_path):
    path = tmp_path / "done" / "rl.json"
    distributed.write_json(path, {"steps": 1})
    with no_file_beyond(1000), finds_no_room():
        distributed.write_json(path, {"steps": list(range(1000))})
    assert json.loads(path.read_text()) == {"steps": 1}


@pytest.mark.parametrize("number, told", [
    (errno.ENOSPC, "no room left on the disk"), (errno.EROFS, "the file system is read-only: choose"),
    (errno.EACCES, "permission denied: choose another directory"),
])
def test_any_command_says_it_in_one_line(monkeypatch, capsys, tmp_path, number, told):
    def work(*_):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))

    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.setattr(results, "_results", work)
    assert world.nla("results", tmp_path, "--out", tmp_path / "x.md") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"nla: {tmp_path / 'x'}: {told}") and said.count("\n") == 1


def test_other_errors_are_left_alone(monkeypatch, capsys, tmp_path):
    for e in (FileNotFoundError(errno.ENOENT, "No such file", "x"), ConnectionError("no"), ValueError("no")):
        assert errors.disk_fault(e) is None

    def work(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as e:
            raise UserError("mine: it says already what to do") from e

    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.setattr(results, "_results", work)
    assert world.nla("results", tmp_path, "--out", tmp_path / "x.md") == 2
    assert capsys.readouterr().err == "nla: mine: it says already what to do\n"
