"""Locks that keep a second process out of a directory or an output file.

The operating system holds the lock (flock), so it ends with the process, however that dies. The lock file
says who holds it. It is deleted when the lock is released.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.util import paths

NAME = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EREMOTEIO)


def hold_directory(directory: Path, shared: bool = False) -> contextlib.AbstractContextManager:
    """Hold the lock of a directory, as `hold` does."""
    return hold(directory / NAME, str(directory), shared)


@contextlib.contextmanager
def hold(lock: Path, what: str, shared: bool = False) -> Iterator[None]:
    """Hold a lock file for as long as the block runs. Several processes may hold it if all are `shared`.

    The lock's directory is made, and removed again if it is empty at the end. Where there are no locks
    (object storage, some network file systems), one line on stderr says so, and the block runs.

    what: the name in messages.

    Raises UserError if another process holds it; the message says which, and how to go on.
    """
    made = not paths.is_remote(lock) and not lock.parent.exists()
    if made:
        lock.parent.mkdir(parents=True, exist_ok=True)
    file = None if paths.is_remote(lock) else _open_locked(lock, what, shared)
    if file is None:
        print(f"{what}: this file system has no locks, so nothing keeps a second process out: start one at a "
              "time", file=sys.stderr)
        yield
        return
    try:
        yield
    finally:
        if not shared:  # others may share the file
            lock.unlink(missing_ok=True)
        os.close(file)
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                lock.parent.rmdir()


def _open_locked(lock: Path, what: str, shared: bool) -> int | None:
    """Return the file descriptor of a lock file that is locked now, or None if there are no locks."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # The holder before may have deleted the file after it was opened here.
            if os.stat(lock).st_ino == os.fstat(file).st_ino:
                _write_holder(file)
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            raise _refusal(what, file) from None
        except OSError as e:
            lock.unlink(missing_ok=True)
            os.close(file)
            if e.errno not in UNSUPPORTED:
                raise
            return None
        os.close(file)


def _write_holder(file: int) -> None:
    holder = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(holder).encode(), 0)


def _refusal(what: str, file: int) -> UserError:
    try:
        h = json.loads(os.pread(file, 4096, 0))
        who = f"process {h['process']} on {h['host']} since {h['since']} ({h['command']})"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    finally:
        os.close(file)
    return UserError(f"{what} is in use by {who}: wait until it ends, stop it, or choose another place")
