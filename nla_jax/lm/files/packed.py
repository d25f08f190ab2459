"""Packed bundles: the parameters of a bundle in one file, DIR/adapters.safetensors, in bfloat16.

`nla pack` writes them, and the package ships one (`nla_jax.bundle`). A tensor is named ROLE/NAME, as in the
role's table. The sidecar lists the files with size and SHA-256.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np

from nla_jax.errors import UserError
from nla_jax.lm.files import hf_write
from nla_jax.util import lazy_params, paths

FILE = "adapters.safetensors"


def is_packed(meta: dict) -> bool:
    """Return whether a sidecar is that of a packed bundle."""
    return FILE in (meta.get("files") or {})


def save(directory: Path, trees: dict) -> None:
    """Write {"av": tree, "ar": tree} of arrays or `lazy_params.Array`s to FILE in `directory`, atomically.
    Raises UserError for a tensor that is not finite."""
    import ml_dtypes

    flat = {
        f"{role}/{name}": np.ascontiguousarray(_host(a), ml_dtypes.bfloat16)
        for role, tree in trees.items()
        for name, a in _flat_names(tree).items()
    }
    hf_write.save_tensors(directory / FILE, flat)


def describe(path: Path) -> dict:
    """Return {"size": bytes, "sha256": ...} of a file."""
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256") if isinstance(path, Path) else hashlib.sha256(f.read())
    return {"size": paths.size(path), "sha256": digest.hexdigest()}


def check(directory: Path, meta: dict) -> None:
    """Raise UserError unless every listed file has the size and SHA-256 of the sidecar."""
    for name, known in meta["files"].items():
        path = directory / name
        size = paths.size(path) if path.is_file() else "no"
        wanted = known["size"] if isinstance(known, dict) else known
        if size != wanted:
            what = f"{size} bytes instead of {wanted}"
        elif describe(path) != known:
            what = "its SHA-256 is not the one in the sidecar"
        else:
            continue
        raise UserError(
            f"{path}: {what}; the bundle was damaged or half copied: copy it again, or run `nla pack` again"
        )


def load_trees(directory: Path, like: dict) -> dict:
    """Read the trees of FILE with the dtypes and shardings of `like`. Raises UserError if names or shapes
    differ."""
    arrays = open_trees(directory, like)

    def place(a, s):
        host = a.read(None).astype(s.dtype)
        return jax.make_array_from_callback(s.shape, s.sharding, lambda i: host[i])

    return jax.tree.map(place, arrays, like)


def open_trees(directory: Path, like: dict) -> dict:
    """Return the trees of FILE as float32 `lazy_params.Array`s. `like` is a tree of shapes or `Spec`s. Raises
    UserError if names or shapes differ."""
    import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
    import safetensors

    path = paths.local_copy(directory / FILE)
    wanted = {name: tuple(a.shape) for name, a in _flat_names(like).items()}
    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or damaged ({e}): copy it again") from e
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} is {found.get(name, 'absent')}, not {wanted.get(name, 'absent')}: the "
                "sidecar in this directory is that of another bundle; copy the bundle again"
            )

    def one(keys, a):
        def read(i):
            with safetensors.safe_open(str(path), framework="np") as file:
                name = _name(keys)
                part = file.get_tensor(name) if i is None else file.get_slice(name)[i : i + 1][0]
            return part.astype(np.float32)

        stacked = getattr(a, "axes", ("",))[0] == "block"
        return lazy_params.Array(tuple(a.shape), np.dtype(np.float32), stacked, read)

    return jax.tree_util.tree_map_with_path(one, like)


def _flat_names(tree) -> dict:
    return {_name(keys): a for keys, a in jax.tree_util.tree_leaves_with_path(tree)}


def _name(keys) -> str:
    return "/".join(k.key for k in keys)


def _host(a) -> np.ndarray:
    return a.whole() if isinstance(a, lazy_params.Array) else np.asarray(a)
