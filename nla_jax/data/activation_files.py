"""Files of activations: .npy, .npz, .safetensors and .parquet, read a part at a time.

A file has one array [N, D] and may have columns of N values, which are carried over. Pickle is not read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import UserError, did_you_mean, one_line
from nla_jax.util import paths

ENDINGS = (".npy", ".npz", ".safetensors", ".parquet")
NAMES = ("h", "activation_vector", "activations", "activation", "vectors")  # tried in this order


@dataclasses.dataclass(frozen=True)
class Vectors:
    """An open file of activations.

    n: rows. columns: names of the columns that are carried over.
    read: (start, end) -> (h [end - start, D] float32, {column: list of plain values}).
    """

    path: Path
    n: int
    d_model: int
    columns: tuple[str, ...]
    read: Callable[[int, int], tuple[np.ndarray, dict[str, list]]]


def open_file(path: str | Path, key: str = "") -> Vectors:
    """Open a file of activations.

    key: the array's or column's name; by default the first of NAMES, or the only array [N, D].

    Raises UserError if the file is missing, damaged or of another kind, and if it is unclear which array is
    meant.
    """
    path = paths.local_copy(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    readers = dict(zip(ENDINGS, (_npy, _npz, _safetensors, _parquet), strict=True))
    if path.suffix not in readers:
        raise UserError(f"{path}: must be one of {', '.join(ENDINGS)}; save a torch tensor with "
                        "safetensors.torch.save_file, because a pickle may run code")
    try:
        return readers[path.suffix](path, key)
    except UserError:
        raise
    except Exception as e:  # damaged bytes make these libraries raise many classes
        raise UserError(f"{path}: damaged, or not a {path.suffix} file ({one_line(e)})") from e


def _npy(path: Path, key: str) -> Vectors:
    if key:
        raise UserError(f"{path}: a .npy file has one array without a name; leave --key out")
    h = np.load(path, mmap_mode="r", allow_pickle=False)
    return _of_arrays(path, {"h": h}, "h", lambda a, i, j: a[i:j])


def _npz(path: Path, key: str) -> Vectors:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return _of_arrays(path, arrays, _chosen(path, {n: a.shape for n, a in arrays.items()}, key),
                      lambda a, i, j: a[i:j])


def _safetensors(path: Path, key: str) -> Vectors:
    import ml_dtypes  # noqa: F401  (its import is what gives numpy the name "bfloat16")
    import safetensors

    file = safetensors.safe_open(str(path), framework="np")
    slices = {name: file.get_slice(name) for name in file.keys()}
    shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    name = _chosen(path, shapes, key)
    n = shapes[name][0] if len(shapes[name]) == 2 else 0
    arrays = {k: slices[k] if k == name else file.get_tensor(k) for k, s in shapes.items()
              if k == name or s == (n,)}
    return _of_arrays(path, arrays, name, lambda a, i, j: a[i:j], shapes[name])


def _chosen(path: Path, shapes: Mapping[str, tuple], key: str) -> str:
    """Return the name of the array [N, D] among arrays of these shapes. Raises UserError."""
    if key:
        if key not in shapes:
            there = ", ".join(shapes) or "nothing"
            raise UserError(f"{path}: no array {key!r}; it has {there[:200]}{did_you_mean(key, shapes)}")
        return key
    flat = [name for name, shape in shapes.items() if len(shape) == 2]
    named = [name for name in NAMES if name in shapes]
    if named or len(flat) == 1:
        return (named or flat)[0]
    listed = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
    raise UserError(f"{path}: name the array [N, D] of activations with --key; there are {listed[:200]}")


def _of_arrays(path: Path, arrays: Mapping[str, Any], name: str, cut, shape=None) -> Vectors:
    shape = arrays[name].shape if shape is None else shape
    if len(shape) != 2:
        raise UserError(f"{path}: {name} has shape {list(shape)}; expected [N, D]: take one layer, and one "
                        "row for each token without padding")
    n, d_model = shape
    rest = {k: a for k, a in arrays.items() if k != name and a.shape == (n,) and a.dtype.kind in "biufUS"}

    def read(start: int, end: int):
        h_ND = np.asarray(cut(arrays[name], start, end), np.float32)
        return h_ND, {k: [_plain(x) for x in a[start:end].tolist()] for k, a in rest.items()}

    return Vectors(path, n, d_model, tuple(rest), read)


def _parquet(path: Path, key: str) -> Vectors:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    is_list = lambda t: (pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)) \
        and pa.types.is_floating(t.value_type)
    name = _chosen(path, {f.name: (0, 0) if is_list(f.type) else () for f in schema}, key)
    if not is_list(schema.field(name).type):
        raise UserError(f"{path}: column {name!r} has type {schema.field(name).type}, not a list of floats")
    n = file.metadata.num_rows
    rest = tuple(f.name for f in schema if f.name != name and not is_list(f.type))
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    held: dict[int, Any] = {}  # the row group that was read last

    def group(g: int):
        if g not in held:
            held.clear()
            held[g] = file.read_row_group(g, columns=[name, *rest])
        return held[g]

    def read(start: int, end: int):
        tables = []
        for g in range(len(sizes)):
            a, b = max(start, starts[g]), min(end, starts[g + 1])
            if a < b:
                tables.append(group(g).slice(a - starts[g], b - a))
        table = pa.concat_tables(tables)
        h = [np.asarray(v, np.float32) for v in table.column(name).to_pylist()]
        if bad := [i for i, v in enumerate(h) if v.ndim != 1 or len(v) != len(h[0])]:
            raise UserError(f"{path}: row {start + bad[0]}: no vector of {len(h[0])} numbers")
        return np.stack(h), {k: table.column(k).to_pylist() for k in rest}

    d_model = read(0, 1)[0].shape[1] if n else 0
    return Vectors(path, n, d_model, rest, read)


def _plain(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
