"""The output of a batch of explanations: JSONL or parquet, with every row once after any number of kills.

OUT.jsonl         one object a line, appended as it is computed. For OUT.parquet the lines are in
                  OUT.parquet.rows until the last one, and become the parquet file then.
OUT.settings      what decides the rows. A start with other settings is refused.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nla_jax.errors import UserError
from nla_jax.util import locks, paths, writable

ENDINGS = (".jsonl", ".parquet")
GROUP = 4096  # rows of a row group


def check_path(path: str | Path) -> None:
    """Raise UserError if an output cannot be at this path."""
    if paths.is_remote(path):
        raise UserError(f"{path}: object storage cannot append lines; name a local file, and copy it later")
    if paths.path(path).suffix not in ENDINGS:
        raise UserError(f"{path}: the output must end in {' or '.join(ENDINGS)}")
    writable.check_output(path, makes_directory=True)


class Output:
    """The rows of an output file. Use it as a context manager, which holds the file's lock.

    settings: JSON values that decide the rows; `total`: their number. Rows are kept in multiples of `batch`,
    so that a restart computes the same batches.

    `done` is the number of rows that are there, and `last` those of the last input among the last `tail`.

    Raises UserError if the file is of another kind, is in use, was begun with other settings, or has a line
    that is not of this command.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], total: int, batch: int, tail: int = 0):
        check_path(path)
        self.path = paths.path(path)
        self.settings, self.total, self.batch = json.loads(json.dumps(settings)), total, batch
        self._tail = tail
        self.is_parquet = self.path.suffix == ".parquet"
        self.journal = self.path.with_name(f"{self.path.name}.rows") if self.is_parquet else self.path
        self._settings_file = self.path.with_name(f"{self.path.name}.settings")
        self.done, self.last = 0, []
        self._held = contextlib.ExitStack()

    def __enter__(self) -> "Output":
        self._held.enter_context(locks.hold(self.path.with_name(f"{self.path.name}{locks.NAME}"),
                                            str(self.path)))
        try:
            self._check_settings()
            if self.is_complete():
                self.done = self.total
            else:
                self._file = self._held.enter_context(open(self.journal, "ab", buffering=0))
                self._scan()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *exc) -> None:
        self._held.close()

    def is_complete(self) -> bool:
        """Return whether the parquet file is there; it is written when every row is there."""
        return self.is_parquet and self.path.is_file() and not self.journal.exists()

    def _check_settings(self) -> None:
        if not self._settings_file.exists():
            if self.path.exists() or self.journal.exists():
                raise UserError(f"{self.path} exists, and {self._settings_file.name} does not say how it was "
                                "made: name another --out, or delete it")
            paths.write(self._settings_file, json.dumps(self.settings, indent=1, ensure_ascii=False))
            return
        try:
            before = json.loads(self._settings_file.read_text("utf-8"))
        except ValueError as e:
            raise UserError(f"{self._settings_file}: not JSON ({e}); delete it and {self.path}") from None
        differ = [k for k in {**before, **self.settings} if before.get(k) != self.settings.get(k)]
        if differ:
            said = ", ".join(f"{k} {_short(before.get(k))}, not {_short(self.settings.get(k))}"
                             for k in differ)
            raise UserError(f"{self.path} was begun with {said}: give the same settings, name another --out, "
                            "or delete the file and its .settings")

    def _scan(self) -> None:
        """Count the rows, and cut off what a kill left of a line or of a batch."""
        ends = [0]
        with open(self.journal, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    if json.loads(line)["row"] != number:
                        raise ValueError
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.journal}:{number + 1}: not row {number} of this command, because the file "
                        "was changed; delete it and its .settings, or name another --out"
                    ) from None
                ends.append(ends[-1] + len(line))
            found = len(ends) - 1
            if found > self.total:
                raise UserError(f"{self.journal} has {found} rows, not {self.total}: name another --out")
            self.done = found if found == self.total else found // self.batch * self.batch
            self._file.truncate(ends[self.done])
            file.seek(ends[max(self.done - self._tail, 0)])
            rows = [json.loads(line) for line in file.read(ends[self.done] - file.tell()).splitlines()]
        self.last = [row for row in rows if row["item"] == rows[-1]["item"]]

    def add(self, rows: list[dict]) -> None:
        """Append rows. They are on disk when this returns. Raises UserError if they cannot be written."""
        left = "".join(f"{_line(row)}\n" for row in rows).encode()
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as e:
            raise UserError(f"cannot write {self.journal} ({e.strerror or e}): make room, and run the same "
                            "command again") from None
        self.done += len(rows)

    def finish(self) -> None:
        """Make the parquet file from the lines, if that is the output."""
        if self.is_parquet and not self.is_complete():
            _write_parquet(self.journal, self.path)
            self.journal.unlink()


def _short(value) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 60 else f"{said[:57]}…"


def _line(row: dict) -> str:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    line = json.dumps(plain, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair in a column of the input
        return json.dumps(plain, default=str)
    return line


def _groups(journal: Path) -> Iterator[list[dict]]:
    with open(journal, encoding="utf-8") as file:
        while group := [json.loads(line) for line in itertools.islice(file, GROUP)]:
            yield group


def _write_parquet(journal: Path, out: Path) -> None:
    """Write the rows of a journal as a parquet file, atomically. A column whose values have no common type
    becomes JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, pa.DataType | None] = {}
    for group in _groups(journal):
        for name in {name: None for row in group for name in row}:
            types[name] = _common_type(pa, types.get(name, pa.null()), [row.get(name) for row in group])
    types = {n: pa.string() if t is None or pa.types.is_null(t) else t for n, t in types.items()}
    as_json = {n for n, t in types.items() if t == pa.string()}
    with paths.whole(out) as part, pq.ParquetWriter(part, pa.schema(list(types.items()))) as writer:
        for group in _groups(journal):
            columns = {n: [row.get(n) for row in group] for n in types}
            for name in as_json:
                columns[name] = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
                                 for v in columns[name]]
            writer.write_table(pa.table({n: pa.array(v, types[n]) for n, v in columns.items()}))


def _common_type(pa, before, values: list):
    """Return the type of a column's values so far; None if they have none."""
    try:
        fields = [pa.schema([("x", t)]) for t in (before, pa.array(values).type)]
        return pa.unify_schemas(fields, promote_options="permissive").field("x").type
    except (pa.ArrowException, TypeError):  # `before` is None too
        return None
