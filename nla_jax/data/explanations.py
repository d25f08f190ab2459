"""Written explanations: the instruction for an LLM, the parser of its answers, the file of records."""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from nla_jax.data import lessons
from nla_jax.errors import UserError
from nla_jax.lm import thinking
from nla_jax.util import paths, utf8

SHIPPED = Path(__file__).parent / "warmstart" / "explanations.jsonl"

INSTRUCTION = """\
Below is the beginning of a text, up to a certain point. Write what a reader must have in mind at \
that point to predict what comes next.

Write 2 or 3 short lines, 30-55 words in all, in plain English, without list marks.
First line: what the text is and is about: its genre, its topic, the people, places and things in \
play.
Then: what has just happened, and what is expected soon, with one or two short guesses of the next \
words in double quotes.
Below them one more line, always the last one: "… " and the exact last few words of the text, without \
quotation marks and with nothing behind them.
Be specific to this text. Do not mention models, and do not say that the text was cut.

Put your answer between <explanation> and </explanation>.

<text>
{text}
</text>"""

MIN_LINES, MAX_LINES = 2, 5  # of the description: the ending line (`lessons.MARK`) does not count
MAX_WORDS = 120  # of all lines
OURS = b'{"id": '  # what a line of `append` begins with
DOTS = (lessons.MARK, "...")  # what an ending line begins with
LINES = ("all", "headline", "first", "last", "first+last")  # of the description (`lines`)
_HEADLINE_END = re.compile(r"[,:;](?=\s|$)|\s\(")
_LIST_MARK = re.compile(r"^\s*(?:[-*\u2022\u2013]+|\(?\d{1,2}[.):]|\(?[a-e]\))\s+")


@dataclasses.dataclass(frozen=True)
class Record:
    """An explanation of `text[start:end]` of a document.

    `sha256` is a prefix (12 hex digits or more) of the SHA-256 of that part's UTF-8 bytes.
    """

    id: int
    doc_id: str
    start: int
    end: int
    sha256: str
    split: str
    explanation: str


def instruction(text: str) -> str:
    """Return the user message that asks an LLM to explain `text`."""
    return INSTRUCTION.replace("{text}", text)


def parse_explanation(response: str) -> tuple[str | None, str]:
    """Return (explanation, "ok"), or (None, reason) for an answer that cannot be used.

    The first `<explanation>...</explanation>` after the model's thinking is parsed. List marks and empty
    lines are removed. The answer may end with an ending line ("… last words", or "..."), because training
    replaces it by its own (`lessons.join_end`).

    The reasons are "unfinished thinking", "no opening tag", "no closing tag", "too few lines" (a description
    under 2), "too many lines" (over 5), "too long" (over 120 words), "repeated line", and "repeated words" (a
    third or more of all four-word runs).
    """
    said, unfinished = thinking.split(response)
    _, opened, rest = said.partition("<explanation>")
    if not opened:
        return None, "unfinished thinking" if unfinished else "no opening tag"
    body, closed, _ = rest.partition("</explanation>")
    if not closed:
        return None, "no closing tag"
    kept = [_LIST_MARK.sub("", line).strip() for line in body.splitlines()]
    kept = [" ".join(line.split()) for line in kept if line]
    end = _ending(kept.pop()) if kept and kept[-1].startswith(DOTS) else ""
    if len(kept) < MIN_LINES:
        return None, "too few lines"
    if len({line.lower() for line in kept}) < len(kept):
        return None, "repeated line"
    if len(kept) > MAX_LINES:
        return None, "too many lines"
    words = " ".join([*kept, end]).lower().split()
    if len(words) > MAX_WORDS:
        return None, "too long"
    runs = collections.Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if sum(n - 1 for n in runs.values()) * 3 >= max(sum(runs.values()), 1):
        return None, "repeated words"
    return lessons.join_end("\n".join(kept), end), "ok"


def _ending(line: str) -> str:
    """Return a written ending line in the spelling of `lessons`; "" if it has no words."""
    words = line.removeprefix(lessons.MARK).removeprefix("...").strip()
    return f"{lessons.MARK} {words}" if words else ""


