"""Files of every family: directories that transformers reads and writes, and GGUF, to the bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import sharded_load, weights
from nla_jax.lm.model import cast
from tests.helpers import gguf_models, tiny
from tests.helpers.family_pairs import (
    CASES,
    LLAMA3,
    YARN,
    made,
    read_torch,
    texts,
    torch_class,
    torch_config,
    torch_forward,
    torch_model,
)
from tests.helpers.gguf_models import write_gguf


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield tmp_path_factory.mktemp("families")
    made.cache_clear()


@pytest.fixture(params=list(CASES))
def pair(request, root):
    return made(request.param, root)


# Hugging Face directories


@pytest.mark.parametrize("sizes, dtype", [((1, 1, 1), "float32"), ((1, 2, 2), "bfloat16")])
def test_streamed_to_a_mesh_it_is_the_same(pair, sizes, dtype):
    mesh = tiny.mesh(*sizes)
    cfg, params = sharded_load.place(pair.folder, mesh, dtype)
    assert cfg == pair.cfg
    want = cast(jax.tree.map(jnp.asarray, pair.params), jnp.dtype(dtype))
    jax.tree.map(np.testing.assert_array_equal, params, want)
    tiny.assert_placed(params, params_lib.table(cfg), mesh)


def test_save_hf_loads_in_transformers(pair, tmp_path):
    weights.save_hf(tmp_path, pair.cfg, pair.params)
    text = {name: f"{name}_text" for name in ("gemma3", "gemma4", "qwen3_5")}
    kind = torch_class(text.get(pair.name, pair.name))
    raw = json.loads((tmp_path / "config.json").read_text())
    if pair.name not in ("mistral tied global", "phi3 global"):  # which a Llama computes as well
        assert raw["architectures"] == [kind.__name__]
    net = read_torch(tmp_path, transformers.AutoModelForCausalLM)
    ids_BT, valid_BT = texts()
    want = torch_forward(pair.net, ids_BT, valid_BT)[0][valid_BT]
    error = tiny.relative(torch_forward(net, ids_BT, valid_BT)[0][valid_BT], want)
    assert error < 1e-5
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    tiny.assert_trees_close(params, pair.params, atol=1e-6)


def test_save_hf_refuses_what_no_family_computes(tmp_path):
    cfg = dataclasses.replace(tiny.lm(), qkv_bias=True, post_norms=True)
    params = jax.tree.map(np.asarray, tiny.params(cfg))
    with pytest.raises(UserError, match="no family of models in transformers computes"):
        weights.save_hf(tmp_path, cfg, params)
    assert not list(tmp_path.iterdir())


def test_truncated_models(root, tmp_path):
    """The first blocks, read and written as a model of their own."""
    for name, n_blocks in (("gemma3_text", 2), ("qwen2 window untied", 2), ("gemma2", 2), ("olmo3", 2),
                           ("qwen3_moe", 2), ("qwen3_5_text", 2), ("gemma4_text", 3)):
        pair = made(name, root)
        short = pair.cfg.first_blocks(n_blocks)
        cfg, params = weights.load(pair.folder, short)
        want = {name: spec.shape for name, spec in params_lib.table(short).items()}
        assert cfg == short and {name: a.shape for name, a in tiny.flat(params).items()} == want
        weights.save_hf(tmp_path / name, cfg, params)
        assert weights.read_config(tmp_path / name) == short
        read_torch(tmp_path / name, transformers.AutoModelForCausalLM)


def test_the_12b_is_the_same_model(root, tmp_path):
    """Gemma 4 12B has a name and a class of its own, and no other text model."""
    pair = made("gemma4", root)
    text = {k: v for k, v in pair.net.config.text_config.to_dict().items() if k not in (
        "model_type", "architectures", "hidden_size_per_layer_input", "vocab_size_per_layer_input")}
    vision = dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=8, output_proj_dims=16)
    config = transformers.Gemma4UnifiedConfig(text_config=text, vision_config=vision)
    net = transformers.Gemma4UnifiedForConditionalGeneration(config)
    net.model.language_model.load_state_dict(pair.net.model.language_model.state_dict())
    net.save_pretrained(tmp_path)
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    ids_BT, valid_BT = texts()
    want = torch_forward(pair.net, ids_BT, valid_BT)[0][valid_BT]
    net = read_torch(tmp_path, transformers.Gemma4UnifiedForConditionalGeneration)
    np.testing.assert_allclose(torch_forward(net, ids_BT, valid_BT)[0][valid_BT], want, rtol=1e-5)


def test_a_model_that_ends_with_a_local_block(root, tmp_path):
    """transformers makes the last block of Gemma 4 global, so such a model is not written."""
    pair = made("gemma4_text", root)
    cfg, params = weights.load(pair.folder, pair.cfg.first_blocks(2))
    assert cfg.local == (True, True) and "global_wq" not in params["blocks"]
    with pytest.raises(UserError, match="no family of models in transformers computes"):
        weights.save_hf(tmp_path / "short", cfg, params)


def test_published_spelling_of_global_heads(root, tmp_path):
    """Two keys in place of transformers' settings of each block, which must all be the same."""
    pair = made("gemma4_text", root)
    raw = json.loads((copied(pair, tmp_path) / "config.json").read_text())
    each = raw.pop("per_layer_config")
    (tmp_path / "config.json").write_text(json.dumps(
        {**raw, "global_head_dim": 32, "num_global_key_value_heads": 1}))
    assert weights.read_config(tmp_path) == pair.cfg
    each["3"]["head_dim"] = 16
    (tmp_path / "config.json").write_text(json.dumps({**raw, "per_layer_config": each}))
    with pytest.raises(UserError, match="per_layer_config = .* is not supported"):
        weights.read_config(tmp_path)


