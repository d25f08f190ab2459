"""A run goes on only with the target, tokenizer, prompts, texts and bundle `init` that it was begun with."""

import datetime
import json
import shutil
import types
from pathlib import Path

import pytest

import nla_jax
from nla_jax import bundle
from nla_jax.data import chats, corpora, store
from nla_jax.errors import UserError
from nla_jax.lm import chat_prompts, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.pipeline import context, fingerprints, reuse, run_directory, stages
from nla_jax.util import locks
from tests.helpers import tiny, world

pytestmark = pytest.mark.usefixtures("quick")
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """A run's target is not read: what is refused here is refused before."""
    place = types.SimpleNamespace(place=lambda *a, **k: (None, {}))
    monkeypatch.setattr(context, "sharded_load", place)


@pytest.fixture
def here(finished, tmp_path):
    """A copy of the world of `finished` whose run goes on with RL."""
    for name in ("target", "run"):
        shutil.copytree(finished / name, tmp_path / name)
    for name in ("corpus.jsonl", "ood.jsonl", "explanations.jsonl"):
        shutil.copy(finished / name, tmp_path / name)
    world.write_config(tmp_path)
    run = tmp_path / "run"
    for name in ("summary.json", "done/rl.json", "done/eval_rl.json"):
        (run / name).unlink()
    known = json.loads((run / fingerprints.FILE).read_text("utf-8"))
    (run / fingerprints.FILE).write_text(json.dumps(known).replace(str(finished), str(tmp_path)), "utf-8")
    config = json.loads((run / "config.json").read_text("utf-8"))
    (run / "config.json").write_text(json.dumps(config).replace(str(finished), str(tmp_path)), "utf-8")
    return tmp_path


def extracting(run: Path) -> None:
    """Leave of a run what there is while its activations are captured."""
    kept = (run / fingerprints.FILE).read_text("utf-8")
    shutil.rmtree(run)
    (run / "data" / ".progress").mkdir(parents=True)
    (run / fingerprints.FILE).write_text(kept, "utf-8")


def refusal(config, run: Path) -> str:
    with pytest.raises(UserError) as told:
        stages.run(config, run)
    assert not (run / locks.NAME).exists() and "\n" not in str(told.value)
    return str(told.value)


def change_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    fewer = json.loads(path.read_text("utf-8"))
    fewer["model"]["merges"].remove(["summar", "y"])
    path.write_text(json.dumps(fewer), "utf-8")


def change_template(directory: Path, template: str) -> None:
    tok = tok_lib.load(directory)
    tok.chat_template = template
    tok_lib.save(tok, directory)


# --- what is compared -----------------------------------------------------------------------------


def test_a_run_that_goes_on_with_the_same_is_not_refused(here):
    before = (here / "run" / fingerprints.FILE).read_text("utf-8")
    r = context.open_run(world.config(here), here / "run")
    assert r.given["ids"] == {role: p["ids"] for role, p in json.loads(before)["prompts"].items()}
    assert (here / "run" / fingerprints.FILE).read_text("utf-8") == before


def test_another_target_of_the_same_shape(here):
    other = world.write_target(here / "other", seed=1)
    said = refusal(world.config(here, target=str(other)), here / "run")
    assert said == (
        f"{here / 'run'} cannot go on: target={str(other)!r} has other weights than "
        f"target={str(here / 'target')!r}: give the latter again, or choose another --workdir"
    )
    shutil.rmtree(here / "target")
    other.rename(here / "target")
    said = refusal(world.config(here), here / "run")
    assert "has other weights than when it was begun: restore what was there, or" in said


def test_a_target_at_another_place_is_the_same_target(here):
    (here / "target").rename(here / "moved")
    again = context.open_run(world.config(here, target=str(here / "moved")), here / "run")
    assert str(again.path) == str(here / "moved")


def test_weights_that_changed_in_the_middle(finished, tmp_path):
    """The first and last 64 KiB are those of another model: an adapter was merged between them."""
    path = tmp_path / "model.gguf"
    data = bytearray(200_000)
    path.write_bytes(data)
    before = weights.fingerprint(path), weights.digest(path)
    data[100_000] = 1
    path.write_bytes(data)
    assert weights.fingerprint(path) == before[0] and weights.digest(path) != before[1]


def test_another_tokenizer(here):
    change_tokenizer(here / "target")
    assert "has another tokenizer than when" in refusal(world.config(here), here / "run")


