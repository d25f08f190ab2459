"""Released pairs in and out: against torch, back and forth, explained, trained on, and refused."""

import copy
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nla_jax
from nla_jax import bundle, verbalizer
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.interchange import import_pair, model_sidecar, sidecar_common
from nla_jax.lm import model, weights
from nla_jax.lm import params as params_lib
from nla_jax.pipeline import grounding, stages
from nla_jax.util import checkpoint
from tests.helpers import released, tiny, world

pytestmark = pytest.mark.usefixtures("quick")
TEXTS = ["ab", "the words of a town.", 'Ends on "by",\nthen "the"', "x" * 40]
# What a run that begins from a bundle leaves to it.
UNSET = dict(layer=-1, av_template="", ar_template="", av={"rank": 0}, ar={"rank": 0})
TOLERANCE = 1e-4  # float32: largest error over the root mean square


@pytest.fixture(scope="module", params=list(released.CASES))
def pair(request, tmp_path_factory):
    """(family, the released directories, our bundle made of them in float32)."""
    root = released.write(tmp_path_factory.mktemp("released"), request.param)
    out = import_pair.import_pair(root / "av", root / "ar", root / "bundle", dtype="float32")
    return request.param, root, out


@pytest.fixture(scope="module")
def exported(pair):
    """The directories that `pair`'s bundle is exported to."""
    return import_pair.export_pair(pair[2], pair[1] / "out")


@pytest.fixture(scope="module")
def loaded(pair):
    return nla_jax.load(pair[2], batch=2)


