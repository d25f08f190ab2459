"""A released pair is opened where it is: from a directory, from two, from a hub; on any number of devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nla_jax import api, bundle
from nla_jax.errors import UserError
from nla_jax.interchange import find_bundle, import_pair
from nla_jax.sharding import inference
from nla_jax.view.explorer import bundles
from tests.helpers import hub_server, released, tiny, world

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """ROOT/nla-L2-av, ROOT/nla-L2-ar and ROOT/target of the release."""
    root = released.write(tmp_path_factory.mktemp("pair"), "qwen2")
    for role in ("av", "ar"):
        (root / role).rename(root / f"nla-L2-{role}")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLA_CACHE", str(tmp_path_factory.getbasetemp() / "pairs_cache"))


def refusal(call, *args, **kw) -> str:
    with pytest.raises(UserError) as e:
        call(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_each_way_to_name_a_pair(pair, tmp_path):
    av, ar = pair / "nla-L2-av", pair / "nla-L2-ar"
    ways = [pair, av, ar, f"{av},{ar}", [av, ar], (str(av), str(ar))]
    (found,) = {find_bundle.find(way) for way in ways}
    meta = bundle.read_sidecar(found)
    assert bundle.pair_of(meta) == (av, ar)
    assert (meta["dtype"], meta["max_new_tokens"], meta["stage"]) == ("bfloat16", 150, "imported")
    assert [p.name for p in found.iterdir()] == [bundle.SIDECAR]  # no weights are copied
    before = (found / bundle.SIDECAR).stat().st_mtime_ns
    assert find_bundle.find(pair) == found and (found / bundle.SIDECAR).stat().st_mtime_ns == before
    copy = shutil.copytree(pair, tmp_path / "copy")
    assert find_bundle.find(copy) != found


def test_what_is_no_pair_is_refused(pair, tmp_path, finished):
    av, ar = pair / "nla-L2-av", pair / "nla-L2-ar"
    assert find_bundle.find(finished / "run") == finished / "run" / "bundle"
    assert find_bundle.find(finished / "run" / "bundle") == finished / "run" / "bundle"
    assert f"{ar} is the AR of a released pair; give AV first" in refusal(find_bundle.find, [ar, av])
    assert "target is no AV or AR" in refusal(find_bundle.find, [av, pair / "target"])
    assert "3 places for a pair" in refusal(find_bundle.find, [av, ar, ar])
    alone = tmp_path / "alone"
    shutil.copytree(av, alone / "one")
    assert "is the AV of a pair; give both, as AV,AR" in refusal(find_bundle.find, alone / "one")
    shutil.copytree(av, alone / "two")
    shutil.copytree(ar, alone / "three")
    assert "contains AV one, AV two, AR three: give one AV" in refusal(find_bundle.find, alone)
    assert bundle.pair_of(bundle.read_sidecar(find_bundle.find(alone / "two")))[1] == alone / "three"
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert "is a PEFT adapter without nla_meta.yaml, which has the marker" in refusal(
        api.load, tmp_path / "peft")
    assert "not an NLA bundle" in refusal(api.load, pair / "target")
    assert "there is no such directory, and as a Hub id: cannot get nobody/nothing" in refusal(
        api.load, "nobody/nothing")


def test_a_target_that_is_not_at_hand_is_named(pair, tmp_path):
    root = tmp_path / "moved"
    for role in ("av", "ar"):
        shutil.copytree(pair / f"nla-L2-{role}", root / role)
        meta = released.read_sidecar(root / role)
        released.write_sidecar(root / role, meta | {"base_checkpoint": "some/target"})
    message = refusal(find_bundle.find, root)
    assert "its sidecar says that it explains the model some/target, which is not at hand" in message
    assert message.endswith("give that model's directory with --target")
    found = find_bundle.find(root, target=str(pair / "target"))
    assert bundle.read_sidecar(found)["base_checkpoint"] == str(pair / "target")


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_an_opened_pair_has_the_weights_of_the_imported_one(family, pair, tmp_path, all_devices):
    root = pair if family == "qwen2" else released.write(tmp_path, family)
    places = [next(root.glob(f"*{role}")) for role in ("av", "ar")]
    imported = import_pair.import_pair(*places, tmp_path / "bundle", dtype="float32")
    for dtype in ("float32", "bfloat16"):
        a, b = (bundle.load(where, dtype=dtype) for where in (imported, find_bundle.find(places)))
        assert a.spec == b.spec and a.dtype == b.dtype == dtype and a.spec.dtype == dtype
        assert b.base["embed"].sharding.mesh.size == len(jax.devices())
        for x, y in ((a.av, b.av), (a.ar, b.ar), (a.base, b.base)):
            tiny.assert_trees_close(x, y)
        assert b.av["params"]["embed"].dtype == dtype and b.ar["head"].dtype == "float32"
    part = bundle.load(imported, whole_target=False).base
    assert part.keys() == {"embed", "blocks"} and len(part["blocks"]["wq"]) == a.spec.layer + 1


def answers(nla) -> dict:
    h = tiny.activations(5)
    ids, *_ = nla.runner.write(h, jax.random.key(1), temperature=1.0, max_new=12)
    read = nla.reconstruct(["the sea", "of an old tale"])
    return {"ids": ids, "read": read, "h": nla.capture("an old tale")}


def test_any_number_of_devices_gives_the_same_words(pair):
    want = answers(api.load(pair, dtype="float32", mesh=tiny.mesh(1, 1, 1)))
    for sizes in ((1, 2, 2), (2, 2, 2)):
        nla = api.load(pair, dtype="float32", mesh=tiny.mesh(*sizes))
        got = answers(nla)
        assert nla.mesh.size == np.prod(sizes)
        np.testing.assert_array_equal(got["ids"], want["ids"])
        for name in ("read", "h"):
            assert tiny.relative(got[name], want[name]) < 1e-4


def test_int8_is_near_bfloat16_on_any_mesh(pair):
    """Weights have 255 levels, on one device and on eight alike."""
    wide, one, many = (api.load(pair, dtype=dtype, mesh=tiny.mesh(*sizes)) for dtype, sizes in (
        ("bfloat16", (1, 1, 1)), ("int8", (1, 1, 1)), ("int8", (2, 2, 2))))
    assert one.dtype == "int8" and one.spec.dtype == "bfloat16"
    tiny.assert_trees_close(one.av, many.av)
    size = lambda nla: sum(a.nbytes for a in jax.tree.leaves(nla.av))
    assert size(one) < 0.75 * size(wide)  # matrices are half, norms and scales are not
    a, b, c = map(answers, (wide, one, many))
    for name in ("read", "h"):
        assert tiny.relative(b[name], a[name]) < 0.15
        assert tiny.relative(c[name], b[name]) < 0.05
    assert b["ids"].shape == c["ids"].shape


def test_every_command_takes_a_pair(finished, tmp_path, capsys, monkeypatch):
    """A bundle of adapters, exported as a pair: it says and scores the same, and goes back and forth."""
    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    own, out = finished / "run" / "bundle", tmp_path / "pair"
    assert world.nla("export", "--bundle", own, "--out", out) == 0
    capsys.readouterr()
    said = []
    for where in (own, out, out / "ar"):
        assert world.nla("explain", "--bundle", where, "--text", "an old tale", "--tokens=-2:", "--json",
                         "--dtype", "float32") == 0
        said.append(json.loads(capsys.readouterr().out))
    for report in said[1:]:
        assert [r["explanation"] for r in report] == [r["explanation"] for r in said[0]]
        np.testing.assert_allclose([r["cos"] for r in report], [r["cos"] for r in said[0]], atol=1e-4)
    store, figures = finished / "run" / "data", []
    for where in (own, out):
        assert world.nla("evaluate", "--bundle", where, "--store", store, "--probes", "round_trip",
                         "--temperature", "0", "--dtype", "float32", "--json") == 0
        table = json.loads(capsys.readouterr().out)["heldout"]["figures"]
        figures.append({f["name"]: f["value"] for f in table})
    assert figures[1]["fve"] == pytest.approx(figures[0]["fve"], abs=1e-3)
    assert world.nla("evaluate", "--bundle", out) == 2
    assert "a released pair has no held-out rows; give a store of activations" in capsys.readouterr().err
    assert world.nla("export", "--bundle", out, "--out", tmp_path / "again") == 0
    assert world.nla("pack", "--bundle", out, "--out", tmp_path / "packed") == 0
    opened = bundle.load(tmp_path / "packed", dtype="float32")
    assert "pair" not in opened.meta and opened.av["params"]["embed"].dtype == "float32"
    again = bundle.load(find_bundle.find(tmp_path / "again"), dtype="float32")
    tiny.assert_trees_close(again.av, bundle.load(find_bundle.find(out), dtype="float32").av)
    side = bundles.open_sides(find_bundle.find(out), dtype="float32")["a"]
    h = np.asarray(side.nla.capture("an old tale"))[-1:]
    *_, ((stream,), _) = bundles.stream_answers(side, h, [0], 0.0)
    (greedy,) = side.nla.runner.round_trip(h, jax.random.key(0), temperature=0.0,
                                           max_new=side.nla.meta["max_new_tokens"]).responses
    assert stream == greedy


HUB = """
import sys
from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import find_bundle
for where in sys.argv[2:]:
    name, _, revision = where.partition("@")
    try:
        found = find_bundle.find(name, target=sys.argv[1], revision=revision)
        print(*(p.parent.name for p in bundle.pair_of(bundle.read_sidecar(found)) or [found]))
    except UserError as e:
        print("refused:", e)
