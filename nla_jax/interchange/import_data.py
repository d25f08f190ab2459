"""Import official data files into a store of activations, from which runs start: `nla data import`.

Splits are by document. A document of a `heldout` file is held out. Without such files, a share of all
documents is held out, by a hash of the id. The file's stage determines the split of other documents: av_sft
and ar_sft give warm, rl gives rl, and base a hash, as for our own corpora. A document in two splits raises
UserError.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nla_jax.data import store, store_writer
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.interchange import data_sidecar, parquet, sidecar_common
from nla_jax.util import locks, paths, writable
from nla_jax.util.progress import Progress

ROWS_PER_SHARD = 1024
SPLITS = ("heldout", "rl", "warm")  # a row's code is an index into it, or -1 if the row is left out
STAGE_SPLIT = {"av_sft": "warm", "ar_sft": "warm", "rl": "rl"}


def import_files(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    heldout: Sequence[str | Path] = (),
    heldout_share: float = 0.02,
    heldout_rows: int = 500,
    warm_fraction: float = 0.75,
    rows_per_shard: int = ROWS_PER_SHARD,
    label: str = "import",
) -> dict:
    """Write the store `out` from data files. An interrupted import is resumed at its next shard.

    Args:
      files: .parquet files, with their sidecars in the same directory.
      heldout: further files, whose documents are held out.
      heldout_share: the share of all documents to hold out if there are no `heldout` files. A keyed choice
        of at most `heldout_rows` of their rows is kept (0: all). None of their rows is trained on.
      warm_fraction: the share of base files' documents in the warm split; the others are in rl.

    Returns:
      The store's meta. "interchange" has the facts of the sidecars.

    Raises:
      UserError: as `parquet` and `data_sidecar`; files have different models or layers; a document is in
        two splits; no document is held out; `out` has a complete store or one of other files.
    """
    out = paths.path(out)
    if not files:
        raise UserError("no file to import: give the .parquet files of a data set")
    if not 0 < heldout_share < 1 or not 0 <= warm_fraction <= 1 or heldout_rows < 0 or rows_per_shard < 1:
        raise UserError(
            f"heldout share {heldout_share}, rows {heldout_rows}, warm fraction {warm_fraction}: shares must "
            "be between 0 and 1, and rows not negative"
        )
    if store.is_complete(out):
        raise UserError(f"{out}: already complete; delete it to import again, or choose another --out")
    writable.check_directory(out)
    with locks.hold_directory(out):
        return _import(files, out, heldout, heldout_share, heldout_rows, warm_fraction, rows_per_shard, label)


def _import(
    files, out: Path, heldout, heldout_share: float, heldout_rows: int, warm_fraction: float,
    rows_per_shard: int, label: str,
) -> dict:
    files, heldout = [_fetch(f) for f in files], [_fetch(f) for f in heldout]
    opened = [parquet.open_file(f) for f in (*files, *heldout)]
    for other in opened[1:]:
        sidecar_common.check_same(opened[0].path, opened[0].meta.facts(), other.path, other.meta.facts())
    held = [i >= len(files) for i in range(len(opened))]
    codes, drops = _assign_splits(opened, held, heldout_share, heldout_rows, warm_fraction)
    meta = opened[0].meta
    sizes = {s: sum(int((c == k).sum()) for c in codes) for k, s in enumerate(SPLITS)}
    plan = {
        "target": meta.fingerprint,
        "layer": meta.layer_index,
        "imported": [_identity(f, h) for f, h in zip(opened, held, strict=True)],
        "heldout": [heldout_share, heldout_rows] if not heldout else "files",
        "warm_fraction": warm_fraction,
        "rows_per_shard": rows_per_shard,
    }
    writer = store_writer.Writer(out, meta.d_model, plan)
    shards = {s: -(-n // rows_per_shard) for s, n in sizes.items()}
    _write(writer, opened, codes, shards, rows_per_shard, label)
    return writer.commit({"drops": drops, "interchange": facts_of(opened)})


def facts_of(opened: Sequence[parquet.DataFile]) -> dict:
    """Return the facts of one data set's sidecars as JSON values, for runs that use it and for export."""
    metas = [f.meta for f in opened]
    tokens = next((m.tokens for m in metas if m.tokens and m.tokens.critic_suffix_ids is not None), None)
    tokens = tokens or next((m.tokens for m in metas if m.tokens), None)
    roles = {r: next((t for m in metas if (t := getattr(m.templates, r))), None) for r in ("av", "ar")}
    return {
        "base_model": metas[0].base_model,
        "d_model": metas[0].d_model,
        "layer_index": metas[0].layer_index,
        "fingerprint": next((m.fingerprint for m in metas if m.fingerprint), ""),
        "injection_scale": next((m.injection_scale for m in metas if m.injection_scale), None),
        "tokens": dataclasses.asdict(tokens) if tokens else None,
        "templates": roles,
        "extraction": metas[0].extraction,
        "api_summaries": next((m.api_summaries for m in metas if m.api_summaries), None),
        "datasets": [m.dataset_id for m in metas],
    }


