"""Weights go from files to the shards of a mesh one tensor at a time; equality with `weights.load` on every
family is in tests/lm/test_family_files.py."""

import gc
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nla_jax.errors import UserError
from nla_jax.lm import model, sharded_load, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import family
from nla_jax.pipeline import context
from tests.helpers import tiny, world
from tests.helpers.gguf_models import write_gguf

MB = 2**20
SLACK = MB // 2  # for all that is no tensor
BIG = LMConfig(
    vocab_size=2048, d_model=1024, n_blocks=8, n_heads=16, n_kv_heads=4, head_dim=64, d_ff=2048, tied=True,
    max_position=64,
)


def values(path, dtype, **options):
    """What `place` must give: all of it in the host's memory, and cast."""
    cfg, tree = weights.load(path, **options)
    return cfg, model.cast(jax.tree.map(jnp.asarray, tree), jnp.dtype(dtype))


def assert_equal(got, want):
    got, want = tiny.flat(got), tiny.flat(want)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in Hugging Face layout, float32."""
    directory = tmp_path_factory.mktemp("saved")
    cfg = tiny.lm(tied=False)
    weights.save_hf(directory, cfg, tiny.params(cfg))
    return directory


def torch_llama(cfg: LMConfig):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, num_hidden_layers=cfg.n_blocks,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, intermediate_size=cfg.d_ff,
        max_position_embeddings=cfg.max_position, tie_word_embeddings=cfg.tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ))


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """136 MB of bfloat16, no tensor larger than 4 MB."""
    directory = tmp_path_factory.mktemp("big")
    some = np.random.default_rng(0).normal(size=9973).astype(ml_dtypes.bfloat16)
    tree = {name: np.resize(some, spec.shape) for name, spec in params_lib.table(BIG).items()}
    weights.save_hf(directory, BIG, params_lib.nest(tree), "bfloat16")
    return directory


def peak(work) -> int:
    """The most bytes that Python and numpy held at once for `work()`, when its programs are compiled. A file
    that is mapped is not among them, nor is what jax holds for a device."""
    work()
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("sizes, dtype", [((1, 1, 1), "bfloat16"), ((1, 2, 2), "float32")])
def test_host_memory_stays_under_two_tensors(big, sizes, dtype):
    shards = sum(f.stat().st_size for f in big.glob("*.safetensors"))
    assert shards > 130 * MB
    assert peak(lambda: sharded_load.place(big, tiny.mesh(*sizes), dtype)) < 2 * 4 * MB + SLACK
    # The same measure sees a model that is read whole.
    assert peak(lambda: weights.load(big, BIG.first_blocks(2))) > 70 * MB


def test_host_memory_of_a_gguf_file(tmp_path):
    """A tensor of it counts as the float32 that it is unpacked to: 8 MB."""
    write_gguf(tmp_path / "m.gguf", "llama", torch_llama(BIG.first_blocks(2)))
    mesh = tiny.mesh(1, 2, 2)
    assert peak(lambda: sharded_load.place(tmp_path / "m.gguf", mesh, "bfloat16")) < 2 * 8 * MB + SLACK


# --- what is read, and where it goes --------------------------------------------------------------


def test_each_slice_is_read_once(saved, monkeypatch):
    """Devices that hold the same slice share what was read."""
    wanted, asked = {}, {}
    opened = weights.open_files

    def counting(path, *args):
        files = opened(path, *args)
        for name, t in files.tensors.items():
            wanted[name] = int(np.prod(t.shape))

            def part(index, name=name, t=t):
                found = t.part(index)
                asked[name] = asked.get(name, 0) + found.size
                return found

            files.tensors[name] = family.Tensor(t.shape, t.read, part)
        return files

    monkeypatch.setattr(weights, "open_files", counting)
    _, tree = sharded_load.place(saved, tiny.mesh(2, 1, 2))
    assert asked == wanted
    assert {s.data.shape for s in tree["blocks"]["wq"].addressable_shards} == {(4, 32, 16)}


def test_fewer_blocks_and_parameters_left_out(saved):
    short = weights.read_config(saved).first_blocks(3)
    options = dict(cfg=short, without=("final_norm", "lm_head"))
    cfg, tree = sharded_load.place(saved, tiny.mesh(1, 2, 2), **options)
    assert cfg == short and set(tree) == {"embed", "blocks"}
    assert_equal(tree, values(saved, "float32", **options)[1])


def test_without_a_mesh_everything_is_on_the_first_device(saved):
    _, tree = sharded_load.place(saved, dtype="bfloat16")
    assert {a.device for a in jax.tree.leaves(tree)} == {jax.devices()[0]}
    assert_equal(tree, values(saved, "bfloat16")[1])


@pytest.mark.parametrize("kind", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_types_of_files(saved, tmp_path, kind):
    tensors = {k: v.astype(kind) for k, v in load_file(saved / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    for dtype in ("float32", "bfloat16"):
        assert_equal(sharded_load.place(tmp_path, tiny.mesh(1, 2, 2), dtype)[1], values(tmp_path, dtype)[1])


def test_a_gguf_file(tmp_path):
    """Rows of q and k are put in order, as they are in `weights.load`."""
    cfg = tiny.lm(n_blocks=2)
    write_gguf(tmp_path / "m.gguf", "llama", torch_llama(cfg))
    found, tree = sharded_load.place(tmp_path / "m.gguf", tiny.mesh(1, 2, 2), "bfloat16")
    want_cfg, want = values(tmp_path / "m.gguf", "bfloat16")
    assert found == want_cfg
    assert_equal(tree, want)


def test_a_weight_that_is_not_finite_is_named(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    for name, value, dtype in (
        ("model.layers.2.mlp.up_proj.weight", np.nan, "bfloat16"),
        ("model.norm.weight", np.inf, "bfloat16"),
        ("model.embed_tokens.weight", 3.4e38, "bfloat16"),  # fits float32 only
    ):
        bad = {k: v.copy() for k, v in tensors.items()}
        bad[name].flat[-1] = value
        save_file(bad, tmp_path / "model.safetensors")
        kind = "float32" if "norm" in name else dtype
        with pytest.raises(UserError, match=f"{name} is not finite as {kind}: the file is damaged"):
            sharded_load.place(tmp_path, tiny.mesh(1, 2, 2), dtype)


def test_roles_that_are_trained_in_full_begin_from_the_files_in_float32(finished, quick):
    """Beside a base in bfloat16; AR takes no more than its blocks."""
    c = world.config(finished, dtype="bfloat16")
    c.av.rank = c.ar.rank = 0
    r = context.open_run(c, finished / "run")
    cfg, want = weights.load(finished / "target")
    assert_equal(r.base, values(finished / "target", "bfloat16")[1])
    assert_equal(context.initial_tree(r, "av")["params"], want)
    ar = context.initial_tree(r, "ar")["params"]
    assert_equal(ar, params_lib.truncate(want, r.spec.layer + 1))
    assert ar["blocks"]["wq"].shape[0] < cfg.n_blocks
