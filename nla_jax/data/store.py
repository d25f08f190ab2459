"""The store of activations on disk: ArrayRecord shards with TFDS metadata, readable by Grain.

DIR/nla_activations-warm.array_record-00000-of-00004    rows, one TFDS split for each of ours
DIR/dataset_info.json, features.json                    for tfds.builder_from_directory(DIR)
DIR/nla_store.json                                      description of the rows; written last
DIR/.progress/                                          state of an unfinished extraction
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import UserError
from nla_jax.util import path_kinds, paths

NAME = "nla_activations"
META = path_kinds.STORE_META
TEXT_FIELDS = ("doc_id", "text", "next_text", "explanation")
INT_FIELDS = ("position", "n_tokens")
IN_DISTRIBUTION = (
    "in-distribution: these rows are a share of the imported files. A pair that was trained on the files, "
    "such as a released one, has seen them. A run that starts from the target on this store has not."
)


def features(d_model: int, dtype: str = "float32"):
    """Return the TFDS features of a row: the text and integer fields, and h in "float32" or "bfloat16"."""
    import ml_dtypes
    import tensorflow_datasets as tfds

    spec: dict[str, Any] = {name: tfds.features.Text() for name in TEXT_FIELDS}
    spec |= {name: np.int64 for name in INT_FIELDS}
    # Raw bytes are several times faster to write than a list of floats.
    number = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    spec["h"] = tfds.features.Tensor(shape=(d_model,), dtype=number, encoding="bytes")
    return tfds.features.FeaturesDict(spec)


def is_complete(directory: str | Path) -> bool:
    """Return whether `directory` contains a committed store."""
    return (paths.path(directory) / META).is_file()


def read_meta(directory: str | Path) -> dict[str, Any]:
    """Read nla_store.json: "plan", "splits" (rows, documents, norm percentiles), "files", "storage" and more.

    Raises:
        UserError: there is no store, it is unfinished, or a file is missing or truncated.
    """
    directory = paths.path(directory)
    if not is_complete(directory):
        if (directory / ".progress").is_dir():
            raise UserError(f"{directory}: unfinished extraction; run the same command again")
        hint = path_kinds.hint(directory) or "run `nla data extract` first"
        raise UserError(f"{directory}: no activations here; {hint}")
    try:
        meta = json.loads((directory / META).read_text("utf-8"))
        files = meta["files"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{directory / META}: damaged ({e}); extract again") from None
    for name, size in files.items():
        path = directory / name
        found = paths.size(path) if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes instead of {size}"
            raise UserError(f"{path}: {state}; the store was damaged or half copied: extract again")
    return meta


def split_notes(meta: Mapping[str, Any]) -> dict[str, str]:
    """Return what a reader of a split's figures must know, by split; `meta` as of `read_meta`, or {}.

    It is {"heldout": IN_DISTRIBUTION} if an import held out a share of the files' documents, which the plan
    says, and else {}."""
    plan = meta.get("plan", {})
    return {"heldout": IN_DISTRIBUTION} if "imported" in plan and plan["heldout"] != "files" else {}


class Rows(Sequence):
    """Random access to one split: `rows[i]` is a dict of str, int and h [d_model] float32.

    It can be a Grain source: `grain.MapDataset.source(rows)`.
    """

    def __init__(self, source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return _plain(self._source[int(index)])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [_plain(row) for row in self._source.__getitems__([int(i) for i in indices])]


def open_store(directory: str | Path, split: str) -> Rows:
    """Open a split of a committed store for random access, through TFDS.

    Raises:
        UserError: as `read_meta`, or the store has no such split.
    """
    import tensorflow_datasets as tfds

    _check_split(read_meta(directory), directory, split)
    place = paths.plain(paths.local_copy(directory))
    return Rows(tfds.builder_from_directory(str(place)).as_data_source(split))


def load_columns(
    directory: str | Path, split: str, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Load whole columns of a split into memory, with rows in stored order.

    Args:
        names: columns; all of them by default.

    Returns:
        "h" as float32 [N, d_model], "position" and "n_tokens" as int64 [N], texts as lists of
        N str.

    Raises:
        UserError: as `open_store`, or an unknown column.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    meta = read_meta(directory)
    about = _check_split(meta, directory, split)
    known = (*TEXT_FIELDS, *INT_FIELDS, "h")
    names = list(known if names is None else names)
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"no column {unknown[0]!r} in a store: there are {', '.join(known)}")
    d_model = meta["plan"]["d_model"]
    directory = paths.local_copy(directory)
    decode = features(d_model, meta["plan"].get("storage", "float32")).deserialize_example_np
    out: dict[str, Any] = {name: [None] * about["rows"] for name in names}
    for name in {"h", *INT_FIELDS} & out.keys():
        shape, dtype = ((d_model,), np.float32) if name == "h" else ((), np.int64)
        out[name] = np.empty((about["rows"], *shape), dtype)
    at = 0
    for index in range(about["shards"]):
        path = directory / f"{NAME}-{split}.array_record-{index:05d}-of-{about['shards']:05d}"
        try:
            reader = ArrayRecordReader(str(paths.plain(directory) / path.name))
            for record in reader.read_all():
                row = decode(record)
                for name in names:
                    out[name][at] = row[name].decode() if name in TEXT_FIELDS else row[name]
                at += 1
            reader.close()
        except Exception as e:  # damaged bytes make the reader, protobuf or TFDS raise many classes
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:150]
            raise UserError(f"{path}: damaged ({reason}); extract again") from e
    if at != about["rows"]:
        raise UserError(f"{directory}: {at} rows of {split!r} instead of {about['rows']}; extract again")
    return out


def _check_split(meta: Mapping[str, Any], directory: str | Path, split: str) -> dict[str, Any]:
    if split not in meta["splits"]:
        raise UserError(f"{directory} has no split {split!r}: it has {', '.join(meta['splits'])}")
    return meta["splits"][split]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}
    return {**plain, "h": np.asarray(row["h"], np.float32)}


def why_mismatch(meta: dict, *, name: str, fingerprint: str, layer: int, d_model: int,
                 called: str = "", digest: str = "") -> str:
    """Return why a store's activations are not those of block `layer` of a target; "" if they are.

    Args:
      meta: of `store.read_meta`. name, fingerprint, digest: of the target (`weights`). Older stores have no
        digest, and "" is that of older bundles.
      called: another name of the target, because imported files contain only a name.
    """
    plan = meta["plan"]
    if plan["d_model"] != d_model:
        return f"its vectors have {plan['d_model']} numbers, those of {name} {d_model}"
    if plan["layer"] != layer:
        return f"its activations are of layer {plan['layer']}, not {layer}"
    same = not digest or meta.get("digest", digest) == digest
    if plan["target"]:
        same = same and plan["target"] == fingerprint
        return "" if same else f"its activations are of other weights than {name}'s"
    said = meta["interchange"]["base_model"]
    if said == called or _last(said) == _last(name):
        return ""
    return (
        f"its files say base_model {said!r}, the target is {name!r}; if that is the same model, set "
        f"data.base_model={said!r}"
    )


def _last(name: str) -> str:
    return name.rstrip("/").split("/")[-1].lower()