def test_another_chat_template(here):
    change_template(here / "target", tiny.CHAT_TEMPLATE + " ")
    assert "chat_template='' has another chat template than when" in refusal(world.config(here), here / "run")


@pytest.mark.parametrize("key, name", [
    ("data.corpus", "corpus.jsonl"), ("data.ood", "ood.jsonl"), ("data.explanations", "explanations.jsonl"),
])
def test_texts_that_are_still_read(here, key, name):
    lines = (here / name).read_text("utf-8").splitlines()
    (here / name).write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    context.open_run(world.config(here), here / "run")  # its activations are captured: the texts are not read
    extracting(here / "run")
    assert f"cannot go on: {key}=" in refusal(world.config(here), here / "run")


def test_the_bundle_that_a_run_starts_from(here):
    c = world.config(here, init=str(here / "run" / "bundle"))
    for stage in ("lessons_ar", "warm_ar", "warm_av"):
        c[stage].steps = 0
    c = context.apply_bundle(c)
    r = context.open_run(c, here / "second")
    assert r.given["ids"] == bundle.read_sidecar(c.init)["prompt_ids"]
    (here / "second" / "config.json").write_text(json.dumps(c.to_dict()), "utf-8")
    context.open_run(c, here / "second")
    sidecar = here / "run" / "bundle" / bundle.SIDECAR
    sidecar.write_text(sidecar.read_text("utf-8").replace("created_at: '2", "created_at: '1"), "utf-8")
    with pytest.raises(UserError, match="init='.*' has other parameters than when"):
        context.open_run(c, here / "second")


def test_a_fault_before_anything_is_captured_does_not_bind(here):
    """The corpus is mended after a fault in it, and the same command goes on."""
    extracting(here / "run")
    shutil.rmtree(here / "run" / "data")
    (here / "corpus.jsonl").write_text((here / "ood.jsonl").read_text("utf-8"), "utf-8")
    context.open_run(world.config(here), here / "run")
    known = json.loads((here / "run" / fingerprints.FILE).read_text("utf-8"))
    assert known["corpus"]["digest"] == corpora.digest(f"file:{here / 'corpus.jsonl'}")


def test_a_run_of_an_older_version_is_held_to_its_activations(here):
    (here / "run" / fingerprints.FILE).unlink()
    other = world.write_target(here / "other", seed=1)
    assert "has other weights than when" in refusal(world.config(here, target=str(other)), here / "run")
    context.open_run(world.config(here), here / "run")
    assert fingerprints.read(here / "run")["target"]["digest"] == weights.digest(here / "target")


def test_a_finished_run_is_not_shown_for_another_target(finished, tmp_path, monkeypatch):
    other = world.write_target(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="has other weights than"):
        stages.run(world.config(finished, target=str(other)), finished / "run")
    monkeypatch.chdir(finished)
    assert stages.run(world.config(finished, target="target"), finished / "run")["seed"] == world.SEED


def test_a_damaged_file_is_told(here):
    (here / "run" / fingerprints.FILE).write_text("{", "utf-8")
    assert f"{here / 'run' / fingerprints.FILE}: damaged" in refusal(world.config(here), here / "run")


# --- another run's stages, and stores -------------------------------------------------------------


def test_stages_of_a_run_with_another_target_are_not_reused(here):
    shutil.rmtree(here / "target")
    world.write_target(here / "target", seed=1)
    with pytest.raises(UserError) as told:
        context.open_run(world.config(here), here / "new", here / "run")
    assert "no finished stage agrees with this config (it differs in target; target=" in str(told.value)
    (here / "run" / fingerprints.FILE).unlink()  # of an older version: its activations say it
    with pytest.raises(UserError, match="no finished stage agrees"):
        context.open_run(world.config(here), here / "new", here / "run")
    assert not (here / "new").exists()


def test_stages_are_reused_with_the_prompts_that_they_were_trained_with(here, monkeypatch):
    known = fingerprints.read(here / "run")["prompts"]["av"]["ids"]
    monkeypatch.setattr(chat_prompts, "chat_ids", lambda tok, text: [5, *known["before"], known["marker"], 6])
    (here / "target").rename(here / "moved")
    r = context.open_run(world.config(here, target=str(here / "moved")), here / "new", here / "run")
    assert run_directory.is_done(here / "new", "warm_av") and r.given["ids"]["av"] == known
    assert fingerprints.read(here / "new")["corpus"] == fingerprints.read(here / "run")["corpus"]


