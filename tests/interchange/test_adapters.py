"""PEFT adapters in and out: against peft's own classes, as AV and AR, trained on, and refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import nla_jax
from nla_jax import bundle, verbalizer
from nla_jax.errors import UserError
from nla_jax.interchange import import_pair, peft_write
from nla_jax.lm.config import LMConfig
from nla_jax.lm.files import peft_config
from nla_jax.pipeline import stages
from nla_jax.util import lazy_params
from tests.helpers import released, tiny, world

# peft reads a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TEXTS = ["ab", "the words of a town.", 'Ends on "by",\nthen "the"', "x" * 40]
TOLERANCE = 1e-4  # float32: largest error over the root mean square
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (family of the pair, settings of AV's adapter, injection)
CASES = {
    "lora": ("gemma3", dict(r=4, lora_alpha=6, target_modules=ALL), "replace"),
    "rslora, ranks and alphas per module": (
        "qwen2",
        dict(r=4, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"],
             rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6}, alpha_pattern={"down_proj": 3}),
        "norm_matched",
    ),
    "whole modules": (
        "qwen2", dict(r=2, target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head"]), "replace",
    ),
    "linear attention": (  # AR has no block with q_proj
        "qwen3_5", dict(r=6, target_modules=[*ALL, "in_proj_qkv", "in_proj_z", "out_proj"]), "replace",
    ),
    "fused matrices": (
        "phi3", dict(r=6, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]), "replace",
    ),
    "other heads in global blocks": (  # which have no v_proj
        "gemma4", dict(r=6, target_modules=ALL), "replace",
    ),
}
AR_MODULES = {"qwen3_5": ["in_proj_qkv", "out_proj", "up_proj"], "phi3": ["qkv_proj", "gate_up_proj"]}


def write_av(root, settings: dict, seed: int = 5):
    """Write AV as peft leaves it, and return the torch module."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        root / "target", dtype=torch.float32, attn_implementation="eager")
    net = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    shake(net, seed)
    net.save_pretrained(root / "av_adapter")
    beside(root, "av", "av_adapter")
    return net


def shake(net, seed: int) -> None:
    """Move the trainable parameters, because peft's second factors begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)


def beside(root, role: str, name: str) -> None:
    """Copy the tokenizer and the sidecar of a released role to an adapter's directory."""
    tok = transformers.AutoTokenizer.from_pretrained(root / role)
    tok.padding_side = "right" if role == "ar" else "left"
    tok.save_pretrained(root / name)
    released.write_sidecar(root / name, released.read_sidecar(root / role))


def write_ar(root, family: str):
    """Write AR's adapter in the form of EasyNLA's trainer, and return (its blocks, its head [out, in])."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        root / "target", dtype=torch.float32, attn_implementation="eager")
    layer = released.FOR_ADAPTERS[family][1]
    base.model.layers = base.model.layers[: layer + 1]
    base.model.norm = torch.nn.Identity()
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True,
                        target_modules=AR_MODULES.get(family, ["q_proj", "up_proj"])), base)
    for name, p in base.named_parameters():
        p.requires_grad_("lora_" in name)
    shake(base, 7)
    head = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    tensors = {f"backbone.{n}": p.detach().contiguous() for n, p in base.named_parameters() if "lora_" in n}
    (root / "ar_adapter").mkdir()
    save_file({**tensors, "value_head.weight": head}, root / "ar_adapter" / peft_config.AR_WEIGHTS)
    meta = {"ar_num_layers": layer + 1, "lora_r": 3, "lora_alpha": 5, "final_norm_stripped": True}
    (root / "ar_adapter" / peft_config.AR_META).write_text(json.dumps(meta))
    beside(root, "ar", "ar_adapter")
    return base.eval(), head


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(name of the case, root, AV's torch module, AR's blocks and head, our bundle of both, float32)."""
    family, settings, injection = CASES[request.param]
    root = released.write(tmp_path_factory.mktemp("adapters"), family)
    av, ar = write_av(root, settings), write_ar(root, family)
    out = import_pair.import_pair(root / "av_adapter", root / "ar_adapter", root / "bundle", dtype="float32",
                                  injection=injection)
    return request.param, root, av, ar, out


@pytest.fixture(scope="module")
def loaded(pair):
    return nla_jax.load(pair[4], batch=2)