def _identity(file: parquet.DataFile, held: bool) -> list:
    """Return what distinguishes a file from another with the same name."""
    sidecar = data_sidecar.path_of(file.path).read_bytes()
    digest = hashlib.sha256(sidecar + paths.digest(file.path).encode()).hexdigest()[:16]
    return [file.path.name, file.path.stat().st_size, digest, "heldout" if held else file.meta.stage]


def _assign_splits(opened, held, share: float, most: int, warm: float) -> tuple[list[np.ndarray], dict]:
    """Return each file's split of every row, as an index into SPLITS or -1, and the rows left out, by reason.

    Only the documents' ids are read.
    """
    home: dict[str, tuple[int, int]] = {}  # document -> split, and the file that determined it
    drops = {"in a held-out document": 0, "held-out rows beyond the number asked for": 0}
    codes: list[np.ndarray] = [np.empty(0, np.int8)] * len(opened)
    taken: list[tuple[int, int, int]] = []  # hash, file and row of held-out rows, of which `most` are kept
    for f in sorted(range(len(opened)), key=lambda f: not held[f]):  # held-out files first
        found = []
        for docs in parquet.documents(opened[f]):
            for doc in docs:
                code = _code(doc, opened[f].meta.stage, held[f], None if any(held) else share, warm)
                was, by = home.setdefault(doc, (code, f))
                if was != code:
                    if not held[by]:
                        raise UserError(
                            f"document {doc!r} goes to {SPLITS[was]} by {opened[by].path} and to "
                            f"{SPLITS[code]} by {opened[f].path}: splits must not share documents; omit one "
                            "of the files"
                        )
                    code = -1
                    drops["in a held-out document"] += 1
                if code == 0 and not any(held):
                    taken.append((keyed_hash("heldout row", doc, len(taken)), f, len(found)))
                found.append(code)
        codes[f] = np.array(found, np.int8)
    if not any((c == 0).any() for c in codes):
        raise UserError(
            f"none of {len(home)} documents is in the held-out share of {share}: raise it, or give files "
            "whose documents are held out"
        )
    for _, f, row in sorted(taken)[most:] if most else ():
        codes[f][row] = -1
        drops["held-out rows beyond the number asked for"] += 1
    return codes, {reason: n for reason, n in drops.items() if n}


def _code(doc: str, stage: str, held: bool, share: float | None, warm: float) -> int:
    if held or (share is not None and keyed_hash("heldout", doc) < share * 2.0**64):
        return SPLITS.index("heldout")
    if stage == "base":
        return SPLITS.index("warm" if keyed_hash("split", doc) < warm * 2.0**64 else "rl")
    return SPLITS.index(STAGE_SPLIT[stage])


def _fetch(file: str | Path) -> Path:
    """Return the local path of the file; copy it and its sidecar from object storage if necessary."""
    if paths.is_remote(file):
        paths.local_copy(data_sidecar.path_of(file))
    return paths.local_copy(file)


def _write(writer: store_writer.Writer, opened, codes, shards: dict[str, int], size: int, label: str) -> None:
    """Write every missing shard in one pass over the files; memory holds at most one shard per split."""
    done = {s: writer.done_shards(s, n) for s, n in shards.items()}
    ranks, before = [], np.zeros(len(SPLITS), int)  # a row's number within its split
    for code in codes:
        rank = np.zeros(len(code), int)
        for k in range(len(SPLITS)):
            mine = code == k
            rank[mine] = before[k] + np.arange(mine.sum())
            before[k] += mine.sum()
        ranks.append(rank)
    wanted = [
        np.array([c >= 0 and r // size not in done[SPLITS[c]] for c, r in zip(code, rank, strict=True)], bool)
        for code, rank in zip(codes, ranks, strict=True)
    ]
    total, todo = int(before.sum()), sum(int(w.sum()) for w in wanted)
    waiting: dict[int, list[dict]] = {k: [] for k in range(len(SPLITS))}
    with Progress(label, total, total - todo, unit="rows") as bar:
        for file, code, rank, want in zip(opened, codes, ranks, wanted, strict=True):
            places = iter(np.flatnonzero(want))
            for some in parquet.rows(file, want):
                for row in some:
                    i = next(places)
                    k = int(code[i])
                    waiting[k].append(row)
                    if (rank[i] + 1) % size == 0 or rank[i] + 1 == before[k]:
                        writer.write_shard(SPLITS[k], int(rank[i]) // size, shards[SPLITS[k]], waiting[k])
                        waiting[k] = []
                bar.advance(len(some))
