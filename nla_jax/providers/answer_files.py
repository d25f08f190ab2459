"""Write an LLM's answers to the file that training reads, and unusable answers to a second file."""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nla_jax.data import explanations
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.providers.journal import Outcome
from nla_jax.util import paths, utf8

if TYPE_CHECKING:
    from nla_jax.providers.target_model import Text

AT_ONCE = 256  # texts per fsync


@dataclasses.dataclass(frozen=True)
class UnusableAnswer(explanations.Record):
    """A line of OUT.dropped: the unchanged answer, and the reason why it is unusable."""

    reason: str


class Output:
    """The writer of OUT and OUT.dropped, in the order of the texts, up to the first text without outcome.

    A text that has an explanation in OUT, from whatever source, is done. `kept`, `dropped` and `failed` count
    the texts before index `at`; the last two count by reason.

    Args:
      outcome: returns the outcome of a text, or None if it is not known yet.
    """

    def __init__(self, texts: Sequence["Text"], out: str | Path, outcome: Callable[["Text"], Outcome | None]):
        self.texts, self.out = texts, paths.path(out)
        if self.out.is_dir():
            raise UserError(f"{out} is a directory: name a .jsonl file")
        self._beside = self.out.with_name(self.out.name + ".dropped")
        self._outcome = outcome
        self._there, self._lines = _places(self.out)
        self._dropped, _ = _places(self._beside)
        self.at, self.kept = 0, 0
        self.dropped: collections.Counter = collections.Counter()
        self.failed: collections.Counter = collections.Counter()

    def has(self, text: "Text") -> bool:
        """Return whether OUT had an explanation of the text when it was opened."""
        return place(text) in self._there

    def advance(self) -> None:
        """Write the texts whose outcomes are now known. Raises UserError if a file cannot be written."""
        while self.at < len(self.texts):
            before, kept, dropped = self.at, [], []
            for text in self.texts[before : before + AT_ONCE]:
                if not self._settle(text, kept, dropped):
                    break
                self.at += 1
            for path, records in ((self.out, kept), (self._beside, dropped)):
                if records:
                    try:
                        explanations.append(path, records)
                    except OSError as err:
                        raise UserError(f"cannot write {path} ({err.strerror or err})") from None
            self._lines += len(kept)
            if self.at < min(before + AT_ONCE, len(self.texts)):
                return

    def _settle(self, text: "Text", kept: list, dropped: list) -> bool:
        if self.has(text):
            self.kept += 1
            return True
        came = self._outcome(text)
        if came is None:
            return False
        if came.answer is None:
            self.failed[came.reason] += 1
            return True
        found, why = explanations.parse_explanation(came.answer)
        why = came.reason or why
        if why == "ok":
            kept.append(explanations.record_of(self._lines + len(kept), *text, found))
            self.kept += 1
            return True
        self.dropped[why] += 1
        if place(text) not in self._dropped:
            record = explanations.record_of(-1, *text, came.answer)
            dropped.append(UnusableAnswer(**dataclasses.asdict(record), reason=why))
        return True


def place(text: "Text") -> int:
    """Return a hash of a text's document and character range."""
    doc, start, end = text
    return keyed_hash(doc.doc_id, start, end)


def _places(path: Path) -> tuple[set[int], int]:
    """Return (places, number of records) of a file of records; it may be missing."""
    found, n = set(), 0
    for n, r in enumerate(explanations.read(path) if path.exists() else (), 1):  # noqa: B007 - the count is used
        found.add(keyed_hash(r.doc_id, r.start, r.end))
    return found, n


# --- answers from other sources ---------------------------------------------------------------------


def write_requests(texts: Sequence["Text"], done: Callable[["Text"], bool], path: str | Path) -> int:
    """Write the open requests and return their number. A line has doc_id, start, end, sha256 and prompt.

    Raises UserError if the file exists or cannot be written.
    """
    n = 0
    try:
        with open(path, "x", encoding="utf-8") as f:
            for doc, a, b in texts:
                if not done((doc, a, b)):
                    row = dataclasses.asdict(explanations.record_of(0, doc, a, b, ""))
                    row = {k: row[k] for k in ("doc_id", "start", "end", "sha256")}
                    row["prompt"] = explanations.instruction(doc.text[a:b])
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                    n += 1
    except OSError as err:
        raise UserError(f"cannot write {path} ({err.strerror or err}): name a new file") from None
    return n


class AnswerFile:
    """A JSONL file of answers: doc_id, start, end, and `answer` (a model's) or `explanation` (its lines).

    If a line has a `sha256`, its answer is used only for the text with this SHA-256.

    Raises UserError if there is no such file, or if a line is malformed (the message gives its number).
    """

    def __init__(self, path: str | Path):
        self.path, self._where, offset = Path(path), {}, 0
        try:
            with open(self.path, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        self._where[_place_of_line(line, f"{path}:{number}")] = offset
                    offset += len(line)
        except OSError as err:
            raise UserError(f"cannot read {path} ({err.strerror or err})") from None

    def __call__(self, text: "Text") -> Outcome:
        """Return the outcome of a text."""
        offset = self._where.get(place(text))
        if offset is None:
            return Outcome("", "", None, f"not in {self.path.name}")
        with open(self.path, "rb") as f:
            f.seek(offset)
            row, (doc, a, b) = json.loads(f.readline()), text
        digest = hashlib.sha256(doc.text[a:b].encode()).hexdigest()
        if not digest.startswith(str(row.get("sha256", ""))):
            return Outcome("", "", None, "about another text")
        answer = row["answer"] if "answer" in row else f"<explanation>\n{row['explanation']}\n</explanation>"
        return Outcome("", "", answer.encode("utf-8", "replace").decode(), "")


def _place_of_line(line: bytes, where: str) -> int:
    """Return the `place` of the text that a line of answers is about."""
    try:
        row = json.loads(line)
        if isinstance(row.get("answer", row.get("explanation")), str):
            return keyed_hash(row["doc_id"], int(row["start"]), int(row["end"]))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text (byte {e.start} of the line): {utf8.CONVERT}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{where}: a line needs doc_id, start, end, and the text of an answer or explanation")