def test_a_changed_corpus_reuses_nothing(here):
    lines = (here / "corpus.jsonl").read_text("utf-8").splitlines()
    (here / "corpus.jsonl").write_text("\n".join(lines[:-1]) + "\n", "utf-8")
    with pytest.raises(UserError, match="it differs in data.corpus; data.corpus="):
        context.open_run(world.config(here), here / "new", here / "run")


def test_a_store_of_other_weights_or_another_tokenizer(here):
    c = world.config(here)
    c.data.store = str(here / "run" / "data")
    context.open_run(c, here / "new")
    path = here / "run" / "data" / store.META
    whole = json.loads(path.read_text("utf-8"))
    for key, message in (("digest", "are of other weights"), ("tokenizer", "with another tokenizer")):
        path.write_text(json.dumps({**whole, key: "0" * 16}), "utf-8")
        with pytest.raises(UserError, match=message):
            context.open_run(c, here / "new")
    path.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("digest", "tokenizer")}), "utf-8")
    context.open_run(c, here / "new")  # a store of an older version


# --- spellings ------------------------------------------------------------------------------------


def relative(config, here: Path):
    """The same config with paths relative to `here`."""
    config.update(json.loads(config.to_json().replace(f"{here}/", "")))
    return config


def test_a_relative_spelling_is_the_same_config(here, monkeypatch):
    monkeypatch.chdir(here)
    c = relative(world.config(here), here)
    assert c.data.corpus == "file:corpus.jsonl" and c.target == "target"
    run_directory.check_config(c, here / "run")
    context.open_run(c, here / "run")
    assert reuse.link_stages(c, here / "run", here / "new")[:2] == ["extract", "lessons_ar"]
    assert fingerprints.as_begun(c, here / "run")["corpus"] == f"file:{here / 'corpus.jsonl'}"
    c.data.corpus = "file:ood.jsonl"
    with pytest.raises(UserError, match="was begun with data.corpus="):
        run_directory.check_config(c, here / "run")


def test_a_run_begun_with_relative_paths_goes_on_from_elsewhere(here, monkeypatch):
    shutil.rmtree(here / "run")
    monkeypatch.chdir(here)
    c = relative(world.config(here), here)
    context.open_run(c, here / "run")
    (here / "run" / "config.json").write_text(json.dumps(c.to_dict()), "utf-8")
    monkeypatch.chdir("/")
    run_directory.check_config(world.config(here), here / "run")
    context.open_run(world.config(here), here / "run")


# --- midnight -------------------------------------------------------------------------------------


