"""Keep what an evaluation fits (readers, a lens, an autoencoder) beside a description of all its inputs.

The description is about.json. An evaluation with the same inputs reads the result; another one fits its own.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from nla_jax.errors import UserError
from nla_jax.util import checkpoint, distributed, paths


def read_or_fit(directory: Path | None, name: str, about: dict, like, fit: Callable[[Path], object]):
    """Return the tree that `fit(place)` returns, fitted only if `directory` does not have it.

    Args:
      directory: the results are kept under `name` there; None keeps nothing.
      about: all inputs of the fit (JSON), such as a `digest` of the rows.
      like: a tree with the shapes and dtypes of the result.
      fit: gets a directory, in which its checkpoints (`training.loop`) belong to the same inputs.

    Raises UserError when `directory` cannot be written.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as scratch:
            return fit(Path(scratch))
    place, about = paths.path(directory) / name, json.loads(json.dumps(about))
    try:
        if _read(place / "about.json") != about:
            paths.remove(place)
        distributed.write_json(place / "about.json", about)
    except OSError as e:
        raise UserError(
            f"{place}: cannot save what is fitted there ({e.strerror}); copy the bundle where you can "
            "write, or choose --probes without independent, surface, lens and sae"
        ) from e
    if (place / "params").exists():
        return checkpoint.load_tree(place / "params", like)
    found = fit(place)
    checkpoint.save_tree(place / "params", found)
    if distributed.is_first():
        paths.remove(place / "checkpoints")
    return found


def digest(*parts) -> str:
    """Return a hash of trees of arrays and of lists of texts."""
    hashed = hashlib.blake2b(digest_size=12)
    for part in parts:
        texts = isinstance(part, Sequence) and all(isinstance(t, str) for t in part)
        for leaf in part if texts else jax.tree.leaves(part):
            hashed.update(leaf.encode() if texts else np.ascontiguousarray(leaf).tobytes())
            hashed.update(b"\x1f")
    return hashed.hexdigest()


def _read(path: Path):
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
