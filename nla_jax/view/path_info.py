"""Describe a path for `nla info`: a bundle, run, store, model, released pair or data file.

No weights are read.
"""

import math
from pathlib import Path

from nla_jax import bundle
from nla_jax.data import explanations, store
from nla_jax.errors import UserError, did_you_mean
from nla_jax.evaluate import figure_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.interchange import data_sidecar, model_sidecar, run_summary
from nla_jax.lm import params, weights
from nla_jax.lm.files import packed
from nla_jax.util import path_kinds, paths
from nla_jax.view import run_files

HEADLINE = ("fve", "fve_greedy", "fve_frozen_target", "description_gain", "fve_shuffled",
            "fve_mean_direction", "retokenization_mismatch")


def describe(where: str | Path) -> dict:
    """Return the facts of a path as JSON values: "kind", "path", "bytes", and what its kind has.

    Raises UserError if the path does not exist, is damaged, or is of no known kind.
    """
    path = paths.path(where)
    if not path.exists():
        beside = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"{where} does not exist{did_you_mean(str(path), beside)}")
    for matches, facts in KINDS:
        if matches(path):
            size = sum(map(paths.size, paths.files(path).values())) if path.is_dir() else paths.size(path)
            found = facts(path)
            return {"kind": found.pop("kind"), "path": str(path), "bytes": size, **found}
    raise UserError(f"{where}: no bundle, run, store, model, released pair or data file")


def _bundle(path: Path) -> dict:
    meta = bundle.read_sidecar(path)
    run = run_summary.read_summary(path, meta) or meta.get("run") or {}
    figures = run.get("rl" if meta["stage"] == "rl" else "warm_start", {})
    return {
        "kind": "packed bundle" if packed.is_packed(meta) else "bundle",
        "stage": meta["stage"],
        "target": meta["base_checkpoint"],
        "target fingerprint": meta["base_fingerprint"],
        "layer": meta["extraction"]["layer_index"],
        "blocks": meta["lm"]["n_blocks"],
        "width": meta["d_model"],
        "dtype": meta["dtype"],
        "injection": bundle.injection(meta),
        "alpha": meta["extraction"]["injection_scale"],
        "marker": meta["tokens"]["injection_char"],
        "rank": {"av": meta["roles"]["av_rank"], "ar": meta["roles"]["ar_rank"]},
        "ar kind": bundle.ar_kind(meta),
        "max new tokens": meta["max_new_tokens"],
        "mean direction": meta["mean_direction"] is not None,
        "figures": {split: _headline([Figure(**f) for f in found]) for split, found in figures.items()},
        "trained with": run.get("steps", {}),
        "device": run.get("device", ""),
        "versions": run.get("versions", {}),
        "made by": meta.get("made_by", ""),
        "created": f"{meta.get('created_at', '')} by {meta['created_by']}",
    }


def _headline(figures: list[Figure]) -> dict:
    named = {f.name: f for f in figures}
    return {n: {k: getattr(named[n], k) for k in ("value", "low", "high")} for n in HEADLINE if n in named}


def _run(path: Path) -> dict:
    run = run_files.read(path)
    splits = run.figures.get(run.last, {})
    return {
        "kind": "run",
        "finished": bool(run.summary),
        "stages": list(run.done),
        "target": run.config["target"],
        "target fingerprint": run.store.get("plan", {}).get("target", ""),
        "layer": run.config["layer"],
        "corpus": run.config["data"]["corpus"],
        "seed": run.config["seed"],
        "rows": {name: s["rows"] for name, s in run.store.get("splits", {}).items()},
        "bundles": [n for n in ("bundle_warm", "bundle") if (path / n / path_kinds.SIDECAR).is_file()],
        f"figures of {run.last}" if run.last else "figures": {s: _headline(f) for s, f in splits.items()},
        "seconds": round(sum(run.seconds.values()), 1),
        "device": run.summary.get("device", ""),
        "versions": run.summary.get("versions", {}),
    }


