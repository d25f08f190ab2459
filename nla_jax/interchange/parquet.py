"""The official data files, parquet with a sidecar: their columns, and a reader.

A row is as in `nla_jax.data.store`: doc_id, position, n_tokens, text, next_text, explanation, and h [D], not
normalised. Fields without an official column have columns of our own, which official readers ignore.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nla_jax.errors import UserError
from nla_jax.interchange import data_sidecar, sidecar_common
from nla_jax.interchange.data_sidecar import DataMeta
from nla_jax.prompts import CLOSE, OPEN

INJECT = "<INJECT>"  # the marker in prompts
BATCH = 512  # rows in memory at once
BUFFER = 1 << 20  # bytes of read buffer per column, because a row group may be the whole file
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
DOC_ID = "nla_jax_doc_id"  # our doc_id, which may not have the official form
OURS = {
    DOC_ID: pa.string(),
    "nla_jax_position": pa.int64(),
    "nla_jax_n_tokens": pa.int64(),
    "nla_jax_next_text": pa.string(),
}
TEXT, WRITTEN = "detokenized_text_truncated", "api_explanation"
TYPES = {
    "response": "string", "doc_id": "string", TEXT: "string", WRITTEN: "string", DOC_ID: "string",
    "nla_jax_next_text": "string", "n_raw_tokens": "integer", "activation_layer": "integer",
    "nla_jax_position": "integer", "nla_jax_n_tokens": "integer",
}
_TAGGED = re.compile(f"{re.escape(OPEN.strip())}(.*?){re.escape(CLOSE.strip())}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A data file whose columns match its sidecar."""

    path: Path
    meta: DataMeta
    parquet: pq.ParquetFile

    @property
    def columns(self) -> list[str]:
        return self.parquet.schema_arrow.names

    @property
    def doc_column(self) -> str:
        return DOC_ID if DOC_ID in self.columns else "doc_id"


def open_file(path: str | Path) -> DataFile:
    """Open a data file; only its sidecar and its footer are read.

    Raises UserError if the file or its sidecar is missing or damaged, if a column is missing or has another
    type, or if the number of rows or the width is not that of the sidecar.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the .parquet files of a data set")
    meta = data_sidecar.read(path)
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
        schema, n_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path}: not a whole parquet file ({_first_line(e)}): copy it again") from e
    needed = {"av_sft": ("prompt", "response"), "ar_sft": ("prompt",), "rl": ("prompt",), "base": ()}
    for name in ("activation_vector", "doc_id", "n_raw_tokens", *needed[meta.stage]):
        if name not in schema.names:
            raise UserError(f"{path}: column {name!r} is missing (stage {meta.stage})")
    if twice := [n for n in schema.names if schema.names.count(n) > 1]:
        raise UserError(f"{path}: column {twice[0]!r} occurs twice")
    for name, kind in TYPES.items():
        if name in schema.names:
            _check_type(path, name, schema.field(name).type, kind)
    if "prompt" in needed[meta.stage]:
        kind = "string" if meta.stage == "ar_sft" else "messages"
        _check_type(path, "prompt", schema.field("prompt").type, kind)
    _check_vectors(path, schema.field("activation_vector").type, meta.d_model)
    if n_rows != meta.row_count:
        raise UserError(
            f"{path} has {n_rows} rows, but its sidecar says row_count {meta.row_count}: one of them is of "
            "another version, or the file is truncated; copy both again"
        )
    return DataFile(path, meta, file)


def documents(file: DataFile) -> Iterator[list[str]]:
    """Yield the document of every row, in lists. Raises UserError if a row is of another layer."""
    names = [file.doc_column, *(n for n in ("activation_layer",) if n in file.columns)]
    at = 0
    for batch in _batches(file, names, rows=1 << 14):
        for name in names:
            if batch.column(name).null_count:
                raise UserError(f"{file.path}: column {name!r} has rows without a value from row {at} on")
        if len(names) > 1:
            layers = np.asarray(batch.column("activation_layer"))
            if (wrong := np.flatnonzero(layers != file.meta.layer_index)).size:
                raise UserError(
                    f"{file.path}: row {at + wrong[0]} is of layer {layers[wrong[0]]}, but the sidecar says "
                    f"layer_index {file.meta.layer_index}"
                )
        yield batch.column(file.doc_column).to_pylist()
        at += len(batch)


def rows(file: DataFile, wanted: np.ndarray) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows where `wanted` ([n_rows] bool) is True, in order, in lists.

    Row groups without such rows are not read. Raises UserError for an invalid row.
    """
    names = [n for n in file.columns if n in (*TYPES, "prompt", "activation_vector")]
    about = file.parquet.metadata
    sizes = [about.row_group(g).num_rows for g in range(about.num_row_groups)]
    of_group = np.split(np.arange(len(wanted)), np.cumsum(sizes)[:-1])
    groups = [g for g, place in enumerate(of_group) if wanted[place].any()]
    if not groups:
        return
    places = np.concatenate([of_group[g] for g in groups])
    at = 0
    for batch in _batches(file, names, row_groups=groups):
        place = places[at : at + len(batch)]
        at += len(batch)
        if wanted[place].any():
            yield _to_rows(file, batch, place, wanted[place])


def _batches(file: DataFile, names: list[str], rows: int = BATCH, **options):
    try:
        yield from file.parquet.iter_batches(batch_size=rows, columns=names, use_threads=False, **options)
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file.path}: damaged ({_first_line(e)}): copy it again") from e


