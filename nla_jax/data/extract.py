"""Documents -> activations on disk: which texts, the target's forward pass, the store."""

import collections
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nla_jax import pod
from nla_jax.data import batching, explanations, rows, selection, splits, store
from nla_jax.errors import UserError
from nla_jax.metrics import Progress

ROWS_PER_SHARD = 1024


def requests(
    data, seed: int, tok, rl: bool = True
) -> tuple[dict[str, list[rows.Request]], dict, dict]:
    """What to capture for each split, how many explanations were used or left out, by reason, and what
    became of the corpus ("documents" by split, "left out" by reason, "near duplicates" by split).

    Args:
      data: the `data` part of a config (`nla_jax.configs`).
      seed: of positions, windows and cuts.
      rl: whether the RL split is captured (it is not with online activations).

    Raises:
      UserError: as the corpora and rows modules, or a split that is left empty.
    """
    path, named = _explanations(data)
    found = selection.select(data, seed, tok, named)
    home = found.home
    window = _window(data, tok, seed)
    for split, wanted in [
        ("warm", data.warm_windows or data.explanations),
        ("rl", data.rl_windows),
    ]:
        if wanted and not found.counts["documents"].get(split):
            raise UserError(
                f"corpus {data.corpus!r} has no document for split {split!r}: give more "
                "documents or change data.warm_fraction"
            )
    out: dict[str, list] = {"warm": [], "rl": [], "heldout": []}
    drops: dict = {}
    if data.explanations:
        out["warm"], drops = _explained(data, seed, tok, found, path)
        out["heldout"], _ = _explained(data, seed, tok, found, path, "heldout")
    if not out["heldout"]:
        if not home["heldout"]:
            raise UserError(f"corpus {data.corpus!r} has no held-out document: give more documents")
        out["heldout"] = rows.window_cuts(
            home["heldout"], positions=1, max_windows=data.heldout_rows, **window
        )
    for split, n in [("warm", data.warm_windows), ("rl", data.rl_windows if rl else 0)]:
        if n:
            out[split] += rows.window_cuts(home[split], positions=data.positions, max_windows=n, **window)
    if data.ood:
        n = -(-data.ood_rows // data.ood_positions)
        out["ood"] = rows.window_cuts(home["ood"], positions=data.ood_positions, max_windows=n, **window)
    return {k: v for k, v in out.items() if v}, drops, found.counts


def fresh_requests(data, seed: int, tok, split: str, fresh_seed: int) -> list[rows.Request]:
    """The requests of `requests` for "warm" or "rl", with documents, windows, positions and the cuts of
    explained texts drawn with `fresh_seed`. The other splits stay those of `seed`, and none of their
    documents resembles one of these.

    Raises UserError as `requests`.
    """
    path, named = _explanations(data)
    found = selection.select(data, seed, tok, named, (split, fresh_seed))
    out = []
    if split == "warm" and data.explanations:
        out, _ = _explained(data, fresh_seed, tok, found, path)
    if n := {"warm": data.warm_windows, "rl": data.rl_windows}[split]:
        if not found.home[split]:
            raise UserError(
                f"corpus {data.corpus!r} has no document for split {split!r}: give more documents"
            )
        window = _window(data, tok, fresh_seed)
        out += rows.window_cuts(found.home[split], positions=data.positions, max_windows=n, **window)
    return out


def thinned(found: list[rows.Request], n_rows: int) -> list[rows.Request]:
    """About `n_rows` rows of the requests, by a keyed hash of where they are; all where there are fewer."""
    there = sum(len(r.positions) for r in found)
    return found if there <= n_rows else _choose(found, max(len(found) * n_rows // there, 1))


def _explained(data, seed: int, tok, found: selection.Selection, path, split: str = "warm"):
    """(requests of the explained texts of a split, how many were used or left out)."""
    cuts = data.cuts_per_text if split == "warm" else 1
    requests, drops = rows.explained_cuts(
        found.named, tok, split, jsonl_path=path, warm=data.warm_fraction, cuts_per_text=cuts,
        positions=data.explained_positions if split == "warm" else 1, seed=seed,
        dropped=found.dropped)  # fmt: skip
    n = {"warm": data.explained_rows * cuts, "heldout": data.heldout_rows}[split]
    return _choose(requests, n), drops


def _window(data, tok, seed: int) -> dict:
    return dict(tok=tok, window_tokens=data.window_tokens, min_position=data.min_position, seed=seed)


def _explanations(data):
    """(path of the explanations or None for the shipped ones, ids of the documents that they are about)."""
    path = None if data.explanations == "shipped" else data.explanations
    return path, explanations.documents(path) if data.explanations else frozenset()


def _choose(found: list, n: int) -> list:
    """n of the requests (0: all) by a keyed hash of where they are, whatever their order."""
    if not n or len(found) <= n:
        return found
    # All cuts of one text share its end, so they are kept or dropped together.
    rank = sorted(
        range(len(found)),
        key=lambda i: (splits.keyed_hash("choose", found[i].doc_id, found[i].explanations[-1:]), i),
    )
    return [found[i] for i in sorted(rank[:n])]


def extract(
    directory: str | Path,
    wanted: dict[str, list[rows.Request]],
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
    """Run the target over every request and write the store; goes on where it was stopped.

    Shards are cut before anything is run, and batches inside them, so that the rows do not depend on who
    writes them. In a pod every process runs every batch, on the mesh of all, and process p of P writes the
    shards p, p + P, ... of those that are missing. Hosts that are no pod (`host`) share a directory and
    nothing else: whoever writes the last shard makes the store readable.

    Args:
      capture: (ids_BT, valid_BT, positions_BP) -> h_BPD, whole on every process.
      plan: JSON values that decide what the rows are; another plan in `directory` is refused.
      notes: what else is to stand in the store's meta.
      dtype: of h on the disk, float32 or bfloat16.
      host: (i, n): only the shards i, i + n, ...

    Returns:
      The store's meta.

    Raises:
      pod.Stopped: the shards of this host are written, and some of other hosts are not.
    """
    groups = {s: batching.shard(r, rows_per_shard) for s, r in wanted.items()}
    plan = {**plan, "batch": batch, "shards": {s: len(g) for s, g in groups.items()}}
    # The first process begins the store, and says what is missing.
    begin = lambda: store.Writer(directory, d_model, plan, dtype)  # noqa: E731
    writer = pod.on_first(begin) or begin()
    shards = [(s, i) for s, g in groups.items() for i in range(len(g))]
    missing = pod.agreed(_missing(writer, groups, shards))
    mine = [n % host[1] == host[0] for n in range(len(shards))]
    left = [s for s, wanting, own in zip(shards, missing, mine, strict=True) if wanting and own]
    total = sum(len(groups[s][i]) for (s, i), own in zip(shards, mine, strict=True) if own)
    todo = sum(len(groups[s][i]) for s, i in left)
    meter = Meter(capture)
    with Progress("capture", total, total - todo, unit="texts") as bar:
        for n, (split, i) in enumerate(left):
            found = _captured(groups[split][i], meter, batch, pad_id, bar)
            if n % jax.process_count() == jax.process_index():
                writer.write_shard(split, i, len(groups[split]), found)
            else:
                collections.deque(found, maxlen=0)
    if left and pod.is_first():
        print(meter.said(), file=sys.stderr)
    pod.barrier()
    others = int(sum(_missing(writer, groups, shards))) if host[1] > 1 else 0
    if others:
        raise pod.Stopped(
            f"host {host[0]} of {host[1]} has written its shards of {directory}; {others} of {len(shards)} "
            "belong to other hosts and are not there yet",
            together=True,
        )
    pod.on_first(lambda: _commit(writer, notes))
    return store.read_meta(directory)


def _missing(writer: store.Writer, groups: dict, shards: list) -> list[bool]:
    done = {s: writer.done_shards(s, len(g)) for s, g in groups.items()}
    return [i not in done[s] for s, i in shards]


def _commit(writer: store.Writer, notes: dict) -> None:
    try:
        writer.commit(notes)
    except FileNotFoundError:  # another host has just done it, and cleared up
        if not store.is_complete(writer.directory):
            raise


def in_memory(wanted: list[rows.Request], capture: Callable, *, batch: int, pad_id: int, label: str) -> dict:
    """The columns that a store of these requests would give back (`store.load_columns`), in its order and
    from the same forward passes, with nothing written; h is [N, ...] of what `capture` gives for a position.

    Raises UserError for an activation that is zero or not finite.
    """
    found, meter = [], Meter(capture)
    with Progress(label, len(wanted), unit="texts") as bar:
        for group in batching.shard(wanted, ROWS_PER_SHARD):
            found += _captured(group, meter, batch, pad_id, bar)
    for row in found:
        for h_D in np.atleast_2d(row["h"]):
            store.checked_norm(h_D, h_D.shape[-1], row)
    ordered = batching.stored_order(wanted, ROWS_PER_SHARD, batch)
    return batching.columns(ordered) | {"h": np.stack([row["h"] for row in found])}


class Meter:
    """Calls `capture` and keeps account: what was computed, how much of it was text, how long it took.

    The first `TIMED` batches of each shape are waited for, to know what the target's forward pass takes
    alone; the others run while the rows before them are written.
    """

    TIMED = 3

    def __init__(self, capture: Callable):
        self._capture, self._began = capture, time.monotonic()
        self._best: dict[tuple, float] = {}
        self._calls: collections.Counter = collections.Counter()
        self.tokens = self.rows = self.texts = 0
        self._compiling = 0.0

    def __call__(self, b: batching.Batch):
        """h_BPD of a batch, perhaps still under way."""
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
        """One line: tokens a second, against the forward passes alone at the best rate of each shape."""
        seconds = time.monotonic() - self._began
        places = sum(n * b * t for (b, t), n in self._calls.items())
        line = (
            f"capture: {self.texts:,} texts, {self.rows:,} rows, {self.tokens:,} tokens in {seconds:.1f} s, "
            f"{self.tokens / seconds:,.0f} tokens/s; {1 - self.tokens / places:.0%} of the places are padding"
        )
        # A shape that came once was compiled in that time: its passes are not counted on either side.
        known = sum((self._calls[s] - 1) * best for s, best in self._best.items())
        after = seconds - self._compiling
        if not known or after <= 0:
            return line
        return (
            f"{line}; the first batch of each shape took {self._compiling:.1f} s, compiling included; the "
            f"forward passes of the others need {known:.1f} s of {after:.1f} s"
        )


def _captured(group, meter: Meter, batch: int, pad_id: int, bar: Progress):
    under_way = None
    for b in batching.batches(group, batch, pad_id=pad_id):
        before, under_way = under_way, (b, meter(b))
        if before:
            yield from _rows(*before, bar)
    if under_way:
        yield from _rows(*under_way, bar)


def _rows(b: batching.Batch, h_BPD, bar: Progress):
    yield from batching.captured(b, np.asarray(h_BPD))
    bar.advance(len(b.requests))
