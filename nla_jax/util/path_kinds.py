"""Tell what a directory is from the names of its files: a run, a bundle, a store, or a model."""

import json
import sys
from pathlib import Path

from nla_jax.util import paths

SIDECAR = "nla_meta.yaml"  # of a bundle, and of the released AV and AR
STORE_META = "nla_store.json"


def is_run(where: str | Path) -> bool:
    """Return whether a directory is a run. A model's directory also has a config.json, with other keys."""
    path = paths.path(where) / "config.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and {"rl", "data", "layer"} <= found.keys()


def bundle_in(where: str | Path) -> str | Path:
    """Return the bundle of a finished run, with a notice on stderr; of any other directory, itself."""
    return _inside(where, "bundle", SIDECAR)


def store_in(where: str | Path) -> str | Path:
    """Return the store of a run, with a notice on stderr; of any other directory, itself."""
    return _inside(where, "data", STORE_META)


def _inside(where: str | Path, name: str, mark: str) -> str | Path:
    path = paths.path(where)
    if (path / mark).is_file() or not (path / name / mark).is_file() or not is_run(path):
        return where
    what = {"bundle": "bundle", "data": "store"}[name]
    print(f"{where} is a run: using its {what}, {path / name}", file=sys.stderr)
    return path / name


def hint(where: str | Path) -> str:
    """Return what a directory is that was given for something else, and what to give, for a message."""
    path = paths.path(where)
    beside = path.parent
    if is_run(path):
        found = {"bundle": path / "bundle" / SIDECAR, "warm start": path / "bundle_warm" / SIDECAR,
                 "store": path / "data" / STORE_META}
        there = "; ".join(f"its {what} is {p.parent}" for what, p in found.items() if p.is_file())
        return f"this is a run; {there or 'it has no bundle and no store yet'}"
    if (path / STORE_META).is_file():
        return "this is a store of activations"
    if (beside / SIDECAR).is_file():
        return f"the bundle is {beside}"
    if (path / SIDECAR).is_file() and (path / "config.json").is_file():
        return "this is one model of a released pair; `nla import` makes a bundle from both"
    if (path / SIDECAR).is_file():
        return "this is a bundle" + (f"; its run is {beside}" if is_run(beside) else "")
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        return "this is a model"
    return "" if path.exists() else "it does not exist"
