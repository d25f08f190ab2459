"""Explain many activations: continuous batching of AV's sampling, and the figures of each row.

AV samples the next rows while the last batch is scored and written, so the device does not wait for the host.
A row depends on the settings, its number and its activation, and not on where a run was stopped.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax import api
from nla_jax.data import activation_files, text_files
from nla_jax.errors import UserError
from nla_jax.evaluate import distribution
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.runner import read_tag
from nla_jax.evaluate.writer import Answer, Writer
from nla_jax.pipeline import explain_columns, explain_inputs
from nla_jax.pipeline.explain_columns import Options
from nla_jax.pipeline.explain_inputs import Row
from nla_jax.pipeline.explain_output import Output
from nla_jax.util import paths
from nla_jax.util.keys import new_key
from nla_jax.util.progress import Progress, format_seconds

AHEAD = 3  # batches whose rows are written together with those of the first unfinished one


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a batch gave. rows: in the output; new: made by this start, in `seconds`, of which AV's sampling
    took `sampling`; failed: rows whose answer could not be parsed; unusual: activations that are."""

    out: str
    rows: int
    new: int
    failed: int
    errors: int
    unusual: int
    seconds: float
    sampling: float

    def __str__(self) -> str:
        if not self.new:
            return f"{self.out}: all {self.rows} rows were there"
        rate = f"{self.new} rows in {format_seconds(self.seconds)}, {self.new / self.seconds:.3g} rows/s"
        share = f"AV's sampling took {100 * self.sampling / self.seconds:.0f} % of the time"
        odd = f", {self.unusual} unusual activations" if self.unusual else ""
        bad = f", {self.errors} inputs not explained" if self.errors else ""
        return f"{self.out}: {rate}; {share}; {self.failed} without an explanation{bad}{odd}"


def check_input(texts: str, activations: str, key: str = "") -> None:
    """Raise UserError if a file of texts or of activations cannot be opened; it needs no model."""
    if activations:
        activation_files.open_file(activations, key)
    elif next(iter(explain_inputs.read_texts(texts)), None) is None:
        raise UserError(f"{texts}: there is no text in this file")


def open_source(nla: api.NLA, o: Options, *, texts=None, activations=None, key: str = ""):
    """Return the source of rows: texts as a file, an iterable of strings, chats or dicts; or activations as a
    file or an array. Raises UserError if neither or both are given, and for an input that cannot be read."""
    if (texts is None) == (activations is None):
        raise UserError("give either texts or activations")
    if o.trust is not None and nla.trust is None:
        raise UserError("this bundle has no trust model: fit one with `nla trust --bundle DIR`")
    nla.spec.check_answer_fits(o.max_new or nla.meta["max_new_tokens"], "max_new")
    distribution.strengths(np.zeros((0, 1)), distribution.parse_scale(o.scale), nla.activations)
    if activations is not None:
        if isinstance(activations, str | Path):
            file = activation_files.open_file(activations, key)
        else:
            h_ND = nla.as_rows(activations)
            file = activation_files.Vectors(Path("activations"), *h_ND.shape, (),
                                            lambda a, b: (h_ND[a:b], {}))
        return explain_inputs.Activations(nla, file, samples=o.samples)
    if isinstance(texts, str | Path):
        read = lambda: explain_inputs.read_texts(str(texts))
    else:
        given = [t if isinstance(t, Mapping) else {"messages" if isinstance(t, list) else "text": t}
                 for t in texts]
        read = lambda: ((f"text {i}", fields) for i, fields in enumerate(given))
    return explain_inputs.Texts(nla, read, explain_inputs.parse_positions(o.positions), samples=o.samples,
                                field=o.field, rendered=o.rendered, near=o.trust is not None)


def explain_rows(nla: api.NLA, *, texts=None, activations=None, key: str = "", skip_bad: bool = False,
                 **options) -> Iterator[dict]:
    """Return an iterator over one dict for each explained token or activation, as `explain_file` writes them
    (`explain_columns.COLUMNS`).

    Args: those of `explain_file`, but `out`.
    """
    o = Options(**options)
    source = open_source(nla, o, texts=texts, activations=activations, key=key)
    explain_inputs.check_faults(source, skip_bad)
    return (row for batch, _ in batches(nla, source, o) for row in batch)