def trees(directory) -> dict:
    meta = bundle.read_sidecar(directory)
    return tiny.flat(bundle.read_trees(directory, meta, bundle.LMConfig.of_plain(meta["lm"])))


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def refusal(call, *args, **kw) -> str:
    """The message of the UserError that the call raises: always one line."""
    with pytest.raises(UserError) as e:
        call(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


# Against torch


def test_interchange_reconstructor_is_the_torch_module(pair, exported, loaded):
    family, root, _ = pair
    want = released.Reconstructor(root / "ar")(TEXTS)
    got = loaded.reconstruct(TEXTS)
    assert tiny.relative(got, want) < TOLERANCE
    assert tiny.relative(released.Reconstructor(exported[1])(TEXTS), want) < TOLERANCE
    assert len({tuple(np.round(r, 3)) for r in want}) == len(TEXTS)
    assert loaded.spec.layer == released.CASES[family][1]


def test_interchange_verbalizer_is_the_torch_model(pair, exported, loaded):
    """Prompt embeddings with h in them, first logits, and the greedy answer, on both sides of an export."""
    spec, h = loaded.spec, tiny.activations(2)
    tok = transformers.AutoTokenizer.from_pretrained(exported[0])
    params = verbalizer.weights(loaded.base, loaded.av)
    e_BD = verbalizer.inject(loaded.av, jnp.asarray(h), spec.alpha)
    ids = jnp.array([*spec.av.before, spec.av.marker, *spec.av.after])
    x_BTD = jnp.broadcast_to(model.embed(params, spec.lm, ids[None]), (2, len(ids), 32))
    x_BTD = x_BTD.at[:, len(spec.av.before)].set(e_BD)
    logits = verbalizer.prefill(params, spec.lm, spec.av, e_BD)[1]
    rows, length, *_ = loaded.runner.write(h, jax.random.key(0), temperature=0.0, max_new=12)
    for directory in (pair[1] / "av", exported[0]):
        meta = released.read_sidecar(directory)
        net = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for b in range(2):
            x = released.injected(net, tok, meta, h[b])
            np.testing.assert_allclose(x[0], x_BTD[b], rtol=1e-5, atol=1e-6)
            mask = torch.ones(x.shape[:2], dtype=torch.long)
            with torch.no_grad():
                first = net(inputs_embeds=x, attention_mask=mask).logits[0, -1]
                answer = net.generate(
                    inputs_embeds=x, attention_mask=mask, max_new_tokens=12, do_sample=False,
                    eos_token_id=list(spec.av.eos), pad_token_id=spec.av.pad,
                )
            assert tiny.relative(logits[b], first) < TOLERANCE
            answer = [i for i in answer[0].tolist() if i not in spec.av.eos]
            assert answer == rows[b, : length[b]].tolist()
            assert tok.decode(answer) == loaded.tokenizer.decode(rows[b, : length[b]])
    assert len(set(map(tuple, rows.tolist()))) == 2  # what is written hangs on h


def test_interchange_scale_stays_float32(pair):
    """In bfloat16 the injected vector keeps float32: a norm of 80000 is not rounded."""
    spec = bundle.load(pair[2]).spec
    params = model.cast(jax.tree.map(jnp.asarray, weights.load(pair[1] / "av")[1]), jnp.bfloat16)
    e_BD = verbalizer.inject({}, jnp.asarray(tiny.activations(3)), spec.alpha)
    x_BTD, matched = verbalizer._marker_and_after(params, spec.lm, spec.av, e_BD)
    assert x_BTD.dtype == jnp.float32 and matched is None
    np.testing.assert_array_equal(x_BTD[:, 0], e_BD)
    np.testing.assert_allclose(np.linalg.norm(e_BD, axis=1), spec.alpha, rtol=1e-6)
    rounded = np.asarray(e_BD.astype(jnp.bfloat16), np.float32)
    assert np.abs(rounded - e_BD).max() > 1e-3 * np.abs(e_BD).max()  # which rounding would have done


def test_interchange_sidecar_is_taken_word_for_word(pair, exported):
    family, root, out = pair
    meta, av = bundle.read_sidecar(out), released.read_sidecar(root / "av")
    ours = meta["prompt_templates"]
    assert ours["av"].replace("{marker}", tiny.MARKER) == released.AV_TEMPLATE.format(
        injection_char=tiny.MARKER
    )
    assert "{all}" in ours["av"] and ours["ar"] == released.AR_TEMPLATE
    assert meta["extraction"]["injection_scale"] == released.CASES[family][2]
    assert meta["roles"] == {"av_rank": 0, "ar_rank": 0, "affine": False, "ar_kind": "trained"}
    assert meta["base_checkpoint"] == str(root / "target") and meta["mean_direction"] is None
    assert meta["max_new_tokens"] == 150 and meta["training"]["imported"]["av"]["unheard_of"] == {"a": [1]}
    ar = released.read_sidecar(root / "ar")
    assert meta["tokens"] == av["tokens"] | {"critic_suffix_ids": ar["tokens"]["critic_suffix_ids"]}
    for directory, old in zip(exported, (av, ar), strict=True):
        new = released.read_sidecar(directory)
        for key in ("kind", "schema_version", "role", "d_model", "prompt_templates", "extraction"):
            assert new[key] == old[key], key
        assert new["extraction_layer_index"] == old["extraction_layer_index"]
        assert new["tokens"]["injection_left_neighbor_id"] == old["tokens"]["injection_left_neighbor_id"]
    assert released.read_sidecar(exported[1])["critic"] == ar["critic"]


# Back and forth


def test_interchange_round_trip_is_bitwise(pair, exported, tmp_path):
    """Parameters come back bit for bit; from either generation of sidecars, and from a bare v1 pair."""
    again = import_pair.import_pair(*exported, tmp_path / "again")
    assert_equal(trees(again), trees(pair[2]))
    was, now = bundle.read_sidecar(pair[2]), bundle.read_sidecar(again)
    for key in ("lm", "dtype", "extraction", "tokens", "prompt_templates", "roles", "base_fingerprint",
                "max_new_tokens", "mean_direction"):
        assert now[key] == was[key], key
    old = import_pair.export_pair(again, tmp_path / "old", schema=1)
    meta = released.read_sidecar(old[1])
    assert (meta["schema_version"], meta["role"]) == (1, "critic")
    assert set(meta["prompt_templates"]) == {"actor", "critic"}
    assert meta["critic"] == {"num_hidden_layers": released.CASES[pair[0]][1]}
    assert_equal(trees(import_pair.import_pair(*old, tmp_path / "third")), trees(again))
    assert bundle.read_sidecar(tmp_path / "third")["tokens"] == was["tokens"]


def test_interchange_bfloat16_export(pair, tmp_path):
    """Rounded once, from the weight that stands in the file (Gemma's norms are stored less one)."""
    av, ar = import_pair.export_pair(pair[2], tmp_path, dtype="bfloat16")
    want = {}
    for shard in sorted((pair[1] / "av").glob("*.safetensors")):
        want |= load_file(shard)
    got = load_file(av / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.bfloat16
        error = (tensor.float() - want[name]).abs()
        assert (error <= 2.0**-8 * want[name].abs() + 1e-6).all(), name
    assert load_file(ar / "value_head.safetensors")["weight"].dtype == torch.bfloat16
    assert json.loads((ar / "config.json").read_text())["dtype"] == "bfloat16"


def test_interchange_first_generation(tmp_path):
    """A v1 pair: {actor, critic}, num_hidden_layers, no scale in the critic's sidecar."""
    root = released.write(tmp_path, "qwen2", schema=1)
    out = import_pair.import_pair(root / "av", root / "ar", root / "bundle", target=str(root / "target"))
    meta = bundle.read_sidecar(out)
    assert (meta["extraction"]["layer_index"], meta["extraction"]["injection_scale"]) == (2, 6.0)
    assert meta["prompt_templates"]["ar"] == released.AR_TEMPLATE and meta["dtype"] == "bfloat16"


@pytest.fixture(scope="module")
def mended(finished, tmp_path_factory):
    """The LoRA bundle of `finished`, exported (merged), and imported again as full parameters."""
    root = tmp_path_factory.mktemp("mended")
    av, ar = import_pair.export_pair(finished / "run" / "bundle", root / "out")
    return import_pair.import_pair(av, ar, root / "bundle")


def test_interchange_adapters_are_merged(finished, nla, mended):
    """The same explanations and the same FVE to 1e-6."""
    h = store.load_columns(finished / "run" / "data", "heldout", ["h"])["h"]
    other = nla_jax.load(mended, batch=8)
    assert "lora" in nla.av and "lora" not in other.av
    trips = [
        n.runner.round_trip(h, jax.random.key(0), temperature=1.0, max_new=16, label="") for n in (nla, other)
    ]
    assert trips[0].responses == trips[1].responses and len(set(trips[0].explanations)) > 2
    found = [F.fve(F.errors(t.h_text, h, t.ok), F.variances(h)) for t in trips]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    np.testing.assert_array_equal(nla.mean_direction, other.mean_direction)
    assert other.meta["max_new_tokens"] == nla.meta["max_new_tokens"]


@pytest.fixture(scope="module")
def frozen(finished, tmp_path_factory):
    return world.frozen_bundle(finished, tmp_path_factory.mktemp("frozen") / "bundle")


def test_interchange_a_frozen_ar_goes_out_and_comes_back(finished, frozen, tmp_path):
    """AR's directory has the target's first blocks and the identity for a head; no suffix is [] in both."""
    av, ar = import_pair.export_pair(frozen, tmp_path / "out")
    target = load_file(finished / "target" / "model.safetensors")
    blocks_of_ar = {k: v for k, v in load_file(ar / "model.safetensors").items() if "layers." in k}
    assert blocks_of_ar and all(torch.equal(v, target[k]) for k, v in blocks_of_ar.items())
    head = load_file(ar / "value_head.safetensors")["weight"]
    assert torch.equal(head, torch.eye(32))
    for directory in (av, ar):
        said = released.read_sidecar(directory)
        assert said["tokens"]["critic_suffix_ids"] == []
        assert said["prompt_templates"]["ar"] == "{explanation}"
    again = nla_jax.load(import_pair.import_pair(av, ar, tmp_path / "again"), batch=8)
    nla = nla_jax.load(frozen, batch=8)
    assert nla.ar == {} and "head" in again.ar and again.spec.ar == nla.spec.ar and nla.spec.ar.after == ()
    texts = ["ab", "of the town"]
    np.testing.assert_allclose(again.reconstruct(texts), nla.reconstruct(texts), rtol=1e-5, atol=1e-5)
    # AR is the target: what it makes of a text is the text's own activation.
    np.testing.assert_allclose(nla.reconstruct(texts)[1], nla.capture(texts[1])[-1], rtol=1e-4, atol=1e-4)


def test_interchange_a_suffix_that_is_not_said(frozen, tmp_path):
    """A sidecar that leaves the suffix out is read by its template, which may have none."""
    av, ar = import_pair.export_pair(frozen, tmp_path / "out")
    for directory in (av, ar):
        said = released.read_sidecar(directory)
        said["tokens"]["critic_suffix_ids"] = None
        released.write_sidecar(directory, said)
    out = import_pair.import_pair(av, ar, tmp_path / "b")
    assert bundle.read_sidecar(out)["tokens"]["critic_suffix_ids"] == []


# What comes after an import


@pytest.fixture(scope="module")
def official(mended, tmp_path_factory):
    """The same with the release's AR template, and no word of a mean direction."""
    root = tmp_path_factory.mktemp("official")
    meta = bundle.read_sidecar(mended)
    dirs = import_pair.export_pair(mended, root / "out")
    tok = transformers.AutoTokenizer.from_pretrained(dirs[0])
    for role, directory in zip(("av", "ar"), dirs, strict=True):
        scale, av_text = meta["extraction"]["injection_scale"], released.templates(directory)["av"]
        said = released.sidecar(tok, role, 2, 0, scale, meta["base_checkpoint"], av=av_text)
        released.write_sidecar(directory, said)
    return import_pair.import_pair(*dirs, root / "bundle", dtype="float32", max_new=16)


def test_interchange_without_a_mean(finished, official, tmp_path):
    """Reports are relative to zero, evaluations to the store's warm rows; a store can give the mean."""
    data = finished / "run" / "data"
    nla = nla_jax.load(official, batch=8)
    assert nla.mean_direction is None
    for r in nla.round_trip("an old town", samples=2):
        assert r.fve == pytest.approx(2 * r.cos - 1, abs=1e-5)
    found = grounding.evaluate_bundle(official, data=data, probes=["round_trip"], batch=8)["heldout"].figures
    value = {f.name: f.value for f in found}
    h = store.load_columns(data, "heldout", ["h"])["h"]
    mean = F.mean_direction(store.load_columns(data, "warm", ["h"])["h"])
    want = F.fve(F.errors(np.broadcast_to(mean, h.shape), h), F.variances(h))
    assert value["fve_mean_direction"] == pytest.approx(want)
    # The tokenizer merges a full stop with the tag: the two paths are apart, and it is counted.
    assert 0 <= value["retokenization_mismatch"] <= 1

    dirs = import_pair.export_pair(official, tmp_path / "out")
    with_mean = import_pair.import_pair(*dirs, tmp_path / "bundle", mean_from=data)
    np.testing.assert_allclose(bundle.read_sidecar(with_mean)["mean_direction"], mean)
    other = world.write_target(tmp_path / "target", seed=1)
    message = refusal(import_pair.import_pair, *dirs, tmp_path / "b", target=str(other), mean_from=data)
    assert "holds activations of another model or layer" in message and str(data) in message


def test_interchange_training_goes_on(finished, official, tmp_path):
    """AV and AR begin as the bundle has them, with its layer, scale, prompts and tokenizer."""
    none = dict(steps=0)
    config = world.config(
        finished, **UNSET, init=str(official),
        lessons_ar=none, warm_av=none, warm_ar=dict(steps=1, lr=1e-7), rl=dict(steps=1, batch=2),
    )
    summary = stages.run(config, tmp_path / "run", source=finished / "run")
    assert math.isfinite(summary["fve_rl"]) and summary["seconds"]["warm_ar"] > 0
    was = trees(official)
    warm, rl = trees(tmp_path / "run" / "bundle_warm"), trees(tmp_path / "run" / "bundle")
    assert warm.keys() == rl.keys() == was.keys()
    for name, array in was.items():
        np.testing.assert_allclose(warm[name], array, atol=0 if name.startswith("av/") else 1e-7)
        assert not np.array_equal(rl[name], array) or "bias" in name, name
    before, after = bundle.read_sidecar(official), bundle.read_sidecar(tmp_path / "run" / "bundle")
    for key in ("lm", "extraction", "tokens", "prompt_templates", "roles", "base_fingerprint"):
        assert after[key] == before[key], key
    assert after["training"]["config"]["layer"] == 0
    assert import_pair.export_pair(tmp_path / "run" / "bundle", tmp_path / "out")[0].is_dir()


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(layer=1), "config layer=1, but init="),
        (dict(alpha=3.5), "config alpha=3.5"),
        (dict(marker="\u3200"), "config marker="),
        (dict(av_template="Other {marker}"), "config av_template='Other {marker}'"),
        (dict(ar_template="<text>\n{explanation}\n</text> <other>"), "config ar_template="),
        (dict(av=dict(rank=2, affine="none")), "config av.rank=2"),
        (dict(av=dict(rank=0, affine="identity")), "config av.affine='identity'"),
        (dict(ar=dict(rank=2)), "config ar.rank=2"),
        (dict(init="nowhere"), "nowhere: not an NLA bundle"),
    ],
)
def test_interchange_a_run_from_a_bundle_refuses_conflicts(finished, official, tmp_path, changes, message):
    config = world.config(finished, **{**UNSET, "init": str(official), **changes})
    assert message in refusal(stages.run, config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_interchange_a_run_from_a_bundle_refuses_another_target(finished, official, tmp_path):
    other = world.write_target(tmp_path / "target", seed=1)
    config = world.config(finished, **UNSET, init=str(official), target=str(other))
    assert "was made for other weights" in refusal(stages.run, config, tmp_path / "run")


def test_interchange_commands(sound, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    root, out = sound, tmp_path / "bundle"
    command = ("import", "--av", root / "av", "--ar", root / "ar", "--out", out, "--dtype", "float32")
    assert world.nla(*command, "--max-new", 6) == 0
    assert capsys.readouterr().out == f"bundle: {out}\n"
    assert world.nla("explain", "--bundle", out, "--text", "an old", "--tokens", "-1", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["position"] >= 0 and report["fve"] == pytest.approx(2 * report["cos"] - 1, abs=1e-5)
    assert world.nla("export", "--bundle", out, "--out", tmp_path / "pair") == 0
    assert capsys.readouterr().out == f"av: {tmp_path / 'pair' / 'av'}\nar: {tmp_path / 'pair' / 'ar'}\n"
    assert world.nla(*command) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert world.nla("export", "--bundle", out, "--out", tmp_path / "pair") == 2
    assert "av exists" in capsys.readouterr().err


# What is refused


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return released.write(tmp_path_factory.mktemp("sound"), "qwen2")


def changed(role: str, key: str, value):
    """A function that sets a dotted key of one sidecar; value None deletes nothing, it is null."""

    def change(root):
        meta = released.read_sidecar(root / role)
        *path, last = key.split(".")
        block = meta
        for name in path:
            block = block[name]
        block[last] = value
        released.write_sidecar(root / role, meta)

    return change


def weight(role: str, file: str, name: str, make):
    def change(root):
        tensors = load_file(root / role / file)
        tensors[name] = make(tensors[name])
        save_file(tensors, root / role / file, metadata={"format": "pt"})

    return change


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = math.nan
    return tensor


def config(role: str, **values):
    def change(root):
        path = root / role / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_words(root):
    tok = tiny.tokenizer()
    tok.add_tokens(["other"])
    tok.save_pretrained(root / "ar")


REFUSED = {
    "no sidecar": (lambda root: (root / "ar" / "nla_meta.yaml").unlink(), "ar/nla_meta.yaml is missing"),
    "no yaml": (lambda root: (root / "av" / "nla_meta.yaml").write_text("a: [1"), "not valid YAML"),
    "kind": (changed("av", "kind", "nla_dataset"), "kind is 'nla_dataset', not 'nla_model'"),
    "newer": (changed("ar", "schema_version", 3), "schema_version 3 is not 1 to 2"),
    "role": (changed("av", "role", "judge"), "role is 'judge'"),
    "swapped": (changed("av", "role", "critic"), "is the AR of a pair; give it with --ar"),
    "width": (changed("ar", "d_model", 64), "d_model is 32 in the first and 64 in the second"),
    "type": (changed("av", "d_model", "32"), "d_model is '32', not int"),
    "both widths": (
        lambda root: [changed(r, "d_model", 64)(root) for r in ("av", "ar")],
        "d_model is 64 in the sidecar and 32 in config.json",
    ),
    "scales": (
        changed("ar", "extraction.injection_scale", 7.0), "injection_scale is 6.0 in the first and 7"
    ),
    "raw injection": (
        lambda root: [changed(r, "extraction.injection_scale", None)(root) for r in ("av", "ar")],
        "injection_scale is null",
    ),
    "raw error": (changed("ar", "extraction.mse_scale", None), "mse_scale is null"),
    "bad scale": (changed("av", "extraction.injection_scale", -1.0), "scale is -1.0, not a positive"),
    "templates": (
        changed("ar", "prompt_templates.av", "Other <concept>{injection_char}</concept>"),
        "prompt_templates: av is",
    ),
    "no field": (changed("av", "prompt_templates.av", "Other"), "must hold {injection_char} once"),
    "no template": (
        lambda root: [changed(r, "prompt_templates.ar", None)(root) for r in ("av", "ar")],
        "has the ar template in its sidecar",
    ),
    "two names": (changed("av", "prompt_templates.actor", "{injection_char}"), "two names of one template"),
    "marker": (
        lambda root: [changed(r, "tokens.injection_token_id", 5)(root) for r in ("av", "ar")],
        "av/nla_meta.yaml and the tokenizer in its directory do not belong together: injection_token_id is",
    ),
    "neighbour": (
        lambda root: [changed(r, "tokens.injection_left_neighbor_id", 5)(root) for r in ("av", "ar")],
        "injection_left_neighbor_id is",
    ),
    "right neighbour": (
        lambda root: [changed(r, "tokens.injection_right_neighbor_id", 5)(root) for r in ("av", "ar")],
        "injection_right_neighbor_id is",
    ),
    "neighbours differ": (changed("av", "tokens.injection_left_neighbor_id", 5), "do not belong together"),
    "long marker": (
        lambda root: [changed(r, "tokens.injection_char", "xy")(root) for r in ("av", "ar")],
        "marker 'xy' is 2 tokens in this tokenizer",
    ),
    "suffix": (changed("ar", "tokens.critic_suffix_ids", [1, 2]), "critic_suffix_ids is ["),
    "bad suffix": (changed("ar", "tokens.critic_suffix_ids", [1, -2]), "suffix_ids is -2, not a token id"),
    "vocabularies": (other_words, "have different vocabularies"),
    "layer": (
        lambda root: [
            changed("ar", "critic.extraction_layer_index", 1)(root),
            *(changed(r, "extraction_layer_index", 1)(root) for r in ("av", "ar")),
        ],
        "has 3 blocks but its sidecar says layer 1: an AR has 2",
    ),
    "layers": (changed("ar", "critic.extraction_layer_index", 1), "has different layers"),
    "layers differ": (changed("av", "extraction_layer_index", 1), "layer_index is 1 in the first and 2"),
    "architecture": (config("av", rms_norm_eps=1e-3), "architectures: norm_eps is 0.001 in the first"),
    "no base": (changed("av", "base_checkpoint", None), "names no base_checkpoint"),
    "no target": (changed("av", "base_checkpoint", "no/such/target"), "no/such/target does not exist"),
    "no head": (lambda root: (root / "ar" / "value_head.safetensors").unlink(), "is missing or damaged"),
    "head shape": (
        weight("ar", "value_head.safetensors", "weight", lambda t: t[:5].clone()),
        "not one weight of shape (32, 32)",
    ),
    "head not finite": (weight("ar", "value_head.safetensors", "weight", nan), "weight is not finite"),
    "block not finite": (
        weight("ar", "model.safetensors", "model.layers.1.mlp.up_proj.weight", nan),
        "model.layers.1.mlp.up_proj.weight is not finite",
    ),
    "block shape": (
        weight("ar", "model.safetensors", "model.layers.1.mlp.up_proj.weight", lambda t: t[:5].clone()),
        "has shape (5, 32)",
    ),
    "shard": (
        lambda root: sorted((root / "av").glob("model-*.safetensors"))[1].write_bytes(b"{}"),
        "is missing or damaged",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_interchange_refuses(sound, tmp_path, case):
    change, message = REFUSED[case]
    for role in ("av", "ar"):
        shutil.copytree(sound / role, tmp_path / role)
    change(tmp_path)
    found = refusal(import_pair.import_pair, tmp_path / "av", tmp_path / "ar", tmp_path / "out")
    assert message in found
    assert str(tmp_path) in found or str(sound) in found or case == "no target"
    assert not (tmp_path / "out" / "nla_meta.yaml").exists()


def test_interchange_export_refuses(finished, mended, tmp_path):
    """Norm-matched injection and a learned affine map have no place in the format, unless that does
    nothing; nor do NaNs."""
    meta = bundle.read_sidecar(mended)
    cfg = bundle.LMConfig.of_plain(meta["lm"])
    found = bundle.read_trees(mended, meta, cfg)
    tok = bundle.tok_lib.load(mended / "tokenizer")
    meta["roles"]["affine"] = True
    for name, shift in (("identity", 0.0), ("learned", 0.25)):
        av = {**found["av"], "inject": {"w": jnp.eye(32), "b": jnp.full(32, shift)}}
        bundle.save(tmp_path / name, meta, av, found["ar"], tok)
    import_pair.export_pair(tmp_path / "identity", tmp_path / "out")
    message = refusal(import_pair.export_pair, tmp_path / "learned", tmp_path / "other")
    assert "learned affine map" in message and not (tmp_path / "other").exists()

    meta["roles"]["affine"] = False
    meta["extraction"]["injection"] = "norm_matched"
    bundle.save(tmp_path / "matched", meta, found["av"], found["ar"], tok)
    message = refusal(import_pair.export_pair, tmp_path / "matched", tmp_path / "other")
    assert "norm_matched injection" in message and not (tmp_path / "other").exists()
    meta["extraction"]["injection"] = "replace"

    broken = copy.copy(found)
    broken["ar"] = {**found["ar"], "head": found["ar"]["head"].at[3, 4].set(jnp.nan)}
    bundle.save(tmp_path / "nan", meta, found["av"], found["ar"], tok)
    checkpoint.save_tree(tmp_path / "nan" / "params", broken)
    said = bundle.read_sidecar(tmp_path / "nan")
    said["files"] = {}
    (tmp_path / "nan" / "nla_meta.yaml").write_text(yaml.safe_dump(said, allow_unicode=True), "utf-8")
    message = refusal(import_pair.export_pair, tmp_path / "nan", tmp_path / "third")
    assert "value_head.safetensors: weight is not finite" in message
    assert "dtype 'float16'" in refusal(import_pair.export_pair, mended, tmp_path / "fourth", dtype="float16")
    other = world.write_target(tmp_path / "target", seed=1)
    lora = finished / "run" / "bundle"
    message = refusal(import_pair.export_pair, lora, tmp_path / "fifth", target=str(other))
    assert "was made for other weights" in message


def test_interchange_tied_and_untied(sound, tmp_path):
    """An untied AV of a tied target is accepted where its head is the embedding, and else refused."""
    target = tmp_path / "target"
    shutil.copytree(sound / "target", target)
    tensors = load_file(target / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config("target", tie_word_embeddings=True)(tmp_path)
    call = (import_pair.import_pair, sound / "av", sound / "ar", tmp_path / "bundle")
    assert "a separate head" in refusal(*call, target=str(target))

    cfg, params = weights.load(sound / "av")
    for name, head in (("same", params["embed"].T), ("gone", None)):
        shutil.copytree(sound / "av", tmp_path / name)
        for path in (tmp_path / name).glob("model*"):
            path.unlink()
        tree = {k: v for k, v in params.items() if k != "lm_head"} | (
            {} if head is None else {"lm_head": head}
        )
        weights.save_hf(tmp_path / name, dataclasses.replace(cfg, tied=head is None), tree)
    tied = import_pair.import_pair(tmp_path / "same", sound / "ar", tmp_path / "tied", target=str(target))
    assert "av/params/lm_head" not in trees(tied)
    untied = import_pair.import_pair(tmp_path / "gone", sound / "ar", tmp_path / "untied")
    found = trees(untied)
    np.testing.assert_array_equal(found["av/params/lm_head"], found["av/params/embed"].T)


# Blocks and files


def test_interchange_blocks_strict_and_tolerant():
    tokens = {"injection_char": "x", "injection_token_id": 1, "injection_left_neighbor_id": 2,
              "injection_right_neighbor_id": 3}
    raw = {"tokens": {**tokens, "more": 1}, "prompt_templates": {"actor": "{injection_char}", "more": "x"}}
    read = sidecar_common.read_tokens("f", raw, strict=False)
    assert sidecar_common.write_tokens(read) == {**tokens, "critic_suffix_ids": None}
    bare = sidecar_common.read_tokens("f", {"tokens": {**tokens, "critic_suffix_ids": []}}, strict=True)
    assert bare.critic_suffix_ids == () and sidecar_common.write_tokens(bare)["critic_suffix_ids"] == []
    assert "f: tokens: unknown key 'more'" in refusal(sidecar_common.read_tokens, "f", raw, strict=True)
    found = sidecar_common.read_templates("f", raw, strict=False)
    assert (found.av, found.ar) == ("{injection_char}", None)
    assert sidecar_common.write_templates(found, ("actor", "critic")) == {"actor": "{injection_char}"}
    assert "unknown key 'more'" in refusal(sidecar_common.read_templates, "f", raw, strict=True)
    raw["tokens"] = {**tokens, "injection_token_id": True}
    assert "injection_token_id is True, not int" in refusal(sidecar_common.read_tokens, "f", raw, strict=True)


@pytest.mark.parametrize("text", ["{explanation}", "a {{b}} {explanation} }}{{", "{{{explanation}}}"])
def test_interchange_templates_render_alike(text):
    ours = sidecar_common.to_our_template("f", "ar", text)
    assert ours.replace("{explanation}", "words") == text.format(explanation="words")
    assert sidecar_common.to_official_template("ar", ours) == text


@pytest.mark.parametrize("value,want", [(3, 3.0), (2.5, 2.5), (None, None), ("sqrt_d_model", 8.0)])
def test_interchange_scales(value, want):
    assert sidecar_common.read_scale("f", {"s": value}, "s", 64) == want
    assert sidecar_common.read_scale("f", {}, "s", 64, absent=value) == want


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "raw", True, [1], 10**400])
def test_interchange_scales_refused(value):
    assert "f: s is" in refusal(sidecar_common.read_scale, "f", {"s": value}, "s", 64)


def test_interchange_comparison_names_both():
    a, b = {"x": 1, "y": 2.0, "z": None}, {"x": 1, "y": 2.0 + 1e-9, "z": 5}
    sidecar_common.check_same("f", a, "g", b)
    message = refusal(sidecar_common.check_same, "f", a, "g", b | {"x": 2})
    assert message == "f and g do not belong together: x is 1 in the first and 2 in the second"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_interchange_fuzzed_sidecars(data):
    """Any value in any place: a sidecar or one clear line."""
    meta = released.sidecar(tiny_tokenizer(), "ar", 2, 2, 6.0, "target")
    block = meta
    for _ in range(data.draw(st.integers(0, 1))):
        inner = [v for v in block.values() if isinstance(v, dict)]
        block = data.draw(st.sampled_from(inner)) if inner else block
    block[data.draw(st.sampled_from([*block, "critic", "new"]))] = data.draw(PLAIN)
    try:
        assert model_sidecar.parse("f", meta).role in ("av", "ar")
    except UserError as e:
        assert str(e).startswith("f") and "\n" not in str(e)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.text(alphabet="abc:{}[]&*!-|>'\"#%@`\n 0123.", max_size=60))
def test_interchange_fuzzed_yaml(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text, "utf-8")
    try:
        assert isinstance(sidecar_common.read(path), dict)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)


_TOKENIZER = []


def tiny_tokenizer():
    if not _TOKENIZER:
        _TOKENIZER.append(tiny.tokenizer())
    return _TOKENIZER[0]


def test_interchange_sharded_files(tmp_path):
    """Several files with an index, which transformers and we read alike; a lone file gives way."""
    cfg = tiny.lm(tied=False)
    params = jax.tree.map(np.asarray, tiny.params(cfg))
    weights.save_hf(tmp_path, cfg, params)
    weights.save_hf(tmp_path, cfg, params, shard_bytes=30_000)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(p.stat().st_size < 50_000 for p in tmp_path.glob("*.safetensors"))
    assert_equal(tiny.flat(weights.load(tmp_path)[1]), tiny.flat(params))
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(net.lm_head.weight.detach().numpy().T, params["lm_head"])
    broken = params_lib.nest({**tiny.flat(params), "final_norm": np.full(32, np.inf, np.float32)})
    assert "model.norm.weight is not finite" in refusal(weights.save_hf, tmp_path / "new", cfg, broken)
