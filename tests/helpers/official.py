"""Data files as the official code writes them, made here from their description alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

D = 8
AV = "Look at this.\n<concept>{injection_char}</concept>\nWhat is it?"
AR = "Text of it: <text>{explanation}</text> <summary>"
TOKENS = {
    "injection_char": "\u320e", "injection_token_id": 149705, "injection_left_neighbor_id": 29,
    "injection_right_neighbor_id": 522, "critic_suffix_ids": None,
}


def row(doc: int, position: int, corpus: str = "web", d: int = D) -> dict:
    rng = np.random.default_rng([doc, position])
    return {
        "doc_id": f"{corpus}:train:{doc}",
        "n_raw_tokens": position + 1,
        "detokenized_text_truncated": f"document {doc} up to “{position}”",
        "api_explanation": f'About {doc}.\n\nEnds at "{position}".',
        "activation_vector": (100 * rng.normal(size=d)).astype(np.float32),
    }


def sidecar(stage: str, row_count: int, names=("actor", "critic"), d: int = D) -> dict:
    out = {
        "dataset_id": f"{stage}_tiny_L3",
        "stage": stage,
        "row_count": row_count,
        "extraction": {
            "base_model": "Org/Tiny-Instruct", "d_model": d, "layer_index": 3, "norm": "none",
            "corpus": "web", "corpus_slice": {"start": 0, "length": 100}, "positions_per_doc": 5,
        },
        "kind": "nla_dataset",
        "schema_version": 1,
        "keep_debug_metadata": True,
        "parent_datasets": ["base_tiny_L3"],
        "created_at": "2026-01-01T00:00:00+00:00",
        "created_by": "somebody",
        "git_commit": "",
    }
    if stage != "base":
        out["tokens"] = {**TOKENS, "critic_suffix_ids": [1318, 29] if stage == "ar_sft" else None}
        out["prompt_templates"] = dict(zip(names, (AV, AR), strict=True))
    return out


def table(stage: str, rows: list[dict], *, fixed: bool = True, d: int = D) -> pa.Table:
    vectors = [r["activation_vector"] for r in rows]
    columns = {
        "activation_vector": pa.array(
            vectors, pa.list_(pa.float32(), d) if fixed else pa.list_(pa.float32())
        ),
        "n_raw_tokens": pa.array([r["n_raw_tokens"] for r in rows], pa.int64()),
        "activation_layer": pa.array([3] * len(rows), pa.int64()),
        "doc_id": pa.array([r["doc_id"] for r in rows], pa.string()),
        "detokenized_text_truncated": pa.array([r["detokenized_text_truncated"] for r in rows], pa.string()),
    }
    if stage in ("av_sft", "rl"):
        content = AV.format(injection_char="<INJECT>")
        kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        columns["prompt"] = pa.array([[{"role": "user", "content": content}]] * len(rows), kind)
    written = [r["api_explanation"] for r in rows]
    if stage == "av_sft":
        columns["response"] = pa.array([f"<explanation>\n{t}\n</explanation>" for t in written])
    if stage == "ar_sft":
        columns["prompt"] = pa.array([AR.format(explanation=t) for t in written])
    if stage == "base":
        columns["api_explanation"] = pa.array(written)
    return pa.table(columns)


def write(path: Path, stage: str, rows: list[dict], *, meta: dict | None = None, names=("actor", "critic"),
          fixed: bool = True, group: int = 7) -> Path:
    """A data file with its sidecar. `meta`: keys of the sidecar that are other than they should be."""
    pq.write_table(table(stage, rows, fixed=fixed), path, row_group_size=group)
    whole = {**sidecar(stage, len(rows), names), **(meta or {})}
    write_sidecar(path, whole)
    return path


def write_sidecar(path: Path, value: dict) -> None:
    path.with_name(path.name + ".nla_meta.yaml").write_text(
        yaml.safe_dump(value, sort_keys=False, allow_unicode=True), "utf-8"
    )


def read_sidecar(path: Path) -> dict:
    """As strictly as the official reader: its blocks hold these keys, and all of them."""
    meta = yaml.safe_load(path.with_name(path.name + ".nla_meta.yaml").read_text("utf-8"))
    assert (meta["kind"], meta["schema_version"]) == ("nla_dataset", 1)
    like = sidecar("av_sft", 1)
    assert meta["extraction"].keys() == like["extraction"].keys()
    if meta["stage"] != "base":
        assert meta["tokens"].keys() == TOKENS.keys()
        assert meta["prompt_templates"].keys() == {"actor", "critic"}
    assert {"dataset_id", "stage", "row_count", "extraction"} <= meta.keys()
    return meta