def lines(explanation: str, which: str) -> str:
    """Return some lines of an explanation, in their order.

    which: "all" is the whole explanation. "first", "last" and "first+last" are lines of the description, so
    never the ending line. "headline" is the first line up to its first comma, colon, semicolon or bracket,
    which says what the text is.

    Raises:
        UserError: any other `which`.
    """
    if which == "headline":
        return _HEADLINE_END.split(lines(explanation, "first"), maxsplit=1)[0]
    parts = lessons.split_end(explanation)[0].split("\n")
    names = set(which.split("+"))
    if not names <= {"all", "first", "last"}:
        raise UserError(f'lines={which!r}: use "all", "headline", "first", "last" or "first+last"')
    if "all" in names:
        return explanation
    picked = {0 for n in names if n == "first"} | {len(parts) - 1 for n in names if n == "last"}
    return "\n".join(parts[i] for i in sorted(picked))


def record_of(id: int, doc, start: int, end: int, explanation: str) -> Record:
    """Return the record of an explanation of `doc.text[start:end]`."""
    digest = hashlib.sha256(doc.text[start:end].encode()).hexdigest()[:12]
    return Record(id, doc.doc_id, start, end, digest, doc.split, explanation)


def read(path: str | Path) -> Iterator[Record]:
    """Yield the records of a JSONL file. An incomplete last line, left by a killed writer, is skipped.

    A line has id, start, end, sha256, split, explanation, and either doc_id or, for the news
    corpus, row.

    Raises:
        UserError: there is no such file, or a line is malformed (the message gives file:line).
    """
    path = paths.local_copy(path)
    if not path.is_file():
        raise UserError(
            f"no explanations at {path}: check the path, or write them with `nla data explain`"
        )
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n") and not _is_json(line):
                return
            if line.strip():
                yield _record(line, f"{path}:{number}")


def document_ids(path: str | Path | None = None) -> frozenset[str]:
    """Return the ids of all documents in a file of explanations (default: the shipped ones). Raises
    UserError as `read`."""
    return frozenset(record.doc_id for record in read(path or SHIPPED))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _record(line: bytes, where: str) -> Record:
    try:
        data = json.loads(line)
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text (byte {e.start} of the line): {utf8.CONVERT}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({e}): remove or correct the line") from None
    try:
        doc_id = data["doc_id"] if "doc_id" in data else f"news:{int(data['row'])}"
        return Record(
            int(data["id"]),
            str(doc_id),
            int(data["start"]),
            int(data["end"]),
            str(data["sha256"]),
            str(data["split"]),
            str(data["explanation"]).replace("\r\n", "\n").replace("\r", "\n"),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"{where}: missing or wrong field ({e}); a line needs id, doc_id (or row), start, end, "
            "sha256, split and explanation"
        ) from None


def append(path: str | Path, records: Iterable[Record]) -> int:
    """Append records to a JSONL file and return their number. Each is flushed before the next is read.

    An incomplete last line, left by a killed `append`, is removed first, so `append` continues where `read`
    stopped. A complete one without newline stays. Raises UserError for an incomplete line of another writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(path)
    n = 0
    with open(path, "a", encoding="utf-8") as f:
        for n, record in enumerate(records, 1):  # noqa: B007 - the count is the result
            f.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
            f.flush()
        os.fsync(f.fileno())
    return n


def _end_last_line(path: Path) -> None:
    """Put a newline after a complete last line that has none, and remove an incomplete one of `append`."""
    if not path.exists():
        return
    with open(path, "rb+") as f:
        size = f.seek(0, os.SEEK_END)
        begin, block = 0, size
        while block > 0:
            block = max(0, block - 65536)
            f.seek(block)
            newline = f.read(min(65536, size - block)).rfind(b"\n")
            if newline >= 0:
                begin = block + newline + 1
                break
        f.seek(begin)
        line = f.read()
        if not line.strip():
            return
        if _is_json(line):
            f.write(b"\n")
        elif OURS.startswith(line[: len(OURS)]):
            f.truncate(begin)
        else:
            raise UserError(f"{path}: its last line is not complete: correct or remove it")
