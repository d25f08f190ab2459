"""The writer of a store of activations, shard by shard; `nla_jax.data.store` reads it."""

import collections
import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.data import store
from nla_jax.data.splits import check_disjoint
from nla_jax.data.store import META, NAME
from nla_jax.errors import UserError
from nla_jax.util import paths


class Writer:
    """A writer of a store, shard by shard. It resumes an unfinished store of the same plan.

    `plan` is everything that determines the rows (target, layer, corpus, seed, settings, numbers of
    shards), as JSON values. Shards are written atomically, and no split can be opened before `commit`.
    Several processes may write different shards of one plan at the same time.

    h is stored in `dtype`, "float32" or "bfloat16". "storage" in the meta has the rounding error: the largest
    relative error of a number, and the mean squared error of h scaled to norm √D, per dimension. Compare the
    latter with the variance in FVE (about 0.5).

        writer = Writer(directory, d_model, plan)
        groups = rows.shard(requests, rows_per_shard)
        for i in sorted(set(range(len(groups))) - writer.done_shards(split, len(groups))):
            writer.write_shard(split, i, len(groups), rows_of(groups[i]))
        writer.commit({"drops": counts})

    Raises:
        UserError: the directory has a complete store, or an unfinished one with another plan (the message
            gives the keys).
    """

    def __init__(
        self, directory: str | Path, d_model: int, plan: Mapping[str, Any], dtype: str = "float32"
    ):
        self.directory = paths.path(directory)
        self.d_model = d_model
        kept = {} if dtype == "float32" else {"storage": dtype}
        self.plan = json.loads(json.dumps({**plan, "d_model": d_model, **kept}))
        self._progress = self.directory / ".progress"
        if store.is_complete(self.directory):
            raise UserError(f"{self.directory}: already complete; delete it to extract again")
        self._progress.mkdir(parents=True, exist_ok=True)
        path = self._progress / "plan.json"
        if not path.is_file():
            with contextlib.suppress(FileNotFoundError):  # another process may write it at the same time
                _write_json(path, self.plan)
        else:
            begun = json.loads(path.read_text("utf-8"))
            keys = begun.keys() | self.plan.keys()
            other = sorted(k for k in keys if begun.get(k) != self.plan.get(k))
            if other:
                raise UserError(
                    f"{self.directory}: begun with other settings ({', '.join(other)}); delete it, "
                    "or choose another directory"
                )
        self._features = store.features(d_model, dtype)

    def done_shards(self, split: str, n_shards: int) -> set[int]:
        """Return the shards of `split` that are already written."""
        return {
            i
            for i in range(n_shards)
            if self._shard(split, i, n_shards).is_file()
            and self._note(split, i, n_shards).is_file()
        }

    def write_shard(
        self, split: str, index: int, n_shards: int, rows: Iterable[Mapping[str, Any]]
    ) -> int:
        """Write one whole shard and return its number of rows.

        Args:
            split: lower-case letters only, e.g. "warm".
            rows: from `request_batches.rows_of_batch`: doc_id, position, n_tokens, text, next_text,
                explanation and h [d_model], not normalised.

        Raises:
            UserError: h has another shape, is not finite or is zero (the message gives document and
                position), or there is no row.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        if not re.fullmatch(r"[a-z]+", split) or not 0 <= index < n_shards:
            raise UserError(f"cannot write shard {index} of {n_shards} of split {split!r}")
        # ArrayRecordWriter supports local paths only.
        with paths.upload_after(self._progress / f"{split}-{index}.part") as temporary:
            norms, doc_ids, errors = [], set(), []
            writer = ArrayRecordWriter(str(paths.plain(temporary.parent) / temporary.name), "group_size:1")
            try:
                for row in rows:
                    h_D = np.asarray(row["h"], np.float32)
                    norms.append(check_norm(h_D, self.d_model, row))
                    doc_ids.add(row["doc_id"])
                    kept_D = h_D.astype(self._features["h"].np_dtype)
                    errors.append(_rounding(h_D, kept_D, norms[-1]))
                    writer.write(self._features.serialize_example({**row, "h": kept_D}))
            finally:
                writer.close()
            if not norms:
                raise UserError(f"shard {index} of split {split!r} has no row: use fewer shards")
        _write_json(
            self._note(split, index, n_shards),
            {"norms": norms, "doc_ids": sorted(doc_ids), "errors": np.array(errors).T.tolist()},
        )
        (self._progress / f"{split}-{index}.part").replace(self._shard(split, index, n_shards))
        return len(norms)

    def commit(self, meta: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check that splits share no document, and write the metadata, which makes the store readable.

        Returns the contents of nla_store.json: `meta` plus "plan", "splits", "files" and "storage".

        Raises:
            UserError: a shard is missing, there is no shard, or a document is in two splits.
        """
        import tensorflow_datasets as tfds

        shards = self._all_shards()
        notes = {
            split: [json.loads(self._note(split, i, n).read_text("utf-8")) for i in range(n)]
            for split, n in shards.items()
        }
        documents = {s: {d for note in ns for d in note["doc_ids"]} for s, ns in notes.items()}
        check_disjoint(documents)
        infos, about, files = [], {}, {}
        for split, n in shards.items():
            shard_paths = [self._shard(split, i, n) for i in range(n)]
            sizes = {p.name: paths.size(p) for p in shard_paths}
            files |= sizes
            norms = np.concatenate([note["norms"] for note in notes[split]])
            about[split] = {
                "rows": len(norms),
                "documents": len(documents[split]),
                "shards": n,
                "norm": quantiles(norms),
            }
            lengths = [len(note["norms"]) for note in notes[split]]
            infos.append(tfds.core.SplitInfo(split, lengths, sum(sizes.values())))
        tfds.folder_dataset.write_metadata(
            data_dir=str(paths.plain(self.directory)),
            features=self._features,
            split_infos=infos,
            check_data=False,
            description="Activations of a language model, with the texts that they were read from.",
        )
        relative, squared = np.concatenate(
            [n.get("errors", [[0.0], [0.0]]) for ns in notes.values() for n in ns], 1
        )
        storage = {
            "dtype": self.plan.get("storage", "float32"),
            "largest relative error": float(relative.max()),
            "mean squared error": float(squared.mean()),
        }
        whole = {**(meta or {}), "plan": self.plan, "splits": about, "files": files, "storage": storage}
        _write_json(self.directory / META, whole)
        paths.remove(self._progress)
        return whole

    def _shard(self, split: str, index: int, n: int) -> Path:
        return self.directory / f"{NAME}-{split}.array_record-{index:05d}-of-{n:05d}"

    def _note(self, split: str, index: int, n: int) -> Path:
        return self._progress / f"{split}-{index:05d}-of-{n:05d}.json"

    def _all_shards(self) -> dict[str, int]:
        """Return the number of shards by split. Raises UserError if a shard is missing."""
        pattern = re.compile(rf"{NAME}-([a-z]+)\.array_record-(\d{{5}})-of-(\d{{5}})")
        found: dict[str, set[int]] = collections.defaultdict(set)
        for match in filter(None, (pattern.fullmatch(p.name) for p in self.directory.iterdir())):
            found[match[1]].add(int(match[3]))
        if not found:
            raise UserError(f"{self.directory}: no shard to commit; extract some rows first")
        for split, totals in found.items():
            n = max(totals)
            missing = sorted(set(range(n)) - self.done_shards(split, n))
            if len(totals) > 1 or missing:
                raise UserError(
                    f"{self.directory}: split {split!r} is incomplete (shards {missing} of {n}); "
                    "run the same command again"
                )
        return {split: max(totals) for split, totals in sorted(found.items())}


