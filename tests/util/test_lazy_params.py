"""Models go from file to file a tensor at a time: what `nla import` and `nla export` hold, and a kill."""

import gc
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import import_pair
from nla_jax.lm import params as params_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.util import checkpoint, lazy_params
from tests.helpers import released, tiny

MB = 2**20
LAYER = 2
BIG = LMConfig(
    vocab_size=2048, d_model=512, n_blocks=16, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=2048, tied=True,
    max_position=64,
)
TENSOR = 2 * 2048 * 512  # bytes of its largest in bfloat16
SLACK = MB // 2  # for all that is no tensor


def write_pair(root: Path, cfg: LMConfig, dtype: str) -> Path:
    """ROOT/av and ROOT/ar, which explain layer LAYER of ROOT/av."""
    some = np.random.default_rng(0).normal(size=9973).astype(ml_dtypes.bfloat16)
    tok = tiny.tokenizer()
    for role, short in (("av", cfg), ("ar", cfg.first_blocks(LAYER + 1))):
        tree = {name: np.resize(some, spec.shape) for name, spec in params_lib.table(short).items()}
        weights.save_hf(root / role, short, params_lib.nest(tree), dtype)
        tok.save_pretrained(root / role)
        meta = released.sidecar(tok, role, 2, LAYER, 6.0, str(root / "av")) | {"d_model": cfg.d_model}
        meta["extraction"]["mse_scale"] = "sqrt_d_model"
        released.write_sidecar(root / role, meta)
    head = np.resize(some, (cfg.d_model, cfg.d_model)).astype(dtype)
    save_file({"weight": head}, root / "ar" / "value_head.safetensors")
    return root


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A pair of 121 and 25 MB of bfloat16."""
    return write_pair(tmp_path_factory.mktemp("big"), BIG, "bfloat16")


@pytest.fixture(scope="module")
def imported(big):
    return import_pair.import_pair(big / "av", big / "ar", big / "bundle")


def opened(directory) -> dict[str, lazy_params.Array]:
    meta = bundle.read_sidecar(directory)
    trees = bundle.open_trees(directory, meta, LMConfig.of_plain(meta["lm"]))
    return {f"{role}/{name}": a for role, tree in trees.items() for name, a in tiny.leaves(tree).items()}


# Memory


def of_this_process() -> int:
    """Bytes that it holds beside mapped files, where the system says it (0 where not)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def peaks(work, monkeypatch) -> tuple[int, int]:
    """The most bytes that Python and numpy held at once for `work()`, and how far the whole process grew
    until any tensor was read."""
    seen, made = [], lazy_params.Array.__init__

    def watched(self, shape, dtype, stacked, read):
        made(self, shape, dtype, stacked, lambda i: (seen.append(of_this_process()), read(i))[1])

    with monkeypatch.context() as patch:
        patch.setattr(lazy_params.Array, "__init__", watched)
        gc.collect()
        before = of_this_process()
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1], max(seen) - before
        finally:
            tracemalloc.stop()


def test_an_import_holds_two_tensors(big, imported, monkeypatch, tmp_path):
    size = sum(f.stat().st_size for f in big.glob("a?/*.safetensors"))
    assert size > 140 * MB
    traced, grown = peaks(
        lambda: import_pair.import_pair(big / "av", big / "ar", tmp_path / "b"), monkeypatch
    )
    assert traced < 2 * TENSOR + SLACK
    assert grown < size / 3  # nor does the library that writes keep what it was given


def test_an_export_holds_one_file(big, imported, monkeypatch, tmp_path):
    """In float32; `shard_bytes` is reached to within a tensor."""
    shard = 10 * MB
    export = lambda to: import_pair.export_pair(imported, to, shard_bytes=shard)
    export(tmp_path / "first")
    traced, grown = peaks(lambda: export(tmp_path / "second"), monkeypatch)
    assert traced < shard + 3 * 2 * TENSOR + SLACK  # of float32: one file, and a tensor on its way into it
    assert grown < 100 * MB
    files = sorted((tmp_path / "second" / "av").glob("*.safetensors"))
    assert len(files) > 20 and all(f.stat().st_size < shard + MB for f in files)


# Values


def test_an_import_keeps_dtypes_and_values(big, imported, tmp_path):
    found = opened(imported)
    for role, without in (("av", ()), ("ar", ("final_norm",))):
        want = weights.load(big / role, without=without)[1]
        for name, array in tiny.leaves(want).items():
            got = found.pop(f"{role}/params/{name}")
            assert got.dtype == ml_dtypes.bfloat16 and got.shape == array.shape, name
            np.testing.assert_array_equal(got.whole().astype(np.float32), array, err_msg=name)
    assert list(found) == ["ar/head"]
    av, ar = import_pair.export_pair(imported, tmp_path, dtype="bfloat16")
    for got, was in ((av, big / "av"), (ar, big / "ar")):
        want = load_file(was / "model.safetensors")
        again = load_file(got / "model.safetensors")
        assert again.keys() == want.keys()
        for name in want.keys() - {"model.norm.weight"}:
            np.testing.assert_array_equal(again[name], want[name], err_msg=name)
    head = load_file(big / "ar" / "value_head.safetensors")["weight"]
    np.testing.assert_array_equal(load_file(ar / "value_head.safetensors")["weight"], head)