def copied(pair, folder):
    for file in pair.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


SPELLINGS = [  # of transformers 4, of transformers 5
    ("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.lm_head.", "lm_head."),
]


def spelt(name, version):
    for pair in SPELLINGS:
        other, wanted = pair[5 - version], pair[version - 4]
        if name.startswith(other):
            return wanted + name.removeprefix(other)
    return name


@pytest.mark.parametrize("version", [4, 5])
def test_both_spellings_of_multimodal_tensors(root, tmp_path, version):
    """Prefixes before the language model and the image parts; what is neither is refused."""
    pair = made("gemma3", root)
    path = copied(pair, tmp_path) / "model.safetensors"
    state = {spelt(name, version): array for name, array in load_file(path).items()}
    starts = {name.split(".")[version - 4] for name in state}
    assert starts == {"language_model", "vision_tower", "multi_modal_projector"}
    save_file(state, path)
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    save_file({**state, "model.audio_tower.w": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"model\.audio_tower\.w is not a tensor"):
        weights.load(tmp_path)


def test_heads_for_later_tokens_are_not_read(root, tmp_path):
    """Qwen3.5 with images: the language model alone, whatever stands beside it."""
    pair = made("qwen3_5", root)
    path = copied(pair, tmp_path) / "model.safetensors"
    state = load_file(path)
    assert {name.split(".")[1] for name in state} >= {"language_model", "visual"}
    save_file({**state, "mtp.fc.weight": np.zeros((3, 6), np.float32)}, path)
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    save_file({**state, "model.audio_tower.w": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"model\.audio_tower\.w is not a tensor"):
        weights.load(tmp_path)


def test_fused_matrices_and_experts_must_be_whole(root, tmp_path):
    """The line names what is wrong by the names of the file."""
    for name, key, array, named in (
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight", np.zeros((5, 32), np.float32),
         r"model\.layers\.1\.self_attn\.qkv_proj\.weight has shape \(5, 32\), not \(128, 32\)"),
        ("phi3", "model.layers.2.mlp.gate_up_proj.weight", None,
         r"layers\.2\.mlp\.gate_up_proj\.weight is missing"),
        ("qwen3_moe", "model.layers.0.mlp.experts.5.up_proj.weight", None,
         r"layers\.0\.mlp\.experts\.5\.up_proj\.weight is missing"),
    ):
        (folder := tmp_path / key).mkdir()
        path = copied(made(name, root), folder) / "model.safetensors"
        state = load_file(path)
        assert state.pop(key).ndim == 2
        save_file(state if array is None else {**state, key: array}, path)
        with pytest.raises(UserError, match=named):
            weights.load(folder)


def test_experts_in_two_tensors(root, tmp_path):
    """Published files of Qwen3.5 have a block's experts together; transformers writes them one by one."""
    pair = made("qwen3_5_moe_text", root)
    path = copied(pair, tmp_path) / "model.safetensors"
    state = load_file(path)
    for i in range(4):
        stem = f"model.layers.{i}.mlp.experts."
        gate, up, down = (np.stack([state.pop(f"{stem}{e}.{part}_proj.weight") for e in range(8)])
                          for part in ("gate", "up", "down"))
        state |= {stem + "gate_up_proj": np.concatenate([gate, up], 1), stem + "down_proj": down}
    save_file(state, path)
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    streamed = sharded_load.place(tmp_path, tiny.mesh(1, 2, 2))[1]
    jax.tree.map(np.testing.assert_array_equal, streamed, params)
    del state["model.layers.2.mlp.experts.down_proj"]
    save_file(state, path)
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.experts\.0\.down_proj\.weight is missing"):
        weights.load(tmp_path)


def test_sparse_configurations_have_the_defaults_of_transformers(tmp_path):
    """Gemma 3 with images says little of its language model; every family leaves keys out."""
    for name, dropped in {
        "gemma3": ("head_dim", "num_attention_heads", "num_key_value_heads", "vocab_size",
                   "max_position_embeddings", "rms_norm_eps", "rope_parameters", "layer_types",
                   "query_pre_attn_scalar", "tie_word_embeddings", "hidden_activation"),
        "gemma2": ("head_dim", "query_pre_attn_scalar", "tie_word_embeddings", "layer_types",
                   "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        "gemma4_text": ("head_dim", "per_layer_config", "num_key_value_heads", "vocab_size", "layer_types",
                        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "sliding_window",
                        "tie_word_embeddings", "hidden_activation", "final_logit_softcapping",
                        "enable_moe_block", "num_kv_shared_layers", "attention_k_eq_v"),
        "qwen3 window untied": ("head_dim", "layer_types", "use_sliding_window"),
        "qwen2 window untied": ("layer_types", "max_window_layers", "sliding_window"),
        "mistral": ("sliding_window", "head_dim", "num_key_value_heads"),
    }.items():
        config = torch_config(name, num_attention_heads=8)
        raw = json.loads(config.to_json_string())
        part = raw["text_config"] if name == "gemma3" else raw
        for key in dropped:
            part.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        cfg = weights.read_config(tmp_path)
        want = type(config).from_pretrained(tmp_path).get_text_config()
        ours = (cfg.vocab_size, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.max_position,
                cfg.norm_eps, cfg.tied, cfg.attn_softcap, cfg.final_softcap)
        near = want.per_layer_config["sliding_attention"] if name == "gemma4_text" else want
        head_dim = getattr(near, "head_dim", None) or want.hidden_size // want.num_attention_heads
        assert ours == (
            want.vocab_size, want.num_attention_heads, near.num_key_value_heads, head_dim,
            want.max_position_embeddings, want.rms_norm_eps, want.tie_word_embeddings,
            getattr(want, "attn_logit_softcapping", None),
            getattr(want, "final_logit_softcapping", None),
        ), name
        kinds = getattr(want, "layer_types", None) or ["sliding_attention"] * cfg.n_blocks
        local = tuple(k == "sliding_attention" for k in kinds)
        assert cfg.local == (local if any(local) else ()), name
        assert not any(local) or cfg.window == want.sliding_window
        rope = want.rope_parameters
        if name == "gemma4_text":
            one = want.per_layer_config["full_attention"]
            assert cfg.global_heads == (one.num_key_value_heads, one.head_dim) and not cfg.global_k_is_v
            assert cfg.rope_scaling == ("proportional", rope["full_attention"]["partial_rotary_factor"])
        if name.startswith(("gemma3", "gemma4")):
            assert cfg.local_rope_theta == rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        assert cfg.rope_theta == rope["rope_theta"]


def test_older_configurations(root, tmp_path):
    """transformers 4: bases and scaling at the top, the pattern of local blocks as a number."""
    pair = made("gemma3_text", root)
    raw = json.loads((copied(pair, tmp_path) / "config.json").read_text())
    del raw["rope_parameters"], raw["layer_types"]
    raw |= {"rope_theta": 5000, "rope_local_base_freq": 100, "sliding_window_pattern": 6}
    raw |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "cache_implementation": "hybrid"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert weights.read_config(tmp_path) == pair.cfg


REFUSED = [
    ("llama", {"sliding_window": 5}, "sliding_window = 5"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("llama llama3", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, "rope_type 'yarn'"),
    ("llama llama3", {"rope_parameters": {**LLAMA3, "mscale": 2.0}}, "mscale = 2.0"),
    ("llama llama3", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' has no 'factor'"),
    ("llama llama3", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling differ"),
    ("llama linear", {"rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2}},
     "rope_parameters with rope_type"),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types = "),
    ("mistral", {"attention_bias": True}, "attention_bias = True"),
    ("mistral", {"sliding_window": "all"}, "sliding_window = 'all'"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("qwen2", {"attention_bias": False}, "attention_bias = False"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
    ("qwen2", {"use_mrope": True}, "use_mrope = True"),
    ("qwen2", {"num_experts": 8}, "num_experts = 8"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types = "),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
    ("olmo2", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling differ"),
    ("olmo2", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_type 'yarn'"),
    ("olmo3", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "'yarn' has no 'factor'"),
    ("olmo3", {"rope_parameters": {"full_attention": {**YARN, "mscale": 0.7}}}, "mscale = 0.7"),
    ("olmo3", {"rope_parameters": {"full_attention": {**YARN, "truncate": False, "x": 1}}}, "x = 1"),
    ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "layer_types = "),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "factor": 2}}, "rope_type 'longrope'"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor = 1.5"),
    ("phi3", {"attention_bias": True}, "attention_bias = True"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "experts"),
    ("qwen3_moe", {"num_experts": 16}, "num_local_experts and num_experts differ"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8"),
    ("qwen3_5_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types = "),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate = False"),
    ("qwen3_5_text", {"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid'"),
    ("qwen3_5_text", {"linear_num_value_heads": 3}, "delta="),
    ("qwen3_5_text", {"num_experts": 4}, "num_experts = 4"),
    ("qwen3_5", {"language_model_only": True}, "language_model_only = True"),
    ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types = "),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"sliding_window": None}, "sliding_window = None"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters: rope_theta = 5.0"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
     "rope_parameters: rope_scaling = "),
    ("gemma3_text", {"altup_num_inputs": 4}, "altup_num_inputs = 4"),
    ("gemma4_text", {"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256"),
    ("gemma4_text", {"num_kv_shared_layers": 2},
     "num_kv_shared_layers = 2 is not supported, which Gemma 4 E2B and E4B need: take Gemma 4 12B"),
    ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
    ("gemma4_text", {"layer_types": ["sliding_attention"] * 4}, "last must be full_attention"),
    ("gemma4_text", {"layer_types": ["full_attention"] * 4}, "some blocks must be sliding_attention"),
    ("gemma4_text", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
    ("gemma4", {"text_config": {"num_kv_shared_layers": 2}}, "hidden_size_per_layer_input = 256"),
    ("gemma3", {"quantization_config": {"bits": 4}}, "quantization_config = "),
    ("gemma3", {"audio_config": {"a": 1}}, "audio_config = "),
    ("gemma3", {"text_config": None}, "text_config is None"),
    ("gemma3", {"text_config": {"num_experts": 4}}, "num_experts = 4"),
    ("gemma3", {"model_type": "gemma3n"}, "model_type 'gemma3n'"),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_settings_that_are_not_understood(root, tmp_path, name, changes, named):
    path = copied(made(name, root), tmp_path) / "config.json"
    weights.read_config(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=named) as err:
        weights.read_config(tmp_path)
    assert str(path) in str(err.value) and "\n" not in str(err.value)


# GGUF


@pytest.mark.parametrize("name", list(gguf_models.CASES))
def test_gguf_equals_the_directory(tmp_path, name):
    arch, changes = gguf_models.CASES[name]
    net = torch_model(name, **changes)
    net.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", arch, net)
    want_cfg, want = weights.load(tmp_path / "hf")
    cfg, params = weights.load(tmp_path / "model.gguf")
    assert cfg == want_cfg == weights.read_config(tmp_path / "model.gguf")
    assert tiny.flat(params).keys() == params_lib.table(cfg).keys()
    jax.tree.map(np.testing.assert_array_equal, params, want)
    two = weights.load(tmp_path / "model.gguf", cfg.first_blocks(2))[1]
    np.testing.assert_array_equal(two["blocks"]["wq"], params["blocks"]["wq"][:2])


@pytest.mark.parametrize(
    ("name", "extra", "named"),
    [
        ("qwen2", ("qwen2.attention.sliding_window", 9), "sliding_window = 9"),
        ("qwen2", ("qwen2.rope.scaling.type", "yarn"), r"qwen2\.rope\.scaling\.type = 'yarn'"),
        ("qwen3", ("qwen3.expert_count", 8), r"qwen3\.expert_count = 8"),
        ("qwen3_moe", ("qwen3moe.expert_shared_count", 1), r"expert_shared_count = 1"),
        ("phi3 global", ("phi3.attention.sliding_window", 9), "sliding_window = 9"),
        ("gemma2", ("gemma2.attention.scale", 2), r"gemma2\.attention\.scale = 2"),
        ("gemma3_text", ("gemma3.final_logit_softcapping", 30), "final_logit_softcapping = 30"),
        ("gemma3_text", ("gemma3.rope.dimension_count", 8), "dimension_count = 8 is not 16"),
    ],
)
def test_gguf_settings_that_are_not_understood(tmp_path, name, extra, named):
    arch, changes = gguf_models.CASES[name]
    write_gguf(tmp_path / "m.gguf", arch, torch_model(name, **changes), [extra])
    with pytest.raises(UserError, match=named):
        weights.load(tmp_path / "m.gguf")


def test_gguf_unlike_llama_3(tmp_path):
    net = torch_model("llama llama3")  # scaled for 64 tokens: not what was published
    write_gguf(tmp_path / "m.gguf", "llama", net)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        weights.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "arch", "n_blocks"), [("gemma2", "gemma2", 46), ("gemma3_text", "gemma3", 62)]
)
def test_gguf_of_the_27b(tmp_path, name, arch, n_blocks):
    """The 27B models divide scores by sqrt(d_model / n_heads), which no metadata says."""
    write_gguf(tmp_path / "m.gguf", arch, torch_model(name, num_hidden_layers=n_blocks))
    cfg = weights.read_config(tmp_path / "m.gguf")
    assert cfg.query_scalar == 8 and cfg.head_dim == 16
    assert cfg.local[:6] == ((True, False) * 3 if arch == "gemma2" else (True,) * 5 + (False,))
