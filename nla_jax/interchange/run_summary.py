"""The figures of the run that made a bundle: summary.json and evaluation.json beside the bundle."""

import json
from pathlib import Path

from nla_jax.errors import UserError
from nla_jax.util import paths


def read_summary(directory: Path, meta: dict) -> dict | None:
    """Read summary.json of a bundle's run, and as "evaluation" the figures of its evaluation.json. Return
    None if there is no summary, or if it is of another run.

    Raises UserError if a file is not JSON.
    """
    path = paths.absolute(directory).parent / "summary.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e}); repair it, or move it to pack without it") from e
    said = meta["base_checkpoint"], meta["training"].get("seed")
    if (found.get("target"), found.get("seed")) != said:
        return None
    evaluated = _evaluation_of(path.parent / "evaluation.json") if directory.name == "bundle" else {}
    return found | ({"evaluation": evaluated} if evaluated else {})


def _evaluation_of(path: Path) -> dict:
    """Return split -> figures of a run's `nla evaluate --json`; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        return {split: [dict(f) for f in table["figures"]] for split, table in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not what `nla evaluate --json` writes ({type(e).__name__}); move it to "
                        "pack without it") from e
