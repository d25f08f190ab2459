"""The journal of requests and their outcomes: an append-only JSONL file, so that nothing is paid for twice.

A line is one outcome, with a key of (prompt, model). It is on disk before the outcome is used. An incomplete
last line (after a kill, or on a full disk) is removed when the file is opened again; a complete one stays. Of
two lines with one key, the later is valid. The journal also has the submitted batches whose answers are not
collected.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.providers.clients import CUT, EMPTY, REFUSED

FAILED = "failed"
STARTS = (b'{"key": ', b'{"batch": ')  # the two beginnings of a line
RETRIABLE = {"failed": FAILED, "cut": CUT, "refused": REFUSED, "empty": EMPTY}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one prompt. `answer` is None if there will be none; then `reason` says why.

    With an answer, `reason` is "" or why it is unusable (`clients.Answer`). `cost`: in dollars, if known.
    """

    key: str
    model: str
    answer: str | None
    reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    detail: str = ""


@dataclasses.dataclass
class Batch:
    """A batch whose answers are not collected. `id` is None until the provider is known to have accepted it.
    `newest` is the id of the provider's last batch before it."""

    keys: list[str]
    model: str
    newest: str | None
    id: str | None = None


def key_of(prompt: str, model: str) -> str:
    """Return 32 hex digits for a prompt (which includes its text) and a model."""
    return hashlib.sha256(json.dumps([prompt, model]).encode()).hexdigest()[:32]


class Journal:
    """The outcomes in a file. It needs about 150 bytes of memory per outcome; answers stay on disk.

    Raises UserError if the file cannot be written, if another process uses it, or if a line is malformed
    (the message gives its number).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._reader = open(self.path, "rb")
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{self.path} is in use by another process: wait for it, or name another file "
                            "with --journal") from None
        except OSError as err:
            raise UserError(f"cannot write {self.path} ({err.strerror or err})") from None
        self._where: dict[int, int] = {}  # key -> offset of its line
        self._reason: dict[int, str] = {}  # key -> reason, of outcomes without a usable answer
        self.batches: dict[str, Batch] = {}
        try:
            self._scan()
        except UserError:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()
        self._reader.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return int(key, 16) in self._where

    def get(self, key: str) -> Outcome | None:
        """Return the outcome of a key, read from the file, or None."""
        offset = self._where.get(int(key, 16))
        if offset is None:
            return None
        self._reader.seek(offset)
        return Outcome(**json.loads(self._reader.readline()))

    def add(self, outcome: Outcome) -> None:
        """Append an outcome. It is on disk when this returns. Raises UserError if it cannot be written."""
        line = {k: v for k, v in dataclasses.asdict(outcome).items() if k == "answer" or v not in ("", None)}
        self._note(outcome.key, outcome.answer, outcome.reason, self._append(line))

    def forget(self, names: Collection[str]) -> int:
        """Forget outcomes of these kinds (keys of RETRIABLE), so that they are requested again; return their
        number."""
        reasons = {RETRIABLE[n] for n in names}
        found = [k for k, reason in self._reason.items() if reason in reasons]
        for k in found:
            del self._where[k], self._reason[k]
        return len(found)

    def record_submission(self, keys: list[str], model: str, newest: str | None) -> str:
        """Record a batch of these keys before its submission; return its name in the journal."""
        name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        self._append({"batch": name, "keys": keys, "model": model, "newest": newest})
        self.batches[name] = Batch(keys, model, newest)
        return name

    def record_id(self, name: str, id: str) -> None:
        """Record the provider's id of a batch."""
        self._append({"batch": name, "id": id})
        self.batches[name].id = id

    def record_done(self, name: str) -> None:
        """Record that a batch is complete: its outcomes are here, or the provider never received it."""
        self._append({"batch": name, "done": True})
        del self.batches[name]

    def _append(self, line: dict) -> int:
        offset = self._file.seek(0, os.SEEK_END)
        left = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as err:
            with contextlib.suppress(OSError):  # an incomplete line before another one would be unreadable
                self._file.truncate(offset)
            raise UserError(f"cannot write {self.path} ({err.strerror or err}): make room, and run the same "
                            "command again") from None
        return offset

    def _note(self, key: str, answer: str | None, reason: str, offset: int) -> None:
        k = int(key, 16)
        self._where[k] = offset
        self._reason.pop(k, None)
        if reason:
            self._reason[k] = sys.intern(reason) if answer is not None else FAILED

    def _scan(self) -> None:
        offset, complete = 0, None
        for number, line in enumerate(self._reader, 1):
            try:
                if line.endswith(b"\n"):
                    self._read(json.loads(line), offset)
                elif complete := _complete(line):
                    self._read(complete, offset)
                elif any(start.startswith(line[: len(start)]) for start in STARTS):
                    self._file.truncate(offset)  # the writer was killed inside this line
                else:
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                where = f"{self.path}:{number}"
                raise UserError(f"{where}: not a line of a journal: remove or correct it") from None
            offset += len(line)
        if complete:
            self._file.write(b"\n")

    def _read(self, line: dict, offset: int) -> None:
        if "batch" not in line:
            o = Outcome(**line)
            self._note(o.key, o.answer, o.reason, offset)
        elif "keys" in line:
            self.batches[line["batch"]] = Batch(line["keys"], line["model"], line["newest"])
        elif line.get("done"):
            self.batches.pop(line["batch"], None)
        elif line["batch"] in self.batches:
            self.batches[line["batch"]].id = str(line["id"])


def _complete(line: bytes) -> object:
    """Return the JSON of a last line, or None if the line is incomplete."""
    try:
        return json.loads(line)
    except ValueError:
        return None
