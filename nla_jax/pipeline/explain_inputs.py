"""What a batch explains: tokens of many texts or chats, or the rows of a file of activations.

A source knows how many rows of output it gives before anything is computed, and yields them in order. A text
that cannot be read is found before minutes of work (`Texts.faults`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nla_jax import api
from nla_jax.data import activation_files, chats, entropy_positions, text_files
from nla_jax.errors import UserError
from nla_jax.evaluate.trust import stretch
from nla_jax.util.batching import pad_rows, width_for

WINDOW_TEXTS, WINDOW_TOKENS = 256, 1 << 14  # captured together; a restart captures a whole window again
CHATS = ("messages", "conversation", "conversations")
ROLES = "system,user,assistant"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of output before AV: its activation, or why there is none.

    item: number of the text or activation in the input. fields: the input's columns. near: activations of the
    tokens around by position, if they were asked for.
    """

    item: int
    sample: int
    fields: Mapping[str, Any]
    h_D: np.ndarray | None
    position: int | None = None
    token: str | None = None
    error: str = ""
    near: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Positions:
    """Which tokens of a text are explained: --positions."""

    kind: str  # last, all, every, or one of `entropy_positions.KINDS`
    n: int = 1

    def count(self, n_tokens: int) -> int:
        """Return how many of n_tokens tokens are explained."""
        if self.kind == "every":
            return -(-n_tokens // self.n)
        return n_tokens if self.kind == "all" else min(self.n, n_tokens)

    def choose(self, allowed: Sequence[int], score_T) -> list[int]:
        """Return the positions among the allowed ones. `every:N` counts back from the last one."""
        if self.kind in entropy_positions.KINDS:
            return entropy_positions.choose_positions(score_T, self.n, allowed=set(allowed))
        if self.kind == "every":
            return list(allowed[(len(allowed) - 1) % self.n :: self.n])
        return list(allowed[-1:] if self.kind == "last" else allowed)


def parse_positions(text: str) -> Positions:
    """Read "last", "all", "every:8", "entropy:5" or "surprise:5". Raises UserError."""
    kind, colon, number = text.partition(":")
    if not colon and kind in ("last", "all"):
        return Positions(kind)
    if kind in ("every", *entropy_positions.KINDS) and number.isdecimal() and int(number):
        return Positions(kind, int(number))
    raise UserError(f"positions {text!r}: must be last, all, every:N, entropy:N or surprise:N, such as "
                    "every:8")


class Texts:
    """Texts and chats: `rows` captures them in windows of texts of similar length.

    Args:
      read: returns a new iterator over (place for messages, fields). A text is under `field`, or under
        "text"; without it, a chat is under one of CHATS.
      near: whether each row has the activations of the tokens around it, for `nla trust`.

    `counts` [texts] is the number of rows of each text, and `faults` what is wrong with texts: {number:
    reason}. A text with a fault gives one row without an activation.
    """

    def __init__(self, nla: api.NLA, read: Callable[[], Iterable], positions: Positions, *, samples: int = 1,
                 field: str = "", rendered: bool = False, near: bool = False):
        self.nla, self.positions, self.samples, self.field = nla, positions, samples, field
        self.rendered, self.near, self._read = rendered, near, read
        self.faults: dict[int, str] = {}
        rows, sizes = [], []
        for i, (place, fields) in enumerate(read()):
            try:
                _, ids, _, allowed = self._open(fields)
                rows.append(positions.count(len(ids) if allowed is None else len(allowed)) * samples)
                sizes.append(len(ids))
            except UserError as e:
                rows.append(1)
                sizes.append(0)
                self.faults[i] = f"{place}: {e}"
        self.counts, self._sizes = np.array(rows, np.int64), sizes

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return int(self.counts.sum())

    def _open(self, fields: Mapping) -> tuple[str, list[int], list, list[int] | None]:
        """Return (text, ids, spans, the tokens that may be explained or None for all). Raises UserError."""
        tok, field = self.nla.tokenizer, self.field or "text"
        chat = next((n for n in CHATS if n in fields and field not in fields), None)
        if chat or isinstance(fields.get(field), list):
            found = chats.render(fields[chat or field], tok, ROLES, "the chat")
            if found.refused:
                raise UserError(f"the chat cannot be read: {found.refused}")
            ids, spans = api.offsets_of(self.nla.spec, tok, found.text, True)
            inside = [i for i, (a, b) in enumerate(spans)
                      if any(s < b <= e and a < b for s, e in found.spans)]
            if not inside:
                raise UserError("the chat has no words to explain")
            return found.text, ids, spans, inside
        if field not in fields:
            there = ", ".join(map(str, fields)) or "none"
            raise UserError(f"no {field!r} (fields: {there[:200]}); name the text's field with --field")
        return fields[field], *api.offsets_of(self.nla.spec, tok, fields[field], self.rendered), None

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from number `start` on. Windows of texts that end before it are not captured."""
        at = 0
        for first, window in self._windows():
            n = int(self.counts[first : first + len(window)].sum())
            if at + n > start:
                yield from (row for k, row in enumerate(self._capture(first, window), at) if k >= start)
            at += n

    def _windows(self) -> Iterator[tuple[int, list[Mapping]]]:
        """Yield (number of the first text, fields of its texts)."""
        first, window, tokens = 0, [], 0
        for i, (_, fields) in enumerate(self._read()):
            if window and (len(window) == WINDOW_TEXTS or tokens + self._sizes[i] > WINDOW_TOKENS):
                yield first, window
                first, window, tokens = i, [], 0
            window.append(fields)
            tokens += self._sizes[i]
        if window:
            yield first, window

    def _capture(self, first: int, window: list[Mapping]) -> Iterator[Row]:
        nla, kind = self.nla, self.positions.kind
        opened = {j: self._open(f) for j, f in enumerate(window) if first + j not in self.faults}
        ids, score_of = {j: found[1] for j, found in opened.items()}, {}
        if kind in entropy_positions.KINDS and ids:
            found = entropy_positions.score_tokens(nla.base, nla.spec, list(ids.values()),
                                                   batch=nla.runner.batch)
            score_of = {j: f[kind] for j, f in zip(ids, found, strict=True)}
        chosen, wanted = {}, {}
        for j, (_, _, _, allowed) in opened.items():
            n = len(ids[j])
            allowed = range(n) if allowed is None else allowed
            chosen[j] = self.positions.choose(allowed, score_of.get(j))
            around = range(-stretch.AROUND, stretch.AROUND + 1) if self.near else (0,)
            wanted[j] = sorted({p + d for p in chosen[j] for d in around if 0 <= p + d < n})
        h = capture_positions(nla, ids, wanted)
        for j, fields in enumerate(window):
            if j not in opened:
                yield Row(first + j, 0, fields, None, error=self.faults[first + j])
                continue
            (text, _, spans, _), near = opened[j], dict(zip(wanted[j], h[j], strict=True))
            for p in chosen[j]:
                token, around = text[slice(*spans[p])], near if self.near else {}
                yield from (Row(first + j, s, fields, near[p], p, token, near=around)
                            for s in range(self.samples))


def capture_positions(nla: api.NLA, ids: Mapping[int, Sequence[int]], wanted: Mapping[int, Sequence[int]]):
    """Return {text: h [positions, D]} of several texts, in batches of similar length.

    A batch has at most WINDOW_TOKENS tokens, so that one long text does not need much memory.
    """
    spec, order, out = nla.spec, sorted(ids, key=lambda j: len(ids[j])), {}
    while order:
        width = width_for(len(ids[order[-1]]))
        size = max(1, min(nla.runner.batch, WINDOW_TOKENS // width))
        real, order = order[-size:], order[:-size]
        pick = np.resize(real, size).tolist()
        ids_BT, valid_BT, _ = pad_rows([ids[j] for j in pick], spec.av.pad, width)
        positions_BP = pad_rows([wanted[j] for j in pick], 0, width_for(max(len(wanted[j]) for j in pick)))[0]
        h_BPD = np.asarray(nla._capture(nla.base, spec.lm, spec.layer, ids_BT, valid_BT, positions_BP,
                                        lead=spec.lead))
        out |= {j: h_BPD[b, : len(wanted[j])] for b, j in enumerate(real)}
    return out


class Activations:
    """The rows of an open file of activations, or of an array. `faults` has rows that are zero or not finite.

    Raises UserError if the width is not the target's.
    """

    def __init__(self, nla: api.NLA, file: activation_files.Vectors, *, samples: int = 1):
        self.file, self.samples, self.faults = file, samples, {}
        if file.n and file.d_model != nla.spec.lm.d_model:
            raise UserError(f"{file.path}: its vectors have {file.d_model} numbers, those of this target "
                            f"{nla.spec.lm.d_model}")
        for start in range(0, file.n, 4096):
            norms = np.linalg.norm(file.read(start, min(start + 4096, file.n))[0].astype(np.float64), axis=1)
            for i in np.flatnonzero(~np.isfinite(norms) | (norms == 0)):
                what = "is zero" if norms[i] == 0 else "is not finite"
                self.faults[start + int(i)] = f"{file.path}: row {start + i}: the activation {what}"

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return (self.file.n - len(self.faults)) * self.samples + len(self.faults)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from number `start` on."""
        at = 0
        for first in range(0, self.file.n, 1024):
            h_ND, columns = self.file.read(first, min(first + 1024, self.file.n))
            for j, h_D in enumerate(h_ND):
                i, fields = first + j, {name: values[j] for name, values in columns.items()}
                made = [Row(i, 0, fields, None, error=self.faults[i])] if i in self.faults else [
                    Row(i, s, fields, h_D, near={}) for s in range(self.samples)]
                yield from made[max(start - at, 0) :]
                at += len(made)


def read_texts(path: str) -> Iterator[tuple[str, dict]]:
    """Yield (place, fields) of a file of texts: a line of .txt, or a record of .jsonl or .parquet.

    Empty lines of .txt are left out. Raises UserError if the file is missing, damaged or of another kind.
    """
    if not path.endswith((".txt", ".txt.gz", ".txt.zst")):
        for _, place, fields in text_files.read(path, list):
            yield place, dict(fields)
        return
    for _, place, fields in text_files.read(path, list):
        for number, line in enumerate(fields["text"].split("\n"), 1):
            if line.strip():
                yield f"{place}:{number}", {"line": number, "text": line.rstrip("\r")}


def check_faults(source, skip: bool) -> None:
    """Raise UserError if an input cannot be explained, unless such inputs are skipped."""
    if source.faults and not skip:
        n, first = len(source.faults), next(iter(source.faults.values()))
        more = f", and {n - 1} more" if n > 1 else ""
        raise UserError(f"{first}{more}; correct the file, or keep such rows without an explanation by "
                        "--skip-bad")
