"""Paths of any name: `~`, several spellings of one place, names that are patterns, and digests of files."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.data import corpora, store, store_writer, text_files
from nla_jax.errors import UserError
from nla_jax.pipeline import experiment_files, run_directory
from nla_jax.util import checkpoint, paths

# Characters of patterns, templates, format strings, URIs and other systems' paths.
ODD = ["sweep[lr=1]", "a\\b", "*", "**", "{seed} 100%", "%41?x=1", "\u00fcn\u00ef \u4f60", "[a]\\*{b}~"]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_home_directory_stands_for_the_tilde_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for found in (paths.path("~/x"), paths.absolute("~/x"), paths.local_copy("~/x"), paths.path(Path("~/x"))):
        assert found == tmp_path / "x"
    with paths.upload_after("~/x") as place:
        assert place == tmp_path / "x"
    assert paths.path("a/~/x") == Path("a/~/x")
    (tmp_path / "c.py").write_text("from nla_jax import configs\nget_config = configs.default\n", "utf-8")
    assert experiment_files.load_config("~/c.py", []).seed == 0


def test_one_place_in_several_spellings(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    for other in ("x", "../here/x", "./x", "~/here/x", str(tmp_path / "link" / "x")):
        assert paths.same_place(str(tmp_path / "here" / "x"), other), other
    assert paths.same_place("x", "../here/x", str(tmp_path / "here"))
    assert not paths.same_place("x", str(tmp_path / "here" / "x"), str(tmp_path / "elsewhere"))
    assert not paths.same_place("x", "y") and not paths.same_place("", "x") and paths.same_place("", "")
    assert paths.same_place("gs://a/b", "gs://a/b") and not paths.same_place("gs://a/b", "gs://a/c")


@pytest.mark.parametrize("a, b, same", [
    ("file:x.jsonl", "file:{here}/x.jsonl", True),
    ("file:x.jsonl?limit=3", "file:./x.jsonl?limit=3", True),
    ("file:x.jsonl?limit=3", "file:x.jsonl", False),
    ("chat:file:x.jsonl", "chat:file:{here}/x.jsonl", True),
    ("chat:file:x.jsonl", "file:x.jsonl", False),
    ("mix:0.7*news,0.3*file:x.jsonl", "mix:0.7*news,0.3*file:{here}/x.jsonl", True),
    ("mix:0.7*news,0.3*file:x.jsonl", "mix:0.6*news,0.4*file:x.jsonl", False),
    ("file:*.jsonl", "file:{here}/*.jsonl", True),
    ("news", "news", True), ("news", "wikipedia", False), ("news", "", False),
    ("hf:a/b", "hf:a/c", False),
])
def test_one_corpus_in_several_spellings(monkeypatch, tmp_path, a, b, same):
    monkeypatch.chdir(tmp_path)
    assert corpora.is_same(a, b.format(here=tmp_path)) == same
    assert run_directory.is_same_value("data.corpus", a, b.format(here=tmp_path)) == same


def test_only_settings_that_are_paths_have_spellings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_directory.is_same_value("data.explanations", "e.jsonl", str(tmp_path / "e.jsonl"))
    assert not run_directory.is_same_value("marker", "e.jsonl", str(tmp_path / "e.jsonl"))


@pytest.mark.parametrize("name", [*ODD, "plain"])
def test_what_is_saved_under_any_name_is_restored_and_after_a_move(tmp_path, name):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(7)}
    run = tmp_path / name
    checkpoint.save_tree(run / "params" / "warm_av", tree)
    manager = checkpoint.manager(run / "checkpoints" / "rl")
    checkpoint.save(manager, 3, tree)
    manager.wait_until_finished()
    manager.close()
    assert sorted(os.listdir(run)) == ["checkpoints", "params"] and os.listdir(tmp_path) == [name]
    moved = tmp_path / f"{name} moved"
    shutil.move(run, moved)
    like = {"a": jnp.zeros((2, 3)), "n": jnp.int32(0)}
    found = checkpoint.load_tree(moved / "params" / "warm_av", like)
    manager = checkpoint.manager(moved / "checkpoints" / "rl")
    step, again = checkpoint.restore_latest(manager, like)
    manager.close()
    assert step == 3
    for one in (found, again):
        np.testing.assert_array_equal(one["a"], tree["a"])
        assert int(one["n"]) == 7
    with pytest.raises(UserError) as told:  # with the name that the user knows
        checkpoint.load_tree(moved / "params" / "warm_av", {"a": jnp.zeros((2, 4)), "n": jnp.int32(0)})
    assert str(moved / "params" / "warm_av") in str(told.value)


@pytest.mark.parametrize("name", ODD)
def test_a_store_under_any_name_is_written_and_read(tmp_path, name):
    h = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    row = {"position": 1, "n_tokens": 2, "next_text": "", "explanation": ""}
    rows = [{**row, "doc_id": f"d{i}", "text": f"t{i}", "h": h[i]} for i in range(3)]
    writer = store_writer.Writer(tmp_path / name / "data", 4, {"target": "t"})
    writer.write_shard("warm", 0, 1, rows)
    writer.commit()
    assert os.listdir(tmp_path) == [name]
    moved = tmp_path / f"{name} moved"
    shutil.move(tmp_path / name, moved)
    np.testing.assert_array_equal(store.load_columns(moved / "data", "warm")["h"], h)
    assert store.open_store(moved / "data", "warm")[2]["text"] == "t2"


@pytest.mark.parametrize("name", ["c[1].jsonl", "d[2]/c.jsonl", "*.jsonl", "a\\b.jsonl", "what?.jsonl"])
def test_a_corpus_of_any_name_that_exists_is_read_as_that_file(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for other in ("c1.jsonl", "d2/c.jsonl", "ab.jsonl", "whatx.jsonl"):  # that the pattern would match
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text('{"text": "another"}\n', "utf-8")
    path.write_text('{"text": "this one"}\n', "utf-8")
    assert [d.text for d in corpora.open_corpus(f"file:{path}")] == ["this one"]
    assert text_files.matching_files(f"{path.parent}/{path.name}") == [str(path)]


def test_in_a_directory_of_any_name_patterns_are_patterns(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "d[1]").mkdir(exist_ok=True)
        (tmp_path / "d[1]" / name).write_text(f'{{"text": "{name}"}}\n', "utf-8")
    assert len(text_files.matching_files(f"{tmp_path}/d[1]/[ab].jsonl")) == 2
    assert len(text_files.matching_files(f"{tmp_path}/d[1]/*.jsonl")) == 2
    assert text_files.matching_files(f"{tmp_path}/d[1]/[c].jsonl") == []


def test_a_digest_sees_one_changed_matrix_in_a_large_file(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.truncate(paths.WHOLE + (5 << 20))  # zeros, which take no room
    before = paths.digest(path)
    with open(path, "r+b") as f:
        f.seek(30 << 20)
        f.write(bytes([1]) * (1 << 20))
    changed = paths.digest(path)
    assert changed != before
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert paths.digest(path) != changed


def test_a_digest_sees_every_byte_of_a_small_file(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"a" * 100_000)
    before = paths.digest(path)
    path.write_bytes(b"a" * 50_000 + b"b" + b"a" * 49_999)
    assert paths.digest(path) != before