def torch_logits(net, root, injection: str, h):
    """Return the logits after AV's prompt with h at the marker, by torch."""
    tok, meta = transformers.AutoTokenizer.from_pretrained(root / "av"), released.read_sidecar(root / "av")
    x = released.injected(net, tok, meta, h)
    handle = None
    if injection == "norm_matched":
        ids = released.chat(tok)
        site = ids.index(meta["tokens"]["injection_token_id"])
        x = net.get_input_embeddings()(torch.tensor([ids])).float()
        v = torch.as_tensor(h).float()

        def add(module, args, out):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[0, site] += x[0, site].norm() * v / v.norm()
            return (x, *out[1:]) if isinstance(out, tuple) else x

        layers = net.get_base_model().model.layers
        handle = layers[1].register_forward_hook(add)
    with torch.no_grad():
        logits = net(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long)).logits[0, -1]
    if handle:
        handle.remove()
    return logits


def our_logits(nla, h_BD):
    params = verbalizer.weights(nla.base, nla.av)
    e_BD = verbalizer.inject(nla.av, jnp.asarray(h_BD), nla.spec.alpha)
    return np.asarray(verbalizer.prefill(params, nla.spec.lm, nla.spec.av, e_BD, jnp.float32)[1])


def test_adapters_av_is_pefts_module(pair, loaded):
    case, root, net, _, out = pair
    h_BD = tiny.activations(2, seed=3)
    ours = our_logits(loaded, h_BD)
    for b in range(2):
        theirs = torch_logits(net, root, CASES[case][2], h_BD[b])
        assert tiny.relative(ours[b], theirs) < TOLERANCE
    plain = our_logits(nla_jax.NLA(bundle.load(out)), -h_BD)
    assert tiny.relative(plain[0], ours[0]) > 10 * TOLERANCE  # the logits depend on h