def test_training_begins_from_what_the_files_hold(imported):
    """What is read for a run is the same numbers in float32, placed on a mesh."""
    meta, on = bundle.read_sidecar(imported), tiny.mesh(1, 2, 2)
    placed = bundle.read_trees(imported, meta, BIG, on)
    for name, a in opened(imported).items():
        got = tiny.leaves(placed)[name]
        assert got.dtype == np.float32 and got.sharding.mesh == on
        np.testing.assert_array_equal(got, a.whole().astype(np.float32), err_msg=name)


def test_files_of_several_dtypes(tmp_path):
    """A parameter whose blocks differ takes the wider dtype, and float64 is float32."""
    cfg, rng = tiny.lm(tied=False), np.random.default_rng(0)
    tree = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in params_lib.table(cfg).items()}
    weights.save_hf(tmp_path, cfg, params_lib.nest(tree))
    tensors = load_file(tmp_path / "model.safetensors")
    kinds = {"layers.0.mlp.up": ml_dtypes.bfloat16, "q_proj": np.float16, "lm_head": np.float64}
    for name in tensors:
        for part, kind in kinds.items():
            tensors[name] = tensors[name].astype(kind) if part in name else tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    found = tiny.leaves(weights.lazy_tree(weights.open_files(tmp_path)))
    of = {name: a.dtype for name, a in found.items()}
    assert of["blocks/w_up"] == of["lm_head"] == of["embed"] == np.float32
    assert of["blocks/wq"] == np.float16
    for name, array in tiny.leaves(weights.load(tmp_path)[1]).items():
        np.testing.assert_array_equal(found[name].whole().astype(np.float32), array, err_msg=name)


def test_a_tree_is_opened_and_not_read(tmp_path):
    """A read that fails later says where; arrays written in the ordinary way are opened alike."""
    spec = params_lib.Spec((3, 40, 50), ("block", "model", "mlp"))
    array = np.arange(6000, dtype=np.float32).reshape(spec.shape)
    checkpoint.save_tree(tmp_path / "params", {"w": array})
    found = checkpoint.open_tree(tmp_path / "params", {"w": spec})["w"]
    np.testing.assert_array_equal(found.read(1), array[1])
    np.testing.assert_array_equal(found.whole(), array)
    with pytest.raises(UserError, match=r"params: cannot be restored.*\(w is \(3, 40, 50\), not \(3, 40\)"):
        checkpoint.open_tree(tmp_path / "params", {"w": params_lib.Spec((3, 40), ("block", "model"))})
    for file in (tmp_path / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="params: cannot be restored"):
        found.read(2)


# What is left when it ends early

DIE = """
import os, signal, sys
from nla_jax.interchange import import_pair
from nla_jax.lm.weights import Files
checked, seen = Files.check_finite, []
def fatal(self, finite, theirs, dtype):
    seen.append(theirs)
    if len(seen) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    checked(self, finite, theirs, dtype)
Files.check_finite = fatal
import_pair.import_pair(*sys.argv[1:])
"""


def test_a_killed_import_leaves_nothing_that_looks_whole(tmp_path):
    root = write_pair(tmp_path, tiny.lm(), "float32")
    argv = [str(root / name) for name in ("av", "ar", "bundle")]
    done = subprocess.run([sys.executable, "-c", DIE, *argv], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert any((root / "bundle").iterdir()) and not (root / "bundle" / "params").exists()
    with pytest.raises(UserError, match="not an NLA bundle"):
        bundle.load(root / "bundle")
    import_pair.import_pair(*argv)  # what is left of the first one gives way
    want = weights.load(root / "av")[1]
    assert {p.name for p in (root / "bundle").iterdir()} == {"params", "tokenizer", "nla_meta.yaml"}
    np.testing.assert_array_equal(opened(root / "bundle")["av/params/embed"].whole(), want["embed"])
    with pytest.raises(UserError, match="exists; choose another"):
        import_pair.import_pair(*argv)


def test_an_import_that_is_refused_half_way_leaves_nothing(tmp_path):
    root = write_pair(tmp_path, tiny.lm(), "float32")
    tensors = load_file(root / "ar" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, root / "ar" / "model.safetensors")
    with pytest.raises(UserError, match="^[^\n]*layers.2.mlp.up_proj.weight is not finite as float32[^\n]*$"):
        import_pair.import_pair(root / "av", root / "ar", root / "bundle")
    assert not (root / "bundle").exists()


@pytest.mark.parametrize("mine", ["bundle/tokenizer/words.txt", "bundle/params/a", "bundle/notes", "bundle"])
def test_nothing_else_is_taken_for_a_broken_import(tmp_path, mine):
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(UserError, match="exists; choose another"):
        import_pair.import_pair(tmp_path / "av", tmp_path / "ar", tmp_path / "bundle")
    assert (tmp_path / mine).read_text() == "mine"