def _to_rows(file: DataFile, batch: pa.RecordBatch, place: np.ndarray, wanted: np.ndarray) -> list[dict]:
    """Convert the wanted rows of a batch. place: the batch's row numbers in the file."""
    h_BD = _vectors(file, batch.column("activation_vector"), place)
    values = {n: batch.column(n).to_pylist() for n in batch.schema.names if n in TYPES}
    explanations = _explanations(file, batch, values, place)
    out = []
    for i in np.flatnonzero(wanted):
        row = {name: column[i] for name, column in values.items()}
        n = row["n_raw_tokens"]
        if n is None or n < 1:
            raise UserError(f"{_row(file, place[i])}: n_raw_tokens is {n}, not a number from 1")
        position, n_tokens = row.get("nla_jax_position"), row.get("nla_jax_n_tokens")
        out.append(
            {
                "doc_id": row[file.doc_column],
                "position": n - 1 if position is None else position,
                "n_tokens": n if n_tokens is None else n_tokens,
                "text": row.get(TEXT) or "",
                "next_text": row.get("nla_jax_next_text") or "",
                "explanation": explanations[i],
                "h": h_BD[i].copy(),  # a view would keep the batch in memory
            }
        )
    return out


def _vectors(file: DataFile, column: pa.Array, place: np.ndarray) -> np.ndarray:
    D = file.meta.d_model
    lengths = np.full(len(column), D) if pa.types.is_fixed_size_list(column.type) else pc.list_value_length(
        column).fill_null(D).to_numpy(zero_copy_only=False)
    if (wrong := np.flatnonzero(lengths != D)).size:
        raise UserError(
            f"{_row(file, place[wrong[0]])}: the vector has {lengths[wrong[0]]} numbers, but the sidecar "
            f"says d_model {D}"
        )
    if column.null_count:
        raise UserError(f"{_row(file, place[np.asarray(column.is_null()).argmax()])}: there is no vector")
    h_BD = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, D)
    finite_B = np.isfinite(h_BD).all(1)
    for bad, what in ((~finite_B, "is not finite"), (~h_BD.any(1), "is zero")):
        if bad.any():
            raise UserError(
                f"{_row(file, place[bad.argmax()])}: the activation {what}; remove the row (and correct "
                "row_count), or extract it again"
            )
    return h_BD


def _explanations(file: DataFile, batch: pa.RecordBatch, values: dict, place: np.ndarray) -> list[str]:
    """Read each row's explanation from the column of its stage. Raises UserError for a wrong prompt."""
    stage, templates = file.meta.stage, file.meta.templates
    if stage in ("av_sft", "rl"):
        _check_messages(file, batch.column("prompt"), place)
    if stage == "av_sft":
        found = [_TAGGED.search(r or "") for r in values["response"]]
        texts = [m[1].strip() if m else "" for m in found]
    elif stage == "ar_sft":
        before, after = sidecar_common.to_our_template(file.path, "ar", templates.ar).split("{explanation}")
        texts = [_between(p, before, after) for p in batch.column("prompt").to_pylist()]
    else:
        return [t or "" for t in values.get(WRITTEN, [""] * len(batch))]
    for i, text in zip(place, texts, strict=True):
        if not text:
            where = "response" if stage == "av_sft" else "prompt, by the sidecar's ar template"
            raise UserError(f"{_row(file, i)}: no explanation can be read in column {where}")
    return texts


def _between(prompt: str | None, before: str, after: str) -> str:
    prompt = prompt or ""
    whole = len(prompt) > len(before) + len(after) and prompt.startswith(before) and prompt.endswith(after)
    return prompt[len(before) : len(prompt) - len(after)] if whole else ""


def _check_messages(file: DataFile, column: pa.Array, place: np.ndarray) -> None:
    """Raise UserError unless every prompt is the sidecar's template as one user message, with INJECT."""
    content = av_content(file.path, file.meta.templates)
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    bad = lengths != 1
    if not bad.any():
        roles, contents = (pc.struct_field(column.flatten(), name) for name in ("role", "content"))
        fits = pc.and_(pc.equal(roles, "user"), pc.equal(contents, content)).fill_null(False)
        bad = ~fits.to_numpy(zero_copy_only=False)
    if bad.any():
        raise UserError(
            f"{_row(file, place[bad.argmax()])}: the prompt is not one user message with the sidecar's av "
            f"template and {INJECT} instead of the marker"
        )


def av_content(where: str | Path, templates: sidecar_common.Templates) -> str:
    """Return the AV prompt in the form of data files."""
    return sidecar_common.to_our_template(where, "av", templates.av).replace("{marker}", INJECT)


def _check_type(path: Path, name: str, found: pa.DataType, kind: str) -> None:
    def text(t):
        return pa.types.is_string(t) or pa.types.is_large_string(t)

    if kind == "messages":
        entry = found.value_type if pa.types.is_list(found) or pa.types.is_large_list(found) else None
        parts = list(entry) if entry is not None and pa.types.is_struct(entry) else []
        fits = {"role", "content"} <= {p.name for p in parts if text(p.type)}
        kind = "list of {role, content}"
    else:
        fits = text(found) if kind == "string" else pa.types.is_integer(found)
    if not fits:
        raise UserError(f"{path}: column {name!r} has type {found}, not {kind}")


def _check_vectors(path: Path, found: pa.DataType, d_model: int) -> None:
    lists = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
    if not lists or not pa.types.is_floating(found.value_type):
        raise UserError(f"{path}: column 'activation_vector' has type {found}, not a list of floats")
    if pa.types.is_fixed_size_list(found) and found.list_size != d_model:
        raise UserError(
            f"{path}: the vectors have {found.list_size} numbers, but the sidecar says d_model {d_model}"
        )


def _row(file: DataFile, i: int) -> str:
    return f"{file.path}: row {int(i)}"


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
