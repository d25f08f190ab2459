"""Documents -> activations on disk: which texts, the target's forward pass, the store."""

import collections
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nla_jax import pod
from nla_jax.data import batching, explanations, rows, selection, splits, store
from nla_jax.errors import UserError
from nla_jax.metrics import Progress

ROWS_PER_SHARD = 1024


def requests(data, seed: int, tok) -> tuple[dict[str, list[rows.Request]], dict, dict]:
    """What to capture for each split, how many explanations were used or left out, by reason, and what
    became of the corpus ("documents" by split, "left out" by reason, "near duplicates" by split).

    Args:
      data: the `data` part of a config (`nla_jax.configs`).
      seed: of positions, windows and cuts.

    Raises:
      UserError: as the corpora and rows modules, or a split that is left empty.
    """
    path = None if data.explanations == "shipped" else data.explanations
    named = explanations.documents(path) if data.explanations else frozenset()
    found = selection.select(data, seed, tok, named)
    home = found.home
    window = dict(tok=tok, window_tokens=data.window_tokens, min_position=data.min_position, seed=seed)
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
        written = dict(jsonl_path=path, warm=data.warm_fraction, seed=seed, dropped=found.dropped)
        out["warm"], drops = rows.explained_cuts(
            found.named, tok, "warm", cuts_per_text=data.cuts_per_text, **written
        )
        out["warm"] = _choose(out["warm"], data.explained_rows * data.cuts_per_text)
        out["heldout"], _ = rows.explained_cuts(found.named, tok, "heldout", **written)
        out["heldout"] = _choose(out["heldout"], data.heldout_rows)
    if not out["heldout"]:
        if not home["heldout"]:
            raise UserError(f"corpus {data.corpus!r} has no held-out document: give more documents")
        out["heldout"] = rows.window_cuts(
            home["heldout"], positions=1, max_windows=data.heldout_rows, **window
        )
    for split, n in [("warm", data.warm_windows), ("rl", data.rl_windows)]:
        if n:
            out[split] += rows.window_cuts(home[split], positions=data.positions, max_windows=n, **window)
    if data.ood:
        n = -(-data.ood_rows // data.ood_positions)
        out["ood"] = rows.window_cuts(home["ood"], positions=data.ood_positions, max_windows=n, **window)
    return {k: v for k, v in out.items() if v}, drops, found.counts


def _choose(found: list, n: int) -> list:
    """n of the requests (0: all) by a keyed hash of where they are, whatever their order."""
    if not n or len(found) <= n:
        return found
    # All cuts of one text share its end, so they are kept or dropped together.
    rank = sorted(
        range(len(found)),
        key=lambda i: (splits.keyed_hash("choose", found[i].doc_id, found[i].explanations), i),
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
) -> dict:
    """Run the target over every request and write the store; goes on where it was stopped.

    In a pod every process runs every batch, on the mesh of all, and process p of P writes the shards
    p, p + P, ... of those that are missing.

    Args:
      capture: (ids_BT, valid_BT, positions_BP) -> h_BPD, whole on every process.
      plan: JSON values that decide what the rows are; another plan in `directory` is refused.
      notes: what else is to stand in the store's meta.

    Returns:
      The store's meta.
    """
    groups = {s: batching.shard(r, ROWS_PER_SHARD) for s, r in wanted.items()}
    plan = {**plan, "batch": batch, "shards": {s: len(g) for s, g in groups.items()}}
    # The first process begins the store, and says what is missing.
    begin = lambda: store.Writer(directory, d_model, plan)  # noqa: E731
    writer = pod.on_first(begin) or begin()
    shards = [(s, i) for s, g in groups.items() for i in range(len(g))]
    done = {s: writer.done_shards(s, len(g)) for s, g in groups.items()}
    missing = pod.agreed([i not in done[s] for s, i in shards])
    left = [shard for shard, wanting in zip(shards, missing, strict=True) if wanting]
    total = sum(len(r) for r in wanted.values())
    todo = sum(len(groups[s][i]) for s, i in left)
    with Progress("capture", total, total - todo, unit="texts") as bar:
        for n, (split, i) in enumerate(left):
            found = _captured(groups[split][i], capture, batch, pad_id, bar)
            if n % jax.process_count() == jax.process_index():
                writer.write_shard(split, i, len(groups[split]), found)
            else:
                collections.deque(found, maxlen=0)
    pod.barrier()
    pod.on_first(lambda: writer.commit(notes))
    return store.read_meta(directory)


def _captured(group, capture, batch, pad_id, bar):
    for b in batching.batches(group, batch, pad_id=pad_id):
        h_BPD = np.asarray(capture(b.ids_BT, b.valid_BT, b.positions_BP))
        yield from batching.captured(b, h_BPD)
        bar.advance(len(b.requests))