def _store(path: Path) -> dict:
    meta = store.read_meta(path)
    plan = meta["plan"]
    return {
        "kind": "store of activations",
        "target fingerprint": plan["target"],
        "layer": plan["layer"],
        "width": plan["d_model"],
        "dtype": plan.get("storage", "float32"),
        "corpus": plan.get("data", {}).get("corpus", ""),
        "seed": plan.get("seed"),
        "splits": {name: {k: s[k] for k in ("rows", "documents", "shards")}
                   | {"norm p75": round(s.get("norm", {}).get("p75", 0.0), 3)}
                   for name, s in meta["splits"].items()},
        "left out": meta.get("drops", {}),
        "imported from": meta.get("interchange", {}).get("base_model", ""),
    }


def _model(path: Path) -> dict:
    cfg = weights.read_config(path)
    return {
        "kind": "model, a GGUF file" if path.is_file() else "model in Hugging Face layout",
        "fingerprint": weights.fingerprint(path),
        "parameters": sum(math.prod(spec.shape) for spec in params.table(cfg).values()),
        "blocks": cfg.n_blocks,
        "width": cfg.d_model,
        "heads": {"query": cfg.n_heads, "key and value": cfg.n_kv_heads,
                  **({"key and value in global blocks": cfg.global_heads[0]} if cfg.global_heads else {})},
        "vocabulary": cfg.vocab_size,
        "context": cfg.max_position,
        "layer by default": cfg.default_layer(),
    }


def _released(path: Path) -> dict:
    found = model_sidecar.load(path)
    return {"kind": f"{found.role.upper()} of a released pair", **_sidecar(found),
            "fingerprint": weights.fingerprint(path)}


def _pair(path: Path) -> dict:
    av, ar = (model_sidecar.load(path / role) for role in ("av", "ar"))
    return {"kind": "released pair", **_sidecar(av),
            "fingerprint": {role: weights.fingerprint(path / role) for role in ("av", "ar")},
            "stage": {"av": av.stage, "ar": ar.stage}}


def _sidecar(found: model_sidecar.ModelSidecar) -> dict:
    return {"target": found.base_checkpoint, "layer": found.layer, "width": found.d_model,
            "stage": found.stage, "alpha": found.injection_scale, "marker": found.tokens.injection_char}


def _data_file(path: Path) -> dict:
    meta = data_sidecar.read(path)
    return {"kind": "official data file", "stage": meta.stage, "rows": meta.row_count,
            "target": meta.base_model, "target fingerprint": meta.fingerprint,
            "layer": meta.layer_index, "width": meta.d_model, "data set": meta.dataset_id,
            "has texts": meta.keeps_texts}


def _explanations(path: Path) -> dict:
    splits: dict[str, int] = {}
    for record in explanations.read(path):
        splits[record.split] = splits.get(record.split, 0) + 1
    return {"kind": "file of written explanations", "records": splits}


def _is_pair(path: Path) -> bool:
    return all((path / role / path_kinds.SIDECAR).is_file() for role in ("av", "ar"))


KINDS = (
    (path_kinds.is_run, _run),
    (lambda p: (p / path_kinds.STORE_META).is_file(), _store),
    (_is_pair, _pair),
    (lambda p: (p / path_kinds.SIDECAR).is_file() and (p / "config.json").is_file(), _released),
    (lambda p: (p / path_kinds.SIDECAR).is_file(), _bundle),
    (lambda p: p.suffix == ".gguf" or (p / "config.json").is_file(), _model),
    (lambda p: p.suffix == ".parquet", _data_file),
    (lambda p: p.suffix == ".jsonl", _explanations),
)


def as_rows(facts: dict, indent: str = "") -> list[tuple[str, str]]:
    """Return (name, text) of each fact; facts within facts are indented, and empty ones are left out."""
    out = []
    for name, value in facts.items():
        if isinstance(value, dict) and {"value", "low", "high"} == value.keys():
            out.append((indent + name, figure_table.cell(Figure(name, n=0, asks="", **value))))
        elif isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            out += [(indent + name, ""), *as_rows(value, indent + "  ")]
        elif isinstance(value, dict):
            out += [(indent + name, ", ".join(f"{k} {v}" for k, v in value.items()))] if value else []
        elif name == "bytes":
            out.append((indent + "size", f"{value / 1e6:,.1f} MB"))
        elif value not in ("", None, []):
            out.append((indent + name, _text(value)))
    return out


def _text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