def at(day: int):
    """A module `datetime` whose clock stands still."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, day, 23, 59, tzinfo=tz)

    return Clock


@pytest.mark.parametrize(
    "form", ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%c", "%x %X", "%j %H:%M:%S %p", "%F"]
)
def test_a_template_that_prints_the_date_prints_one_date(monkeypatch, form):
    from transformers.utils import chat_template_utils

    tok = tiny.tokenizer()
    macro = f"{{% macro day() %}}{{{{ strftime_now('{form}') }}}}{{% endmacro %}}"
    tok.chat_template = "\n" + macro + "{{ day() }}|{{ strftime_now is defined }}|" + tiny.CHAT_TEMPLATE
    found = []
    for day in (1, 2):
        monkeypatch.setattr(chat_template_utils, "datetime", at(day))
        said = chats.render([{"role": "user", "content": "hi"}], tok, "user", "x")
        found.append((chat_prompts.chat_ids(tok, "hi"), said))
    assert found[0] == found[1]
    day = datetime.datetime(2025, 1, 1).strftime(form)
    assert found[0][1].text.startswith(f"\n{day}|True|<|im_start|>user")


def test_midnight_between_two_starts(here, monkeypatch):
    """A run keeps the prompts that it was begun with, even if they are rendered otherwise now."""
    change_template(here / "target", DATED + tiny.CHAT_TEMPLATE)
    shutil.rmtree(here / "run")
    monkeypatch.setattr(chat_prompts, "CLOCK", {"d": "30", "b": "Nov", "Y": "2026"})
    first = context.open_run(world.config(here), here / "run")
    text = first.tok.decode(first.given["ids"]["av"]["before"])
    assert "Today is 30 Nov 2026." in text
    (here / "run" / "config.json").write_text(json.dumps(world.config(here).to_dict()), "utf-8")
    monkeypatch.setattr(chat_prompts, "CLOCK", {"d": "01", "b": "Dec", "Y": "2026"})
    assert "Today is 01 Dec 2026." in first.tok.decode(chat_prompts.chat_ids(first.tok, "hi"))
    second = context.open_run(world.config(here), here / "run")
    assert second.given["ids"] == first.given["ids"]


def test_a_bundle_is_opened_with_the_prompts_that_it_was_trained_with(finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished / "run" / "bundle", tmp_path / "bundle")
    before = nla_jax.load(copy)
    tok = tok_lib.load(copy / "tokenizer")
    tok.chat_template = DATED + tok.chat_template
    tok_lib.save(tok, copy / "tokenizer")
    after = nla_jax.load(copy)
    assert after.spec == before.spec
    assert "Today is" in after.tokenizer.decode(chat_prompts.chat_ids(after.tokenizer, "hi"))
    # An older sidecar has no ids: the tokenizer's template renders the prompt.
    path = copy / bundle.SIDECAR
    head, _, rest = path.read_text("utf-8").partition("prompt_ids:\n")
    path.write_text(head + rest[rest.index("roles:") :], "utf-8")
    assert "Today is" in tok.decode(nla_jax.load(copy).spec.av.before)


def test_recorded_ids_that_are_not_of_the_tokenizer(finished):
    meta = bundle.read_sidecar(finished / "run" / "bundle")
    tok = tok_lib.load(finished / "run" / "bundle" / "tokenizer")
    cfg = weights.read_config(finished / "target")
    meta["prompt_ids"]["av"]["before"][0] = len(tok)
    with pytest.raises(UserError, match="which is no token of this tokenizer"):
        bundle.spec_of(meta, cfg, tok)
    del meta["prompt_ids"]["av"]["before"]
    with pytest.raises(UserError, match="the recorded ids of a prompt are malformed"):
        bundle.spec_of(meta, cfg, tok)


# --- two starts -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_two_starts_in_one_directory(here, capsys, monkeypatch):
    monkeypatch.setattr("nla_jax.cli._use_cache", lambda: None)
    where = ("--config", here / "experiment.py", "--workdir", here / "run")

    def files():  # Python itself writes a cache beside the config that it imports.
        return sorted(p.relative_to(here) for p in here.rglob("*") if "__pycache__" not in p.parts)

    before = files()
    for argv in (("train",), ("data", "extract"), ("data", "extract", "--hosts", "2", "--host-index", "1"),
                 ("data", "sweep", "--layers", "0")):
        with locks.hold_directory(here / "run"):
            assert world.nla(*argv, *where) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"nla: {here / 'run'} is in use by process ")
    assert files() == before


def test_hosts_extract_together_and_one_only_once(here, monkeypatch):
    ran = []
    monkeypatch.setattr(stages, "_run", lambda config, workdir, only, source, host: ran.append(host))
    c = world.config(here)

    def while_other_runs(config, workdir, only, source, host):
        monkeypatch.setattr(stages, "_run", lambda *a: ran.append(a[-1]))
        stages.run(c, here / "new", only="extract", host=(1, 2))
        with pytest.raises(UserError, match="--host-index 0 of .* is in use by process"):
            stages.run(c, here / "new", only="extract", host=(0, 2))
        with pytest.raises(UserError, match="is in use by process"):
            stages.run(c, here / "new")

    monkeypatch.setattr(stages, "_run", while_other_runs)
    stages.run(c, here / "new", only="extract", host=(0, 2))
    assert ran == [(1, 2)]


def test_two_explainers_with_one_output(here, capsys):
    out = here / "out.jsonl"
    corpus, requests = f"file:{here / 'corpus.jsonl'}", here / "requests.jsonl"
    argv = ("data", "explain", "--provider", "file", "--corpus", corpus, "--out", out, "--requests", requests,
            "--min-words", "5", "--max-words", "9")
    with locks.hold(out.with_name("out.jsonl.lock"), str(out)):
        assert world.nla(*argv) == 2
    assert f"{out} is in use by process" in capsys.readouterr().err
    assert world.nla(*argv) == 0
    assert not out.with_name("out.jsonl.lock").exists()


def test_the_corpus_is_what_its_files_hold(here):
    before = corpora.digest(f"file:{here / 'corpus.jsonl'}")
    assert before and before == corpora.digest(f"mix:1*file:{here / 'corpus.jsonl'}")
    assert corpora.digest("news") == corpora.digest("") == corpora.digest(f"file:{here}/none*.jsonl") == ""
    with open(here / "corpus.jsonl", "a", encoding="utf-8") as f:
        f.write("\n")
    assert corpora.digest(f"file:{here / 'corpus.jsonl'}") != before
