"""Export a split of a store of activations as an official data file with its sidecar: `nla data export`."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax import bundle
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.interchange import data_sidecar, parquet, sidecar_common
from nla_jax.prompts import CLOSE, OPEN
from nla_jax.util import locks, paths, writable
from nla_jax.util.batching import chunks
from nla_jax.util.progress import Progress

GROUP = 1024  # rows per row group
OFFICIAL_ID = re.compile(r"[^:]+(:[^:]+)*:[^:]+:\d+")  # {corpus}:{split}:{index}


def export_split(
    directory: str | Path,
    split: str,
    stage: str,
    out: str | Path,
    *,
    bundle_directory: str | Path = "",
    label: str = "export",
) -> dict:
    """Write the rows of a split, in stored order, as a data file of an official stage.

    Files of av_sft and ar_sft have only the rows with an explanation; those of base and rl have all rows. The
    file is written atomically, then its sidecar.

    Args:
      out: the .parquet file. stage: one of `data_sidecar.DATA_STAGES`.
      bundle_directory: the bundle with marker, prompts and target for the sidecar. An imported store has
        them itself.

    Returns:
      The numbers of rows "rows" (written) and "without explanation" (left out).

    Raises:
      UserError: there is no such store, split or stage; the bundle has another target or layer; `out`
        exists or is no .parquet; there is no row to write; an explanation contains a tag.
    """
    out = paths.path(out)
    if stage not in data_sidecar.DATA_STAGES:
        raise UserError(f"no stage {stage!r}: there are {', '.join(data_sidecar.DATA_STAGES)}")
    if out.suffix != ".parquet" or not (paths.is_remote(out) or out.absolute().parent.is_dir()):
        raise UserError(f"{out}: give a .parquet file in an existing directory")
    if there := [p for p in (out, data_sidecar.path_of(out)) if p.exists()]:
        raise UserError(f"{there[0]} exists; delete it, or choose another name")
    writable.check_output(out)
    stored = store.read_meta(directory)
    meta = _meta(stored, directory, split, stage, bundle_directory)
    rows = store.open_store(directory, split)
    texts = _has_value(rows, "text")
    # A base file has this column only if some row has an explanation.
    written = stage == "rl" or _has_value(rows, "explanation")
    if stage.endswith("sft") and not written:
        raise UserError(f"{directory}: no row of split {split!r} has an explanation, for stage {stage}")
    schema = schema_of(stage, meta.d_model, texts=texts, written=written)
    with locks.hold(out.with_name(out.name + locks.NAME), str(out)):
        with paths.whole(out) as part:
            count = _write_rows(part, rows, split, stored, meta, schema, label)
        # The sidecar is last, because readers ignore a data file without one.
        data_sidecar.write(out, dataclasses.replace(meta, row_count=count, keeps_texts=texts))
    return {"rows": count, "without explanation": len(rows) - count}


def _write_rows(part: Path, rows, split: str, stored: dict, meta, schema, label: str) -> int:
    lead, ids, count = len(stored["plan"].get("lead", ())), {}, 0
    words = [n for n in schema.names if n != "activation_vector"]
    with (
        pq.ParquetWriter(part, schema, use_dictionary=words) as file,
        Progress(label, len(rows), unit="rows") as bar,
    ):
        for some in chunks(rows, GROUP):
            bar.advance(len(some))
            if meta.stage.endswith("sft"):
                some = [_check_tags(row) for row in some if row["explanation"]]
            if some:
                official = [_official_id(row["doc_id"], split, ids) for row in some]
                file.write_table(_table(some, official, lead, meta, schema))
                count += len(some)
    return count


def _has_value(rows: store.Rows, name: str) -> bool:
    return any(row[name] for some in chunks(rows, GROUP) for row in some)


def _check_tags(row: dict) -> dict:
    """Return the row. Raises UserError if its explanation contains the closing tag."""
    if CLOSE.strip() in row["explanation"]:
        raise UserError(
            f"the explanation of {row['doc_id']!r} at token {row['position']} contains {CLOSE.strip()}: a "
            "reader would truncate it there; correct it and extract again"
        )
    return row


def _official_id(doc_id: str, split: str, ids: dict[str, str]) -> str:
    """Return `doc_id` if it has the official form, else a new id of that form. Ours has its own column."""
    if OFFICIAL_ID.fullmatch(doc_id):
        return doc_id
    corpus = doc_id.partition(":")[0] or "nla_jax"
    return ids.setdefault(doc_id, f"{corpus}:{split}:{len(ids)}")


def schema_of(stage: str, d_model: int, *, texts: bool, written: bool) -> pa.Schema:
    """Return the columns of a file of this stage.

    texts: add the texts that the target read. written: add explanations, in stages whose prompt and
    response do not contain them.
    """
    kinds = {"prompt": pa.string() if stage == "ar_sft" else parquet.MESSAGES, "response": pa.string()}
    names = {"base": (), "av_sft": ("prompt", "response"), "ar_sft": ("prompt",), "rl": ("prompt",)}[stage]
    fields = [(n, kinds[n]) for n in names]
    fields += [
        ("activation_vector", pa.list_(pa.float32(), d_model)),
        ("n_raw_tokens", pa.int64()),
        ("activation_layer", pa.int64()),
        ("doc_id", pa.string()),
    ]
    fields += [(parquet.TEXT, pa.string())] if texts else []
    fields += [(parquet.WRITTEN, pa.string())] if written and stage in ("base", "rl") else []
    return pa.schema([*fields, *parquet.OURS.items()])


def _table(
    rows: Sequence[dict], official_ids: Sequence[str], lead: int, meta: data_sidecar.DataMeta, to: pa.Schema
):
    """Make a table of rows. lead: number of special tokens that the tokenizer puts before every text."""
    h_BD = np.stack([row["h"] for row in rows])
    plain = {
        "activation_vector": pa.FixedSizeListArray.from_arrays(pa.array(h_BD.reshape(-1)), meta.d_model),
        "n_raw_tokens": [row["position"] + 1 + lead for row in rows],
        "activation_layer": [meta.layer_index] * len(rows),
        "doc_id": official_ids,
        parquet.TEXT: [row["text"] or None for row in rows],
        parquet.WRITTEN: [row["explanation"] or None for row in rows],
        parquet.DOC_ID: [row["doc_id"] for row in rows],
        "nla_jax_position": [row["position"] for row in rows],
        "nla_jax_n_tokens": [row["n_tokens"] for row in rows],
        "nla_jax_next_text": [row["next_text"] or None for row in rows],
    }
    said = [row["explanation"] for row in rows]
    if meta.stage == "ar_sft":
        template = sidecar_common.to_our_template("the template", "ar", meta.templates.ar)
        plain["prompt"] = [template.replace("{explanation}", t) for t in said]
    elif meta.stage != "base":
        message = {"role": "user", "content": parquet.av_content("the template", meta.templates)}
        plain["prompt"] = [[message]] * len(rows)
        plain["response"] = [OPEN + t + CLOSE for t in said]
    return pa.table({name: plain[name] for name in to.names}, schema=to)


def _meta(stored: dict, directory, split: str, stage: str, bundle_directory) -> data_sidecar.DataMeta:
    """Return the sidecar's contents, from the bundle or from the store's import. Its row_count is 0."""
    plan, known = stored["plan"], stored.get("interchange")
    if bundle_directory:
        facts = _of_bundle(bundle.read_sidecar(bundle_directory), plan)
        if known:  # only the imported files have these facts
            facts |= {k: known[k] for k in ("base_model", "extraction", "api_summaries", "datasets")}
        if (facts["fingerprint"], facts["layer_index"]) != (plan["target"], plan["layer"]):
            raise UserError(
                f"{directory} holds activations of another model or layer than {bundle_directory} was "
                "trained for; give a bundle that was trained on it"
            )
    elif known:
        facts = known
    else:
        raise UserError(
            f"{directory}: marker, prompts and the target's name are missing; give a bundle that was trained "
            "on it with --bundle"
        )
    tokens, suffix = facts["tokens"], (facts["tokens"] or {}).get("critic_suffix_ids")
    if tokens:
        suffix = None if suffix is None else tuple(suffix)
        tokens = sidecar_common.Tokens(**{**tokens, "critic_suffix_ids": suffix})
    meta = data_sidecar.DataMeta(
        dataset_id=f"{stage}_{facts['base_model'].rstrip('/').split('/')[-1]}_L{facts['layer_index']}_{split}",
        stage=stage,
        row_count=0,
        base_model=facts["base_model"],
        d_model=facts["d_model"],
        layer_index=facts["layer_index"],
        tokens=tokens,
        templates=sidecar_common.Templates(**facts["templates"]),
        extraction=facts["extraction"],
        injection_scale=facts["injection_scale"],
        fingerprint=facts["fingerprint"],
        api_summaries=facts["api_summaries"],
        parents=tuple(facts["datasets"]),
    )
    lacks = stage != "base" and (tokens is None or meta.templates.av is None)
    if stage == "ar_sft" and not lacks:
        lacks = tokens.critic_suffix_ids is None or meta.templates.ar is None
    if lacks:
        raise UserError(
            f"{directory}: the files that it was imported from have no marker or prompt for stage {stage}; "
            "give a bundle with --bundle"
        )
    return meta


def _of_bundle(meta: dict, plan: dict) -> dict:
    settings = plan.get("data", {})
    return {
        "base_model": meta["base_checkpoint"],
        "d_model": plan["d_model"],
        "layer_index": meta["extraction"]["layer_index"],
        "fingerprint": meta["base_fingerprint"],
        "injection_scale": meta["extraction"]["injection_scale"],
        "tokens": meta["tokens"],
        "templates": {
            r: sidecar_common.to_official_template(r, meta["prompt_templates"][r]) for r in ("av", "ar")
        },
        "extraction": {
            "base_model": meta["base_checkpoint"],
            "d_model": plan["d_model"],
            "layer_index": meta["extraction"]["layer_index"],
            "norm": "none",
            "corpus": settings.get("corpus", ""),
            "corpus_slice": {"start": 0, "length": 0},
            "positions_per_doc": settings.get("positions", 1),
        },
        "api_summaries": None,
        "datasets": [],
    }