def test_adapters_ar_is_the_torch_module(pair, loaded):
    _, root, _, (blocks, head), _ = pair
    tok = transformers.AutoTokenizer.from_pretrained(root / "ar")
    ours = loaded.reconstruct(TEXTS)
    for text, found in zip(TEXTS, np.asarray(ours), strict=True):
        ids = tok(released.AR_TEMPLATE.format(explanation=text), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = blocks.model(ids, use_cache=False).last_hidden_state[0, -1] @ head.T
        assert tiny.relative(found, wanted) < TOLERANCE


def test_adapters_ranks_are_the_bundles(pair):
    case, _, _, _, out = pair
    roles = bundle.read_sidecar(out)["roles"]
    assert roles["ar_rank"] == 3
    assert roles["av_rank"] == {"lora": 4, "whole modules": 0}.get(case, 6)


def test_adapters_exported_ones_load_in_peft(pair, loaded, tmp_path):
    case, root, _, (blocks, _), out = pair
    if case == "whole modules":
        with pytest.raises(UserError, match="AV is a whole model and no adapter"):
            peft_write.export_adapters(out, tmp_path / "out")
        return
    av, ar = peft_write.export_adapters(out, tmp_path / "out", base="org/name")
    assert json.loads((av / peft_config.CONFIG).read_text())["base_model_name_or_path"] == "org/name"
    base = transformers.AutoModelForCausalLM.from_pretrained(
        root / "target", dtype=torch.float32, attn_implementation="eager")
    net = peft.PeftModel.from_pretrained(base, av).eval()
    h_BD = tiny.activations(1, seed=3)
    ours = our_logits(loaded, h_BD)
    assert tiny.relative(ours[0], torch_logits(net, root, CASES[case][2], h_BD[0])) < TOLERANCE
    # AR's adapter on the whole target: peft adapts blocks 0 to K, and h is read behind block K.
    base = transformers.AutoModelForCausalLM.from_pretrained(
        root / "target", dtype=torch.float32, attn_implementation="eager")
    net = peft.PeftModel.from_pretrained(base, ar).eval()
    head = load_file(ar / "value_head.safetensors")["weight"]
    tok = transformers.AutoTokenizer.from_pretrained(ar)
    ids = tok(released.AR_TEMPLATE.format(explanation=TEXTS[1]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = net(ids, output_hidden_states=True).hidden_states[len(blocks.model.layers)][0, -1]
    assert tiny.relative(np.asarray(loaded.reconstruct([TEXTS[1]]))[0], hidden @ head.T) < TOLERANCE
    again = import_pair.import_pair(av, ar, tmp_path / "again", dtype="float32",
                                    target=str(root / "target"))
    for role in ("av", "ar"):
        one, two = (tiny.flat(trees(place)[role]) for place in (out, again))
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-7)
    assert bundle.injection(bundle.read_sidecar(again)) == CASES[case][2]


def trees(directory) -> dict:
    meta = bundle.read_sidecar(directory)
    return bundle.read_trees(directory, meta, LMConfig.of_plain(meta["lm"]))


def test_adapters_are_opened_in_place(pair, loaded, tmp_path, monkeypatch):
    """`nla_jax.load` of both adapters, without an import, is the imported bundle."""
    case, root, *_ = pair
    monkeypatch.setenv("NLA_CACHE", str(tmp_path / "cache"))
    for role in ("av", "ar"):
        link(root / f"{role}_adapter", tmp_path / role)
        meta = released.read_sidecar(root / role)
        scale = 1.0 if CASES[case][2] == "norm_matched" else meta["extraction"]["injection_scale"]
        meta["extraction"] |= {"injection": CASES[case][2], "injection_scale": scale}
        released.write_sidecar(tmp_path / role, meta)
    for where in (tmp_path / "av", f"{tmp_path / 'av'},{tmp_path / 'ar'}"):
        nla = nla_jax.load(where, batch=2, dtype="float32")
        h_BD = tiny.activations(2, seed=3)
        np.testing.assert_allclose(our_logits(nla, h_BD), our_logits(loaded, h_BD), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(nla.reconstruct(TEXTS), loaded.reconstruct(TEXTS), rtol=1e-5, atol=1e-5)


def test_adapters_sidecar_of_the_training_data(pair, tmp_path):
    """EasyNLA's trainer copies the sidecar of its data to an adapter: the layer is in its extraction."""
    case, root, *_, out = pair
    meta = released.read_sidecar(root / "av")
    data = {
        "kind": "nla_dataset", "schema_version": 1, "stage": "av_sft", "row_count": 3,
        "extraction": {"base_model": str(root / "target"), "d_model": 32, "norm": "none", "corpus": "web",
                       "layer_index": released.FOR_ADAPTERS[CASES[case][0]][1],
                       "injection_scale": meta["extraction"]["injection_scale"]},
        "tokens": meta["tokens"], "prompt_templates": meta["prompt_templates"],
    }
    for role in ("av", "ar"):
        link(root / f"{role}_adapter", tmp_path / role)
        released.write_sidecar(tmp_path / role, data)
    again = import_pair.import_pair(tmp_path / "av", tmp_path / "ar", tmp_path / "b", dtype="float32",
                                    injection=CASES[case][2])
    keys = ("extraction", "tokens", "prompt_templates", "roles", "base_checkpoint")
    one, two = bundle.read_sidecar(out), bundle.read_sidecar(again)
    assert {k: one[k] for k in keys} == {k: two[k] for k in keys}


def link(source, place):
    """Copy the files of a directory by links, without its sidecar, so that a test can replace one."""
    place.mkdir(parents=True)
    for file in source.iterdir():
        if file.name != "nla_meta.yaml":
            (place / file.name).symlink_to(file)


REFUSED = {
    "use_dora": (True, "use_dora is True"),
    "bias": ("all", "bias is 'all'"),
    "fan_in_fan_out": (True, "fan_in_fan_out is True"),
    "lora_bias": (True, "lora_bias is True"),
    "layer_replication": ([[0, 2], [1, 3]], "layer_replication is"),
    "trainable_token_indices": ([1, 2], "trainable_token_indices is"),
    "target_parameters": (["mlp.experts.gate_up_proj"], "target_parameters is"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa'"),
    "peft_type": ("IA3", "peft_type is 'IA3'"),
    "r": (5, "asks for"),
    "lora_alpha": (float("inf"), "lora_alpha is inf"),
    "alpha_pattern": ({"(": 3}, "is invalid"),
    "rank_pattern": ({"q_proj": "two"}, "rank_pattern['q_proj'] is 'two'"),
    "modules_to_save": ("lm_head", "modules_to_save is 'lm_head'"),
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_adapters_refuse_settings_that_change_the_arithmetic(plain, tmp_path, key):
    value, message = REFUSED[key]
    place = edited(plain, tmp_path, {key: value})
    assert message in refusal(import_pair.import_pair, place, plain / "ar_adapter", tmp_path / "b",
                              injection="replace")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A released pair with two adapters, without an import."""
    root = released.write(tmp_path_factory.mktemp("plain"), "qwen2")
    write_av(root, dict(r=4, target_modules=["q_proj"]))
    write_ar(root, "qwen2")
    return root


def edited(root, tmp_path, changes: dict, role: str = "av"):
    """Return an adapter's directory with these settings in its JSON file."""
    link(root / f"{role}_adapter", tmp_path / role)
    released.write_sidecar(tmp_path / role, released.read_sidecar(root / role))
    path = tmp_path / role / (peft_config.CONFIG if role == "av" else peft_config.AR_META)
    raw = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(raw))
    return tmp_path / role


def refusal(call, *args, **kw) -> str:
    """The message of the UserError that the call raises: always one line."""
    with pytest.raises(UserError) as e:
        call(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_adapters_refuse_files_that_are_not_whole(plain, tmp_path):
    def message(role: str, tensors, changes=None) -> str:
        place = edited(plain, tmp_path / str(len(list(tmp_path.iterdir()))), changes or {}, role)
        path = place / (peft_config.WEIGHTS if role == "av" else peft_config.AR_WEIGHTS)
        found = load_file(path)
        path.unlink()
        if tensors:
            save_file(tensors(found), path)
        both = {r: plain / f"{r}_adapter" for r in ("av", "ar")} | {role: place}
        return refusal(import_pair.import_pair, both["av"], both["ar"], place.parent / "b",
                       injection="replace")

    first = lambda found: {k: v for k, v in found.items() if k != sorted(found)[0]}
    assert "has only one of its two factors" in message("av", first)
    assert "is missing" in message("av", None)
    assert "is not finite" in message("av", lambda found: {k: v * float("nan") for k, v in found.items()})
    lacking = {"base_model.model.model.layers.0.linear_attn.out_proj.lora_A.weight": torch.ones(4, 32)}
    assert "block 0 of the base has no linear_attn.out_proj" in message("av", lambda found: found | lacking)
    gate = {"base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.ones(4, 32)}
    assert "does not adapt mlp.gate" in message("av", lambda found: found | gate)
    assert "does not support the tensor" in message("av", lambda found: found | {"prompt": torch.ones(2)})
    assert "does not contain AR's head" in message(
        "ar", lambda found: {k: v for k, v in found.items() if "head" not in k})
    kept = {"final_norm_stripped": False}
    assert "final_norm_stripped is false" in message("ar", lambda found: found, kept)


def test_adapters_injection_is_never_guessed(plain, tmp_path):
    args = plain / "av_adapter", plain / "ar_adapter", tmp_path / "b"
    assert "does not say how h enters the model" in refusal(import_pair.import_pair, *args)
    out = import_pair.import_pair(*args, injection="norm_matched")
    extraction = bundle.read_sidecar(out)["extraction"]
    assert (extraction["injection"], extraction["injection_scale"]) == ("norm_matched", 1.0)


def test_adapters_training_goes_on(finished, quick, tmp_path):
    """Adapters of a run's target, exported and imported, are where a further run starts."""
    dirs = peft_write.export_adapters(finished / "run" / "bundle", tmp_path / "out")
    start = import_pair.import_pair(*dirs, tmp_path / "bundle", dtype="float32", max_new=16)
    roles = bundle.read_sidecar(start)["roles"]
    none = dict(steps=0)
    config = world.config(
        finished, layer=-1, av_template="", ar_template="", init=str(start),
        av={"rank": roles["av_rank"]}, ar={"rank": roles["ar_rank"]},
        lessons_ar=none, warm_av=none, warm_ar=none, rl=dict(steps=1, batch=2))
    stages.run(config, tmp_path / "run", source=finished / "run")
    before, after = (tiny.flat(trees(place)) for place in (start, tmp_path / "run" / "bundle"))
    assert before.keys() == after.keys()
    moved = [name for name in before if not np.array_equal(before[name], after[name])]
    assert any(name.startswith("av/lora") for name in moved)
    assert jax.tree.all(jax.tree.map(lambda a: bool(np.isfinite(a).all()), after))


def test_adapters_of_matrices_that_are_fused():
    """One first factor of both is kept; two are put beside each other."""
    rng = np.random.default_rng(0)
    factor = lambda *shape: lazy_params.wrap(rng.normal(size=(2, *shape)).astype(np.float32), stacked=True)
    a, other = factor(8, 3), factor(8, 2)
    for parts, rank in (([a, a], 3), ([a, other], 5)):
        tree = [{"a": x, "b": factor(x.shape[2], n)} for x, n in zip(parts, (6, 4), strict=True)]
        down, up = peft_write._join(tree)
        assert down.shape == (2, rank, 8) and up.shape == (2, 10, rank)
        want = np.concatenate([ab["a"].whole() @ ab["b"].whole() for ab in tree], 2)
        np.testing.assert_allclose((up @ down).swapaxes(1, 2), want, atol=1e-6)