"""


def test_hub_ids(pair, tmp_path):
    """The id of AV or AR, of a repository with both; with a revision; and what is not there."""
    org = tmp_path / "hub" / "org"
    for role in ("av", "ar"):
        shutil.copytree(pair / f"nla-L2-{role}", org / f"nla-L2-{role}")
        shutil.copytree(pair / f"nla-L2-{role}", org / "both" / role)
    shutil.copytree(pair / "nla-L2-av", org / "lonely")
    with hub_server.serve(tmp_path / "hub", ("main", "v2")) as (address, asked):
        env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                            "NLA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT),
                            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        names = ("org/nla-L2-av", "org/nla-L2-ar@v2", "org/both", "org/lonely", "org/nla-L2-av@v9",
                 "org/none")
        done = subprocess.run([sys.executable, "-c", HUB, str(pair / "target"), *names], env=env, text=True,
                              capture_output=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stderr[-2000:]
    commits = {(n, r): hub_server.commit(f"org/nla-L2-{n}", r) for n in ("av", "ar") for r in ("main", "v2")}
    assert lines[0] == "snapshots snapshots" and lines[1] == "snapshots snapshots"
    assert lines[2] == f"{hub_server.commit('org/both', 'main')} {hub_server.commit('org/both', 'main')}"
    assert "org/lonely is the AV of a pair; give both, as AV,AR: its name does not say" in lines[3]
    assert "cannot get org/nla-L2-av at v9 from the Hugging Face Hub" in lines[4]
    assert "org/none: there is no such directory, and as a Hub id: cannot get org/none" in lines[5]
    fetched = {p.name for p in (tmp_path / "home" / "hub").glob("models--org--nla-L2-*/snapshots/*")}
    assert fetched >= set(commits.values())
    assert any(path.endswith("model.safetensors.index.json") for path in asked)


def test_sizes_of_the_mesh(all_devices):
    """As much data parallelism as memory allows; then the least tensor parallelism."""
    GB = 10**9
    assert inference.choose_sizes(8, 1 * GB, GB // 2, 16 * GB) == (8, 1, 1)
    assert inference.choose_sizes(8, 42 * GB, 15 * GB, 16 * GB) == (1, 1, 8)  # 7B on v5e
    assert inference.choose_sizes(8, 42 * GB, 15 * GB, 32 * GB) == (2, 1, 4)
    assert inference.choose_sizes(8, 42 * GB, 15 * GB, 80 * GB) == (4, 2, 1)
    assert inference.choose_sizes(4, 400 * GB, 140 * GB, 16 * GB) == (1, 1, 4)  # it does not fit
    assert inference.make_mesh(1, 1, jax.devices()[:1]) is None
    assert inference.make_mesh(1, 1).shape == {"data": 8, "fsdp": 1, "tensor": 1}
