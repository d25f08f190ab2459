"""Files of activations: what is read from each kind, and how others are refused."""

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from nla_jax.data import activation_files
from nla_jax.errors import UserError

H = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
WORDS = [f"w{i}" for i in range(7)]


def npy(path):
    np.save(path, H.astype(np.float64))
    return {}


def npz(path):
    np.savez(path, h=H, token=np.array(WORDS), layer=np.int64(3), other=np.zeros((7, 2)))
    return {"token": WORDS}


def safetensors_bf16(path):
    safetensors.torch.save_file({"h": torch.tensor(H).to(torch.bfloat16), "position": torch.arange(7)}, path)
    return {"position": list(range(7))}


def parquet(path):
    rows = {"activation_vector": H.tolist(), "token": WORDS, "n": list(range(7))}
    pq.write_table(pa.table(rows), path, row_group_size=3)
    return {"token": WORDS, "n": list(range(7))}


@pytest.mark.parametrize("write, ending", [
    (npy, "npy"), (npz, "npz"), (safetensors_bf16, "safetensors"), (parquet, "parquet")])
def test_parts_of_a_file(tmp_path, write, ending):
    path = tmp_path / f"h.{ending}"
    columns = write(path)
    file = activation_files.open_file(path)
    assert (file.n, file.d_model, sorted(file.columns)) == (7, 4, sorted(columns))
    wanted = H.astype(ml_dtypes.bfloat16).astype(np.float32) if ending == "safetensors" else H
    for start, end in ((0, 7), (2, 5), (5, 7)):
        h_ND, found = file.read(start, end)
        assert h_ND.dtype == np.float32 and found == {k: v[start:end] for k, v in columns.items()}
        np.testing.assert_allclose(h_ND, wanted[start:end], rtol=1e-6)


def test_the_name_of_the_array(tmp_path):
    path = tmp_path / "h.npz"
    np.savez(path, resid=H, other=H)
    assert activation_files.open_file(path, "other").n == 7
    for key, message in (("", "name the array .* with --key; there are resid .7, 4., other .7, 4."),
                         ("resit", "no array 'resit'; it has resid, other; did you mean 'resid'?")):
        with pytest.raises(UserError, match=message):
            activation_files.open_file(path, key)


@pytest.mark.parametrize("name, make, message", [
    ("h.pt", lambda p: torch.save(torch.tensor(H), p), "save a torch tensor with safetensors"),
    ("h.npy", lambda p: np.save(p, np.array([{}, {}]), allow_pickle=True), "damaged, or not a .npy file"),
    ("h.npy", lambda p: p.write_bytes(b"\x93NUMPY"), "damaged, or not a .npy file"),
    ("h.safetensors", lambda p: p.write_bytes(b"12345678"), "damaged, or not a .safetensors file"),
    ("h.parquet", lambda p: p.write_bytes(b"PAR1"), "damaged, or not a .parquet file"),
    ("h.npz", lambda p: p.write_bytes(b"PK"), "damaged, or not a .npz file"),
    ("h.npy", lambda p: np.save(p, H[None]), "shape .1, 7, 4.; expected .N, D.: take one layer"),
    ("h.parquet", lambda p: pq.write_table(pa.table({"h": WORDS}), p), "'h' has type string, not a list"),
    ("h.npy", lambda p: None, "does not exist"),
])
def test_what_is_refused(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError, match=message) as e:
        activation_files.open_file(path)
    assert str(path) in str(e.value)


def test_rows_of_different_lengths(tmp_path):
    path = tmp_path / "h.parquet"
    pq.write_table(pa.table({"h": [[1.0, 2.0], [1.0], [1.0, 2.0]]}), path)
    file = activation_files.open_file(path)
    with pytest.raises(UserError, match="row 1: no vector of 2 numbers"):
        file.read(0, 3)
