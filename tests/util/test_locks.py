"""Two processes in one directory: the second is refused in one line, and a dead one holds nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from nla_jax.errors import UserError
from nla_jax.util import locks

HOLD = """
import sys
from pathlib import Path
from nla_jax.util import locks
with locks.hold_directory(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process of its own that holds the directory."""
    argv, pipe = [sys.executable, "-c", HOLD, tmp_path / "run"], subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_who_is_there(holder, tmp_path):
    with pytest.raises(UserError) as told, locks.hold_directory(tmp_path / "run"):
        pass
    said = str(told.value)
    assert said.startswith(f"{tmp_path / 'run'} is in use by process {holder.pid} on ")
    assert " since 2" in said and said.endswith("wait until it ends, stop it, or choose another place")
    assert "\n" not in said


def test_a_killed_process_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / locks.NAME).exists()
    with locks.hold_directory(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []


def test_nothing_is_left_where_nothing_was(tmp_path):
    with locks.hold_directory(tmp_path / "new"):
        assert os.listdir(tmp_path / "new") == [locks.NAME]
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with locks.hold_directory(tmp_path / "old"):
        (tmp_path / "old" / "x").touch()
    assert os.listdir(tmp_path / "old") == ["x"]


def test_processes_that_share_keep_others_out(tmp_path):
    with locks.hold_directory(tmp_path, shared=True):
        with locks.hold_directory(tmp_path, shared=True):
            pass
        with pytest.raises(UserError, match="is in use by process"), locks.hold_directory(tmp_path):
            pass
    with locks.hold_directory(tmp_path):
        pass


def test_a_lock_file_that_another_process_deletes_is_made_again(tmp_path, monkeypatch):
    """The holder before deletes the file after this one has opened it, and before it has locked it."""
    flock, calls = fcntl.flock, []

    def late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / locks.NAME).unlink()
        return flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locks.hold_directory(tmp_path):
        assert len(calls) == 2 and (tmp_path / locks.NAME).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_line(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    ran = []
    with locks.hold_directory(tmp_path):
        ran.append(1)
    assert ran and capsys.readouterr().err == (
        f"{tmp_path}: this file system has no locks, so nothing keeps a second process out: start one at a "
        "time\n"
    )
    assert os.listdir(tmp_path) == []


def test_other_errors_are_raised(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), locks.hold_directory(tmp_path):
        pass
