"""Extraction: run the target over capture requests and write the activations to a store."""

import collections
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nla_jax.data import request_batches, store, store_writer
from nla_jax.data.capture_requests import Request
from nla_jax.util import distributed
from nla_jax.util.progress import Progress

ROWS_PER_SHARD = 1024


def extract(
    directory: str | Path,
    wanted: dict[str, list[Request]],
    d_model: int,
    capture: Callable,
    *,
    plan: dict,
    batch: int,
    pad_id: int,
    notes: dict,
    dtype: str = "float32",
    host: tuple[int, int] = (0, 1),
    rows_per_shard: int = ROWS_PER_SHARD,
) -> dict:
    """Run the target over every request and write the store. An interrupted extraction is resumed.

    Shards and their batches are fixed before the first forward pass. The rows therefore do not depend on the
    process that writes them. In a pod every process runs every batch on the common mesh, and process p of
    P writes every P-th missing shard. Hosts without a pod (`host`) share only the directory. The host that
    writes the last shard commits the store.

    Args:
      wanted: requests by split.
      capture: (ids_BT, valid_BT, positions_BP) -> h_BPD, replicated on every process.
      plan: JSON values that determine the rows. A store in `directory` with another plan raises UserError.
      batch: texts per forward pass. pad_id: the id of padding tokens.
      notes: further entries of the store's meta.
      dtype: of h on disk, float32 or bfloat16.
      host: (i, n) extracts only the shards i, i + n, ...

    Returns:
      The store's meta.

    Raises:
      UserError: as `store_writer.Writer`.
      distributed.Stopped: this host's shards are written, and shards of other hosts are missing.
    """
    groups = {s: request_batches.shard(r, rows_per_shard) for s, r in wanted.items()}
    plan = {**plan, "batch": batch, "shards": {s: len(g) for s, g in groups.items()}}
    # The first process creates the store and decides which shards are missing.
    begin = lambda: store_writer.Writer(directory, d_model, plan, dtype)
    writer = distributed.run_on_first(begin) or begin()
    shards = [(s, i) for s, g in groups.items() for i in range(len(g))]
    missing = distributed.broadcast_flags(_missing(writer, groups, shards))
    mine = [n % host[1] == host[0] for n in range(len(shards))]
    left = [s for s, wanting, own in zip(shards, missing, mine, strict=True) if wanting and own]
    total = sum(len(groups[s][i]) for (s, i), own in zip(shards, mine, strict=True) if own)
    todo = sum(len(groups[s][i]) for s, i in left)
    meter = Meter(capture)
    with Progress("capture", total, total - todo, unit="texts") as bar:
        for n, (split, i) in enumerate(left):
            found = _capture_group(groups[split][i], meter, batch, pad_id, bar)
            if n % jax.process_count() == jax.process_index():
                writer.write_shard(split, i, len(groups[split]), found)
            else:
                collections.deque(found, maxlen=0)
    if left and distributed.is_first():
        print(meter.said(), file=sys.stderr)
    distributed.barrier()
    others = int(sum(_missing(writer, groups, shards))) if host[1] > 1 else 0
    if others:
        raise distributed.Stopped(
            f"host {host[0]} of {host[1]} has written its shards of {directory}; {others} of {len(shards)} "
            "belong to other hosts and are not written yet",
            together=True,
        )
    distributed.run_on_first(lambda: _commit(writer, notes))
    return store.read_meta(directory)


def _missing(writer: store_writer.Writer, groups: dict, shards: list) -> list[bool]:
    done = {s: writer.done_shards(s, len(g)) for s, g in groups.items()}
    return [i not in done[s] for s, i in shards]


def _commit(writer: store_writer.Writer, notes: dict) -> None:
    try:
        writer.commit(notes)
    except FileNotFoundError:  # another host has just committed it and removed the progress directory
        if not store.is_complete(writer.directory):
            raise


def capture_in_memory(wanted: list[Request], capture: Callable, *, batch: int, pad_id: int,
                      label: str) -> dict:
    """Capture the requests in memory: the columns of a store of them (`store.load_columns`).

    Rows have the store's order, and the forward passes have its batches. h is [N, ...], where `capture`
    returns [...] for a position. Raises UserError for an activation that is zero or not finite.
    """
    found, meter = [], Meter(capture)
    with Progress(label, len(wanted), unit="texts") as bar:
        for group in request_batches.shard(wanted, ROWS_PER_SHARD):
            found += _capture_group(group, meter, batch, pad_id, bar)
    for row in found:
        for h_D in np.atleast_2d(row["h"]):
            store_writer.check_norm(h_D, h_D.shape[-1], row)
    ordered = request_batches.stored_order(wanted, ROWS_PER_SHARD, batch)
    return request_batches.columns(ordered) | {"h": np.stack([row["h"] for row in found])}


class Meter:
    """A wrapper of `capture` that counts texts, rows and tokens and measures time.

    It blocks on the first `TIMED` batches of each shape, to measure the forward pass alone. Later batches run
    while the rows of earlier ones are written.
    """

    TIMED = 3

    def __init__(self, capture: Callable):
        self._capture, self._began = capture, time.monotonic()
        self._best: dict[tuple, float] = {}
        self._calls: collections.Counter = collections.Counter()
        self.tokens = self.rows = self.texts = 0
        self._compiling = 0.0

    def __call__(self, b: request_batches.Batch):
        """Return h_BPD of a batch; the computation may still be running."""
        shape, began = b.ids_BT.shape, time.monotonic()
        h_BPD = self._capture(b.ids_BT, b.valid_BT, b.positions_BP)
        self._calls[shape] += 1
        if self._calls[shape] <= self.TIMED:
            jax.block_until_ready(h_BPD)
            took = time.monotonic() - began
            if self._calls[shape] > 1:
                self._best[shape] = min(took, self._best.get(shape, took))
            else:
                self._compiling += took
        self.tokens += sum(len(r.ids) for r in b.requests)
        self.rows += sum(len(r.positions) for r in b.requests)
        self.texts += len(b.requests)
        return h_BPD

    def said(self) -> str:
        """Return one line for the log: tokens per second, and the time of the forward passes alone."""
        seconds = time.monotonic() - self._began
        places = sum(n * b * t for (b, t), n in self._calls.items())
        line = (
            f"capture: {self.texts:,} texts, {self.rows:,} rows, {self.tokens:,} tokens in {seconds:.1f} s, "
            f"{self.tokens / seconds:,.0f} tokens/s; {1 - self.tokens / places:.0%} of the slots are padding"
        )
        # The first batch of a shape includes compilation, so it is excluded from both times.
        known = sum((self._calls[s] - 1) * best for s, best in self._best.items())
        after = seconds - self._compiling
        if not known or after <= 0:
            return line
        return (
            f"{line}; the first batch of each shape took {self._compiling:.1f} s, compilation included; the "
            f"forward passes of the others need {known:.1f} s of {after:.1f} s"
        )


def _capture_group(group, meter: Meter, batch: int, pad_id: int, bar: Progress):
    under_way = None
    for b in request_batches.batches(group, batch, pad_id=pad_id):
        before, under_way = under_way, (b, meter(b))
        if before:
            yield from _rows(*before, bar)
    if under_way:
        yield from _rows(*under_way, bar)


def _rows(b: request_batches.Batch, h_BPD, bar: Progress):
    yield from request_batches.rows_of_batch(b, np.asarray(h_BPD))
    bar.advance(len(b.requests))
