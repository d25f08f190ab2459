"""Packed bundles: made of any bundle by one command, opened like one, refused like one, and shipped."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml

import nla_jax
from nla_jax import bundle, cli
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.interchange import import_pair, model_card, pack
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.files import packed
from nla_jax.pipeline import held_out_rows, stages
from nla_jax.view.explorer import bundles
from tests.helpers import tiny, world

pytestmark = pytest.mark.usefixtures("quick", "no_cache")
TEXT = "an old town"


@pytest.fixture
def no_cache(monkeypatch):
    """Commands leave the compilation cache of this process as it is."""
    monkeypatch.setattr(cli, "_use_cache", lambda: None)


@pytest.fixture(scope="module")
def small(finished, quick, tmp_path_factory):
    """The bundle of `finished`, packed."""
    out = tmp_path_factory.mktemp("packed") / "small"
    return pack.pack(finished / "run" / "bundle", out, made_by="nla train --config mine.py --workdir mine")


@pytest.fixture
def copy(small, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(small, tmp_path / "copy")
    return tmp_path / "copy"


def trees(directory) -> dict:
    meta = bundle.read_sidecar(directory)
    return tiny.flat(bundle.read_trees(directory, meta, bundle.LMConfig.of_plain(meta["lm"])))


def rounded(flat: dict) -> dict:
    return {k: np.asarray(jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32)) for k, a in flat.items()}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_packed_parameters_are_those_of_the_bundle_in_bfloat16(finished, small):
    was = trees(finished / "run" / "bundle")
    assert_equal(trees(small), rounded(was))
    assert any(not np.array_equal(a, rounded(was)[k]) for k, a in was.items())
    assert {p.name for p in small.iterdir()} == {"adapters.safetensors", "nla_meta.yaml", "README.md"}
    stored = safetensors.numpy.load_file(small / "adapters.safetensors")
    assert {a.dtype.name for a in stored.values()} == {"bfloat16"} and stored.keys() == was.keys()
    assert (small / "adapters.safetensors").stat().st_size < 3 * sum(a.size for a in was.values())
    meta = bundle.read_sidecar(small)
    opened = tiny.flat(jax.tree.map(lambda a: a.whole(), bundle.open_trees(small, meta, world.target()[0])))
    assert_equal(opened, rounded(was))


def test_packed_explains_as_a_bundle_with_rounded_parameters(finished, small, tmp_path):
    made = bundle.load(finished / "run" / "bundle")
    as_packed = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
    av, ar = jax.tree.map(as_packed, (made.av, made.ar))
    meta = {k: v for k, v in made.meta.items() if k != "files"}
    bundle.save(tmp_path / "rounded", meta, av, ar, made.tok)
    first, second = (nla_jax.load(d, batch=8) for d in (tmp_path / "rounded", small))
    assert first.spec == second.spec
    key = jax.random.key(4)
    reports = [n.round_trip(TEXT, key=key, samples=3) for n in (first, second)]
    assert reports[0] == reports[1] and len({r.explanation for r in reports[0]}) > 2


def test_packing_again_changes_nothing_and_keeps_the_figures(small, copy, tmp_path):
    once = pack.pack(small, tmp_path / "again")
    assert_equal(trees(once), trees(small))
    pack.pack(copy, copy)  # onto itself
    assert_equal(trees(copy), trees(small))
    assert bundle.read_sidecar(copy)["run"] == bundle.read_sidecar(small)["run"]
    assert (copy / "README.md").read_text() == (once / "README.md").read_text()


def test_a_frozen_ar_is_packed_as_nothing(finished, tmp_path):
    frozen = world.frozen_bundle(finished, tmp_path / "bundle")
    out = pack.pack(frozen, tmp_path / "out")
    assert all(k.startswith("av/") for k in safetensors.numpy.load_file(out / packed.FILE))
    one, two = nla_jax.load(frozen, batch=8), nla_jax.load(out, batch=8)
    assert one.ar == two.ar == {}
    np.testing.assert_array_equal(one.reconstruct(["ab", "of"]), two.reconstruct(["ab", "of"]))
    assert "The reconstructor (AR) is the frozen target itself" in (out / "README.md").read_text("utf-8")


def test_the_tokenizer_goes_along_where_the_targets_own_renders_other_prompts(finished, tmp_path):
    shutil.copytree(finished / "run" / "bundle", tmp_path / "bundle")
    place, target = tmp_path / "bundle" / "tokenizer", finished / "target"
    tok = tok_lib.load(place)
    tok.chat_template = "Answer. " + tok.chat_template
    tok_lib.save(tok, place)
    out = pack.pack(tmp_path / "bundle", tmp_path / "out")
    names = [n for n in bundle.read_sidecar(out)["files"] if n.startswith("tokenizer/")]
    assert "tokenizer/tokenizer.json" in names
    found = nla_jax.load(out, batch=8)
    assert found.tokenizer.chat_template == tok.chat_template != tok_lib.load(target).chat_template
    assert found.spec == bundle.load(tmp_path / "bundle").spec
    # Packed again, it is still there; without it, the bundle is refused.
    again = bundle.read_sidecar(pack.pack(out, out))
    assert again["files"] == bundle.read_sidecar(out)["files"] and set(names) < set(again["files"])
    (out / names[0]).unlink()
    with pytest.raises(UserError, match=f"{names[0]}: no bytes instead of"):
        bundle.load(out)


# --- everything else that takes a bundle ----------------------------------------------------------


def test_packed_bundles_export_and_import(small, finished, tmp_path, capsys):
    assert world.nla("export", "--bundle", small, "--out", tmp_path / "pair") == 0
    out = import_pair.import_pair(tmp_path / "pair" / "av", tmp_path / "pair" / "ar", tmp_path / "again")
    texts = ["ab", "of the town"]
    one, two = (nla_jax.load(d, batch=8) for d in (small, out))
    np.testing.assert_allclose(one.reconstruct(texts), two.reconstruct(texts), rtol=1e-5, atol=1e-5)
    h = one.capture(TEXT)
    assert one.verbalize(h) == two.verbalize(h)


def test_packed_bundles_compare(small, finished):
    """Over one target in memory, with a bundle of the other form; figures come from the sidecar."""
    found = bundles.open_sides(finished / "run" / "bundle_warm", small)
    assert found["b"].nla.base is found["a"].nla.base
    assert found["b"].facts == {**bundles.facts(finished / "run" / "bundle", found["b"].nla.meta)}
    assert found["b"].facts["figures"].keys() == {"fve", "fve_shuffled", "fve_mean_direction"}


def test_a_run_begins_from_a_packed_bundle(small, finished, tmp_path):
    none = dict(steps=0)
    config = world.config(
        finished, layer=-1, av_template="", ar_template="", av={"rank": 0}, ar={"rank": 0}, init=str(small),
        lessons_ar=none, warm_av=none, warm_ar=dict(steps=1, lr=1e-7), rl=none,
    )
    stages.run(config, tmp_path / "run", source=finished / "run")
    was, now = trees(small), trees(tmp_path / "run" / "bundle")
    assert was.keys() == now.keys()
    for name, array in was.items():
        np.testing.assert_allclose(now[name], array, atol=0 if name.startswith("av/") else 1e-7)


# --- the one that ships ---------------------------------------------------------------------------


@pytest.fixture
def ships(small, tmp_path, monkeypatch):
    """The package ships `small`, in a directory that has nothing of its run beside it."""
    shutil.copytree(small, tmp_path / "nla_jax" / "shipped")
    monkeypatch.setattr(bundle, "SHIPPED", tmp_path / "nla_jax" / "shipped")
    monkeypatch.setenv("NLA_CACHE", str(tmp_path / "cache"))
    return bundle.SHIPPED


def test_the_shipped_bundle_is_the_default(ships, small, tmp_path, capsys):
    h = nla_jax.load(batch=8).capture(TEXT)
    np.testing.assert_array_equal(h, nla_jax.load(small, batch=8).capture(TEXT))
    assert capsys.readouterr().err == ""
    command = ("explain", "--text", TEXT, "--tokens=-1:", "--json")
    assert world.nla(*command) == 0
    out, err = capsys.readouterr()
    notice, line = err.splitlines()
    assert notice == f"no --bundle given: using the bundle that nla_jax ships, {ships}"
    assert world.nla(*command, "--bundle", small) == 0
    named = capsys.readouterr()
    assert (named.out, named.err) == (out, f"{line}\n") and line.startswith("running on 1 x cpu (cpu); ")
    assert world.nla("export", "--out", tmp_path / "pair") == 0
    assert "no --bundle given" in capsys.readouterr().err


def test_a_source_tree_without_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "SHIPPED", tmp_path / "shipped")
    with pytest.raises(UserError, match="ships no bundle"):
        nla_jax.load()
    for command in (("explain", "--text", TEXT), ("evaluate",), ("serve",), ("export", "--out", "pair")):
        assert world.nla(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"nla: {tmp_path / 'shipped'}: ") and "--bundle" in line and "nla pack" in line


def test_the_shipped_bundle_is_evaluated_on_rows_that_are_captured_once(ships, finished, tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ("evaluate", "--splits", "heldout,ood", "--probes", "round_trip", "--json", out)
    assert world.nla(*command) == 0
    assert "capture: " in capsys.readouterr().err
    place = held_out_rows.evaluation_dir(ships)
    assert place.parent == tmp_path / "cache" / "evaluated"
    run = finished / "run"
    for split in ("heldout", "ood"):
        was, now = (store.load_columns(d / "data", split) for d in (run, place))
        assert was["doc_id"] == now["doc_id"] and was["text"] == now["text"]
        np.testing.assert_allclose(now["h"], was["h"], rtol=1e-4, atol=1e-4)
    splits = store.read_meta(place / "data")["splits"]
    assert splits.keys() == {"warm", "heldout", "ood"}
    figures = json.loads(out.read_text("utf-8"))
    assert world.nla(*command) == 0
    assert "capture: " not in capsys.readouterr().err
    assert json.loads(out.read_text("utf-8")) == figures
    # The same figures as of the packed bundle on the run's own store.
    assert world.nla(*command, "--store", run / "data") == 0
    beside = json.loads(out.read_text("utf-8"))
    for split in figures:
        for a, b in zip(figures[split]["figures"], beside[split]["figures"], strict=True):
            assert a["value"] == pytest.approx(b["value"], abs=1e-3), a["name"]


def test_it_is_not_evaluated_on_texts_that_nobody_knows(ships, capsys):
    meta = bundle.read_sidecar(ships)
    meta["training"] = {}
    (ships / bundle.SIDECAR).write_text(yaml.safe_dump(meta, allow_unicode=True), "utf-8")
    assert world.nla("evaluate", "--probes", "form") == 2
    assert "give a store of activations with --store" in capsys.readouterr().err


# --- the card -------------------------------------------------------------------------------------


def test_the_card_has_every_figure_with_its_interval(finished, small):
    text = (small / "README.md").read_text("utf-8")
    summary = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    for key in ("warm_start", "rl"):
        for figures in summary[key].values():
            for f in figures:
                shown = f"{f['value']:.3f}"
                shown += f" [{f['low']:.3f}, {f['high']:.3f}]" if f["low"] is not None else ""
                (line,) = [x for x in text.split(f"| {f['name']} | ")[1:] if shown in x.split("\n")[0]][:1]
                assert f["asks"] in line.split("\n")[0]
    for stage, seconds in summary["seconds"].items():
        assert f"| {stage} | " in text and f"| {seconds:,.1f} |" in text
    said = ["nla train --config mine.py", "| `rl.max_new` | `16` |", summary["device"], "block 0"]
    said += ["it invents", "grounding table", "nla explain", f"`{finished / 'target'}`"]
    said += [model_card.NO_LICENCE]
    assert [s for s in said if s not in text] == []


def test_a_card_of_ones_own_and_a_bundle_without_a_run(finished, tmp_path):
    shutil.copytree(finished / "run" / "bundle", tmp_path / "alone" / "bundle")
    out = pack.pack(tmp_path / "alone" / "bundle", tmp_path / "out")
    assert "The bundle came without figures" in (out / "README.md").read_text("utf-8")
    (tmp_path / "mine.md").write_text("# Mine\n", "utf-8")
    pack.pack(tmp_path / "alone" / "bundle", out, own_card=tmp_path / "mine.md")
    assert (out / "README.md").read_text("utf-8") == "# Mine\n"
    # The figures of another run are not this bundle's.
    (tmp_path / "alone" / "summary.json").write_text(json.dumps({"seed": 99, "target": "x"}), "utf-8")
    assert "run" not in bundle.read_sidecar(pack.pack(tmp_path / "alone" / "bundle", out))


# --- what is refused ------------------------------------------------------------------------------


def test_damaged_files_are_refused(copy):
    path = copy / "adapters.safetensors"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    for content, message in (
        (whole[:1000], f"{path}: 1000 bytes instead of {len(whole)}"),
        (bytes(changed), f"{path}: its SHA-256 is not the one in the sidecar"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as e:
            nla_jax.load(copy)
        assert message in str(e.value)
    path.unlink()
    with pytest.raises(UserError, match="adapters.safetensors: no bytes instead of"):
        nla_jax.load(copy)


def test_another_target_or_tokenizer_is_refused(small, finished, tmp_path):
    other = world.write_target(tmp_path / "target", seed=1)
    with pytest.raises(UserError, match="was made for other weights"):
        nla_jax.load(small, str(other))
    with pytest.raises(UserError, match="was made for other weights"):
        pack.pack(small, tmp_path / "out", target=str(other))
    # The same weights with another chat template: the prompts are those that AV was trained with.
    shutil.copytree(finished / "target", tmp_path / "same")
    tok = tok_lib.load(tmp_path / "same")
    tok.chat_template = tok.chat_template.replace("{{ m.content }}", "{{ m.content }}.")
    tok_lib.save(tok, tmp_path / "same")
    assert nla_jax.load(small, str(tmp_path / "same")).spec == nla_jax.load(small).spec
    # With a merge fewer, words are other tokens.
    path = tmp_path / "same" / "tokenizer.json"
    fewer = json.loads(path.read_text("utf-8"))
    fewer["model"]["merges"].remove(["summar", "y"])
    path.write_text(json.dumps(fewer), "utf-8")
    with pytest.raises(UserError, match="restore the bundle's tokenizer directory, or the target's"):
        nla_jax.load(small, str(tmp_path / "same"))


def test_a_file_of_another_bundle_is_refused(copy):
    arrays = safetensors.numpy.load_file(copy / packed.FILE)
    arrays["av/more"] = arrays.pop(sorted(arrays)[0])
    safetensors.numpy.save_file(arrays, copy / packed.FILE)
    meta = bundle.read_sidecar(copy)
    meta["files"][packed.FILE] = packed.describe(copy / packed.FILE)
    (copy / bundle.SIDECAR).write_text(yaml.safe_dump(meta, allow_unicode=True), "utf-8")
    with pytest.raises(UserError, match="absent"):
        nla_jax.load(copy)


def test_packing_overwrites_only_what_it_made(finished, small, copy, tmp_path):
    run, full = finished / "run", tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine", "utf-8")
    (tmp_path / "file").write_text("mine", "utf-8")
    shutil.copytree(run / "bundle", tmp_path / "bundle")
    for out in (full, tmp_path / "file", tmp_path / "bundle"):
        with pytest.raises(UserError, match="exists and is not a packed bundle"):
            pack.pack(run / "bundle_warm", out)
    assert (full / "notes.txt").read_text("utf-8") == "mine" and bundle.load(tmp_path / "bundle")
    with pytest.raises(UserError, match="there is no such card file"):
        pack.pack(run / "bundle", tmp_path / "new", own_card=tmp_path / "none.md")
    (tmp_path / "empty").mkdir()
    for out in (copy, tmp_path / "empty"):  # and where a killed one left no sidecar
        (copy / "nla_meta.yaml").unlink(missing_ok=True)
        assert_equal(trees(pack.pack(run / "bundle_warm", out)), rounded(trees(run / "bundle_warm")))
    with pytest.raises(UserError, match="not an NLA bundle"):
        pack.pack(tmp_path / "none", tmp_path / "new")
    assert not (tmp_path / "new").exists()
