"""A run in a bucket: whatever takes a path takes gs://, against a stand-in (see `buckets`)."""

import json
import os
import shutil

import fsspec
import numpy as np
import pytest

import nla_jax
from nla_jax.data import corpora, store
from nla_jax.errors import UserError
from nla_jax.lm import weights
from nla_jax.pipeline import reuse, stages
from nla_jax.training import feeds
from nla_jax.util import metrics_log, paths
from tests.helpers import buckets, tiny, world

RUN = "gs://runs/mine"


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("here"))
        with buckets.stand_in(tmp_path_factory.mktemp("buckets")) as root:
            yield root
        assert os.listdir(".") == []  # nothing took gs:// for the name of a directory


def config(finished, **changes):
    """The run of `finished`, with everything that it reads in a bucket."""
    c = world.config(finished, target="gs://models/chatter", checkpoint_every=1)
    c.data.corpus, c.data.ood = "file:gs://texts/corpus.jsonl", "file:gs://texts/oo*.jsonl"
    c.data.explanations = "gs://texts/explanations.jsonl"
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def run(finished, quick, root):
    """The summary of that run, which was stopped in RL and taken up again."""
    shutil.copytree(finished / "target", root / "models" / "chatter")
    (root / "texts").mkdir()
    for name in ("corpus.jsonl", "ood.jsonl", "explanations.jsonl"):
        shutil.copy(finished / name, root / "texts")
    with pytest.MonkeyPatch.context() as patch:
        rl_batch = feeds.rl_batch

        def die(*args, step, **kw):
            if step == 1 and (root / "runs/mine/metrics/warm_av.jsonl").exists():
                raise KeyboardInterrupt
            return rl_batch(*args, step=step, **kw)

        patch.setattr(feeds, "rl_batch", die)
        with pytest.raises(KeyboardInterrupt):
            stages.run(config(finished), RUN)
    assert not (root / "runs/mine/summary.json").exists()
    return stages.run(config(finished), RUN)


def test_the_numbers_are_those_of_a_run_in_a_directory(finished, run):
    want = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    for part in ("warm_start", "rl", "rows", "documents"):
        assert run[part] == want[part]
    for path in sorted((finished / "run" / "metrics").glob("*.jsonl")):
        assert metrics_log.read(f"{RUN}/metrics/{path.name}") == metrics_log.read(path)
    assert list((paths.path(RUN) / "tensorboard" / "rl").iterdir())
    assert not paths.path(f"{RUN}/checkpoints").exists()


def test_its_store_and_bundle_are_read(finished, run):
    want = store.load_columns(finished / "run" / "data", "warm")
    got = store.load_columns(f"{RUN}/data", "warm")
    np.testing.assert_array_equal(got["h"], want["h"])
    assert store.open_store(f"{RUN}/data", "rl")[0]["text"]
    here, there = nla_jax.load(finished / "run" / "bundle"), nla_jax.load(f"{RUN}/bundle")
    for role in ("av", "ar"):
        tiny.assert_trees_close(getattr(there, role), getattr(here, role))


def test_a_run_begins_from_another_and_from_its_bundle(finished, run):
    other = config(finished)
    other.rl.kl = 0.5
    taken = reuse.link_stages(other, RUN, "gs://runs/other")
    assert taken == ["extract", "lessons_ar", "lessons_av", "warm_ar", "warm_av", "eval_warm"]
    begun = config(finished, init=f"{RUN}/bundle")
    begun.data.store = f"{RUN}/data"
    begun.rl.steps = 1
    for stage in ("lessons_ar", "lessons_av", "warm_ar", "warm_av"):
        begun[stage].steps = 0
    assert stages.run(begun, "gs://runs/begun", only="warm_av") is not None
    assert store.read_meta("gs://runs/begun/data")["plan"]["taken_from"] == "data"


def test_commands_write_there(finished, run, capsys):
    argv = ("evaluate", "--bundle", f"{RUN}/bundle", "--probes", "form", "--rows", "4")
    assert world.nla(*argv, "--json", "gs://out/a.json", "--markdown", "gs://out/a.md") == 0
    assert json.loads(paths.path("gs://out/a.json").read_text())["heldout"]
    assert world.nla("results", RUN, "--out", "gs://out/page.md") == 0
    assert paths.path("gs://out/page.png").stat().length > 1000
    assert world.nla("export", "--bundle", f"{RUN}/bundle", "--out", "gs://out/pair") == 0
    argv = ("--av", "gs://out/pair/av", "--ar", "gs://out/pair/ar", "--out", "gs://out/again")
    assert world.nla("import", *argv) == 0
    assert world.nla("explain", "--bundle", "gs://out/again", "--text", "a text", "--tokens=-1") == 0
    argv = ("--store", f"{RUN}/data", "--split", "rl", "--stage", "rl", "--bundle", f"{RUN}/bundle")
    assert world.nla("data", "export", *argv, "--out", "gs://out/rl.parquet") == 0
    argv = ("gs://out/rl.parquet", "--out", "gs://out/store", "--heldout-share", "0.5")
    assert world.nla("data", "import", *argv) == 0
    assert store.read_meta("gs://out/store")["splits"]
    capsys.readouterr()


def test_copies_in_the_cache_are_kept_up_to_date(root):
    place = root / "texts" / "sub" / "one.txt"
    place.parent.mkdir(parents=True)
    place.write_text("first")
    os.utime(place, (1000, 1000))
    found = paths.local_copy("gs://texts/sub")
    assert (found / "one.txt").read_text() == "first"
    (found / "one.txt").write_text("FIRST")  # the same size; the time says that it is not the copy
    place.write_text("other")
    os.utime(place, (2000, 2000))
    (place.parent / "two.txt").write_text("2")
    assert {p.name: p.read_text() for p in paths.local_copy("gs://texts/sub").iterdir()} == {
        "one.txt": "other", "two.txt": "2"}
    place.unlink()
    assert [p.name for p in paths.local_copy("gs://texts/sub").iterdir()] == ["two.txt"]


def test_what_is_not_there_or_cannot_be(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="gs://models/none does not exist"):
        weights.resolve("gs://models/none")
    with pytest.raises(UserError, match="no file matches 'gs://texts/none"):
        corpora.open_corpus("file:gs://texts/none/*.txt")
    with pytest.raises(UserError, match=r"gs://texts/\*\*/a.txt: in object storage \*\* is not supported"):
        corpora.open_corpus("file:gs://texts/**/a.txt")
    with pytest.raises(UserError, match="gs://texts/none.jsonl does not exist"):
        paths.local_copy("gs://texts/none.jsonl")
    with pytest.raises(UserError, match="http:// is not supported: give a directory, or gs://BUCKET/PATH"):
        paths.path("http://somewhere/run")


def test_compiled_programs_may_be_kept_in_a_bucket_and_files_not(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NLA_CACHE", "gs://cache/nla")
    assert paths.programs_dir() == "gs://cache/nla/xla"
    assert paths.cache_dir() == tmp_path / "nla_jax"


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    def missing(_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    buckets.forget()
    with pytest.raises(UserError, match=r"install gcsfs .* pip install 'nla_jax\[gcs\]'"):
        paths.absolute("gs://runs/other")
    buckets.forget()