def quantiles(norms) -> dict[str, float]:
    """Return "min", "p25", "p50", "p75" and "max" of the norms of a split."""
    named = {"min": 0, "p25": 25, "p50": 50, "p75": 75, "max": 100}
    return {name: float(np.percentile(norms, q)) for name, q in named.items()}


def check_norm(h_D: np.ndarray, d_model: int, row: Mapping[str, Any]) -> float:
    """Return |h|. Raises UserError, with document and token, if h is zero, not finite or not [d_model]."""
    norm = float(np.linalg.norm(h_D.astype(np.float64))) if h_D.shape == (d_model,) else None
    if norm is None or not np.isfinite(norm) or norm == 0:
        what = f"has shape {h_D.shape}, not ({d_model},)" if norm is None else "is zero"
        if norm is not None and not np.isfinite(norm):
            what = "is not finite"
        raise UserError(
            f"the activation of {row['doc_id']!r} at token {row['position']} {what}: check the "
            "target's weights and precision"
        )
    return norm


def _rounding(h_D: np.ndarray, kept_D: np.ndarray, norm: float) -> tuple[float, float]:
    """Return (largest relative error of a number, mean squared error with h scaled to norm √D)."""
    difference_D = h_D.astype(np.float64) - kept_D.astype(np.float64)
    if not difference_D.any():
        return 0.0, 0.0
    relative_D = np.abs(difference_D) / np.maximum(np.abs(h_D), np.finfo(np.float32).tiny)
    return float(relative_D.max()), float(difference_D @ difference_D / norm**2)


def _write_json(path: Path, value: Any) -> None:
    paths.write(path, json.dumps(value, indent=1, ensure_ascii=False))
