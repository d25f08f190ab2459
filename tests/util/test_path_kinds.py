"""What a directory is, by the names of its files, and what is said of one that was given for another."""

import json

import pytest

from nla_jax import bundle
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.util import path_kinds
from nla_jax.view import run_files


@pytest.fixture
def run(tmp_path):
    """A run with both bundles and a store; only the marks of these are there."""
    for name in ("bundle", "bundle_warm", "data"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"rl": {}, "data": {}, "layer": 1}))
    for name in ("bundle", "bundle_warm"):
        (tmp_path / "run" / name / "nla_meta.yaml").write_text("kind: nla_bundle\n")
    (tmp_path / "run" / "data" / "nla_store.json").write_text("{}")
    return tmp_path / "run"


def test_a_run_stands_for_its_bundle_and_its_store(run, capsys):
    assert path_kinds.bundle_in(run) == run / "bundle"
    assert path_kinds.store_in(f"{run}") == run / "data"
    assert capsys.readouterr().err.splitlines() == [
        f"{run} is a run: using its bundle, {run / 'bundle'}",
        f"{run} is a run: using its store, {run / 'data'}",
    ]
    for itself in (run / "bundle", run / "none", "org/name"):
        assert path_kinds.bundle_in(itself) == itself
    assert path_kinds.store_in(run / "data") == run / "data" and capsys.readouterr().err == ""
    # A warm start is no finished bundle: it is named, and not taken.
    (run / "bundle" / "nla_meta.yaml").unlink()
    assert path_kinds.bundle_in(run) == run
    with pytest.raises(UserError, match=f"this is a run; its warm start is {run / 'bundle_warm'}; its store"):
        bundle.read_sidecar(run)


def test_what_was_given_instead_is_named(run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, said in [
        (run / "bundle" / "params", f"the bundle is {run / 'bundle'}"),
        (run / "data", "this is a store of activations"),
        (model, "this is a model"),
        (tmp_path / "none", "it does not exist"),
        (empty, "give one that `nla train` wrote"),
    ]:
        with pytest.raises(UserError, match="not an NLA bundle") as e:
            bundle.read_sidecar(given)
        assert said in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(UserError, match="no activations here; this is a bundle; its run is"):
        store.read_meta(run / "bundle")
    with pytest.raises(UserError, match="no activations here; run `nla data extract` first"):
        store.read_meta(empty)
    with pytest.raises(UserError, match=f"no run here .* this is a bundle; its run is {run}"):
        run_files.read(run / "bundle")


def test_a_run_is_no_model_and_a_model_no_run(run, tmp_path):
    assert path_kinds.is_run(run) and not path_kinds.is_run(run / "bundle")
    (tmp_path / "config.json").write_text("[1, 2")
    assert not path_kinds.is_run(tmp_path)