def explain_file(nla: api.NLA, out, *, texts=None, activations=None, key: str = "", skip_bad: bool = False,
                 label: str = "explain", **options) -> Outcome:
    """Explain many texts or activations into a .jsonl or .parquet file. A stopped call is resumed.

    Args:
      texts: a file (.txt with one text a line, .jsonl, .parquet), or an iterable of strings, of chats (lists
        of messages), or of dicts with "text" or "messages" and further columns.
      activations: a file (.npy, .npz, .safetensors, .parquet), or an array [N, D] as in `NLA.verbalize`.
      key: name of the array in the file. skip_bad: give inputs that cannot be read a row with an error.
      options: fields of `Options`.

    Raises UserError for an input that cannot be read, and for an output that was begun with other settings.
    """
    o = Options(**options)
    if texts is not None and not isinstance(texts, str | Path):
        texts = list(texts)
    source = open_source(nla, o, texts=texts, activations=activations, key=key)
    explain_inputs.check_faults(source, skip_bad)
    if activations is not None and not isinstance(activations, str | Path):
        activations = nla.as_rows(activations)
    settings = _settings(nla, o, texts if activations is None else activations, key)
    tail = o.samples * (recurrence.BACK + 1)
    with Output(out, settings, source.total, nla.runner.batch, tail) as output:
        start, began, count, sampling = output.done, time.monotonic(), collections.Counter(), 0.0
        with Progress(label, output.total, output.done, unit="rows") as bar:
            for rows, seconds in batches(nla, source, o, output.done, output.last):
                output.add(rows)
                sampling += seconds
                for name, found in (("failed", [r["failed"] and not r["error"] for r in rows]),
                                    ("errors", [bool(r["error"]) for r in rows]),
                                    ("unusual", [bool(r["unusual"]) and not r["sample"] for r in rows])):
                    count[name] += sum(found)
                note = f"{count['failed']} without an explanation" if count["failed"] else ""
                bar.advance(len(rows), note)
        output.finish()
    return Outcome(str(out), output.total, output.total - start, count["failed"], count["errors"],
                   count["unusual"], time.monotonic() - began, sampling)


def _settings(nla: api.NLA, o: Options, given, key: str) -> dict[str, Any]:
    """Return what decides the rows of an output as JSON values."""
    told = json.dumps(nla.meta, sort_keys=True, default=str)
    bundle = hashlib.sha256(told.encode()).hexdigest()[:16]
    if isinstance(given, str | Path):
        files = sorted(text_files.matching_files(str(given)))
        source = {Path(f).name: paths.digest(Path(f))[:16] for f in files}
    else:
        raw = given.tobytes() if isinstance(given, np.ndarray) else json.dumps(given, default=str).encode()
        source = {"values": hashlib.sha256(raw).hexdigest()[:16]}
    return {"bundle": bundle, "dtype": nla.spec.dtype, "input": source, "key": key,
            "batch": nla.runner.batch, **dataclasses.asdict(o)}


def batches(nla: api.NLA, source, o: Options, start: int = 0,
            before: Sequence[Mapping] = ()) -> Iterator[tuple[list[dict], float]]:
    """Yield (rows of a batch from number `start` on, the seconds of its sampling).

    before: finished rows of the same input as the first row, for its recurrence.
    """
    said_at = collections.defaultdict(dict)  # (item, sample) -> {position: explanation}
    for row in before:
        said_at[row["item"], row["sample"]][row["position"]] = row["explanation"] or ""
    numbered = zip(itertools.count(start), source.rows(start), strict=False)
    pull = lambda: list(itertools.islice(numbered, nla.runner.batch))
    written = _write(nla, [*filter(None, (pull() for _ in range(1 + AHEAD)))], o)
    sampler = concurrent.futures.ThreadPoolExecutor(1)
    try:
        coming = sampler.submit(_send, written, None)
        while True:
            more = pull()  # the target reads while AV writes
            if (found := coming.result()) is None:
                return
            coming = sampler.submit(_send, written, more)
            batch, said, seconds = found
            yield explain_columns.rows_of(nla, batch, said, o, said_at), seconds
    finally:
        sampler.shutdown(cancel_futures=True)


def _send(generator: Generator, value):
    """Send a value to a generator and return what it yields next, or None at its end."""
    try:
        return generator.send(value)
    except StopIteration:
        return None


def _write(nla: api.NLA, first: list[list[tuple[int, Row]]], o: Options) -> Generator[tuple, list, None]:
    """Yield (a batch of numbered rows, the explanation of each, "" where there is none, the seconds it took).
    Take the next batch in exchange.

    first: as many batches as are written at the same time, because the rows of a batch end at different
    times."""
    writer = Writer(nla.runner, new_key(o.seed), n_slots=nla.runner.batch,
                    together=max(2, nla.runner.batch // 8), max_new=o.max_new or nla.meta["max_new_tokens"])
    under_way = collections.deque((batch, _submit(nla, writer, batch, o)) for batch in first)
    while under_way:
        batch, answers = under_way.popleft()
        began = time.monotonic()
        for _ in writer.follow(list(answers.values())):
            pass
        seconds = time.monotonic() - began
        said = {i: read_tag(writer.text(answer)) or "" for i, answer in answers.items()}
        if more := (yield batch, [said.get(i, "") for i in range(len(batch))], seconds):
            under_way.append((more, _submit(nla, writer, more, o)))


def _submit(nla: api.NLA, writer: Writer, batch: list[tuple[int, Row]], o: Options) -> dict[int, Answer]:
    """Return the answers of those rows of a batch that have an activation."""
    real = [i for i, (_, row) in enumerate(batch) if row.h_D is not None]
    if not real:
        return {}
    h_ND = np.stack([batch[i][1].h_D for i in real])
    strength_N = distribution.strengths(h_ND, distribution.parse_scale(o.scale), nla.activations)
    strength_N = np.ones(len(real)) if strength_N is None else strength_N
    return {i: writer.submit(h_D, batch[i][0], temperature=o.heat, strength=float(strength))
            for i, h_D, strength in zip(real, h_ND, strength_N, strict=True)}
