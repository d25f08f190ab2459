"""The command line on a finished tiny run: what it prints and writes, and how it refuses."""

import html
import json
import re
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import nla_jax
from nla_jax import cli
from nla_jax.cli import explain as explain_command
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import metrics_log
from tests.helpers import world

pytestmark = [
    pytest.mark.usefixtures("quick", "no_cache"),
    # ml_collections loads experiment files in an old way.
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]
TEXT = "an old town"


@pytest.fixture
def no_cache(monkeypatch):
    """Commands leave the compilation cache of this process as it is."""
    monkeypatch.setattr(cli, "_use_cache", lambda: None)


@pytest.fixture
def refused(capsys):
    """A function that runs `nla ARGV`, which must exit with 2 and one line, and returns the line."""

    def run(*argv) -> str:
        capsys.readouterr()
        assert world.nla(*argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        *before, line = err.splitlines()
        assert line.startswith("nla: ") and all(other.startswith("running on ") for other in before)
        return line

    return run


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def other_targets(tmp_path_factory):
    """(same architecture with other weights, another architecture)."""
    here = tmp_path_factory.mktemp("targets")
    world.write_target(here / "weights", seed=1)
    world.write_target(here / "blocks", n_blocks=3)
    return here / "weights", here / "blocks"


def explain(bundle, *argv):
    return "explain", "--bundle", bundle, "--text", TEXT, *argv


# --- bundles that cannot be used ------------------------------------------------------------------


def test_not_a_bundle(refused, tmp_path):
    for command in (explain(tmp_path / "none"), ("evaluate", "--bundle", tmp_path)):
        assert "not an NLA bundle (nla_meta.yaml is missing)" in refused(*command)


def test_damaged_sidecar(refused, copy):
    path = copy / "bundle" / "nla_meta.yaml"
    whole = path.read_text("utf-8")
    for text, message in [
        ("kind: [nla\n", "not valid YAML"),
        ("just words\n", "kind is None"),
        (whole.replace("kind: nla_bundle", "kind: nla_dataset"), "kind is 'nla_dataset'"),
        (whole.replace("schema_version: 1", "schema_version: 99"), "schema_version 99 is newer"),
        # Cut short, at the end of a line and inside one: what is left may still be YAML.
        (whole[: whole.index("mean_direction:")], "mean_direction is missing"),
        (whole[: whole.index("created_by:")], "created_by is missing"),
        *((whole[: len(whole) * part // 10], "") for part in range(1, 9)),
    ]:
        path.write_text(text, "utf-8")
        line = refused(*explain(copy / "bundle"))
        assert message in line and str(path) in line


def test_target_of_another_kind(refused, finished, other_targets):
    bundle, target = finished / "run" / "bundle", str(finished / "target")
    for other, message in zip(other_targets, ("other weights", "another architecture"), strict=True):
        line = refused(*explain(bundle, "--target", other))
        assert message in line and target in line
    assert "does not exist" in refused(*explain(bundle, "--target", finished / "nowhere"))


def test_damaged_parameters_and_tokenizer(refused, copy):
    bundle = copy / "bundle"
    path = max((bundle / "params").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{path}: {len(whole) // 2} bytes instead of {len(whole)}" in refused(*explain(bundle))
    path.write_bytes(whole)
    # A merge fewer: the word stands as two tokens in the reconstructor's prompt.
    tokenizer = bundle / "tokenizer" / "tokenizer.json"
    text = tokenizer.read_text("utf-8")
    fewer = json.loads(text)
    fewer["model"]["merges"].remove(["summar", "y"])
    tokenizer.write_text(json.dumps(fewer), "utf-8")
    assert "its tokenizer is not the sidecar's, or renders the prompts" in refused(*explain(bundle))
    tokenizer.write_text(text[:1000], "utf-8")
    assert "cannot read the tokenizer" in refused(*explain(bundle))
    tokenizer.write_text(text, "utf-8")
    shutil.rmtree(bundle / "params")
    assert str(bundle / "params") in refused(*explain(bundle))
    shutil.rmtree(bundle / "tokenizer")
    assert str(bundle / "tokenizer") in refused(*explain(bundle))


# --- arguments ------------------------------------------------------------------------------------


def test_argparse_refuses(capsys, finished):
    for argv, message in [
        (explain("b", "--frobnicate"), "unknown argument '--frobnicate'"),
        (explain("b", "--samples", "two"), "--samples two: must be a whole number"),
        (("explain", "--bundle", "b"), "--text"),
        (("expalin",), "unknown command 'expalin'; did you mean 'explain'?"),
        ((), "COMMAND"),
    ]:
        assert world.nla(*argv) == 2
        err = capsys.readouterr().err
        assert message in err.splitlines()[-1] and "Traceback" not in err


def test_config_arguments(refused, finished, tmp_path):
    where = ("--config", finished / "experiment.py", "--workdir", tmp_path / "new")
    none = ("--config", tmp_path / "none.py", "--workdir", tmp_path / "new")
    assert "no config file" in refused("train", *none)
    assert "unknown config key 'rl.stepz'" in refused("train", *where, "--config.rl.stepz=3")
    assert "unknown argument '--frobnicate'" in refused("train", *where, "--frobnicate")
    assert "rl.group=1" in refused("data", "extract", *where, "--config.rl.group=1")
    assert not (tmp_path / "new").exists()
    closed = ("--config", finished / "experiment.py", "--workdir", "/proc/nla")
    for command in (("train",), ("data", "extract")):
        assert "cannot write /proc/nla (/proc: " in refused(*command, *closed)


def test_bad_config_does_not_lock_the_workdir(refused, finished, tmp_path, capsys):
    """Whatever is found out before there are activations can be mended in the same workdir."""
    workdir = tmp_path / "new"
    command = ("data", "extract", "--config", finished / "experiment.py", "--workdir", workdir)
    nothing = tmp_path / "empty.jsonl"
    nothing.write_text('{"text": "short"}\n', "utf-8")
    for override, message in [
        ("layer=9", "layer 9: this target has blocks 0 to 1"),
        ("target=/no/where", "does not exist"),
        (f"data.corpus=file:{tmp_path / 'none'}", "no file matches"),
        (f"data.corpus=file:{nothing}", "no document for split"),
        ("data.explanations=/no/where", "no explanations at"),
        ("mesh.data=3", "needs 3 devices"),
    ]:
        assert message in refused(*command, f"--config.{override}")
    # This one is found only once there are activations, which are kept.
    assert world.nla(*command, "--config.warm_av.max_tokens=4") == 2
    assert "every written explanation is longer than max_tokens" in capsys.readouterr().err
    assert not (workdir / "config.json").exists() and (workdir / "data" / store.META).exists()
    assert world.nla(*command) == 0
    assert "was begun with seed=3, the config now says 4" in refused(*command, "--config.seed=4")
    assert "lessons_ar" not in [p.stem for p in (workdir / "done").iterdir()]


def test_batch_that_the_devices_do_not_divide(refused, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(
        mesh_lib, "make", lambda **sizes: Mesh(np.full((2, 2, 1), jax.devices()[0]), mesh_lib.AXES)
    )
    where = ("--config", finished / "experiment.py", "--workdir", tmp_path / "new")
    assert "rl.batch=6 does not divide over 4 devices" in refused("train", *where, "--config.rl.batch=6")


# --- train ----------------------------------------------------------------------------------------


def test_finished_stages_never_run_again(finished, copy, refused, capsys):
    command = ("train", "--config", finished / "experiment.py", "--workdir", copy)
    done = {p.name: p.stat().st_mtime_ns for p in (copy / "done").iterdir()}
    before = json.loads((copy / "summary.json").read_text("utf-8"))
    assert len(done) == 10
    assert world.nla(*command) == 0
    (copy / "summary.json").unlink()
    assert world.nla(*command) == 0
    assert json.loads((copy / "summary.json").read_text("utf-8")) == before
    assert {p.name: p.stat().st_mtime_ns for p in (copy / "done").iterdir()} == done
    out, _ = capsys.readouterr()
    assert out.count("fve_shuffled") == 4 and str(copy / "summary.json") in out.replace("\n", "")
    line = refused(*command, "--config.rl.kl=0.5", "--config.seed=4")
    assert "begun with rl.kl=0.01, the config now says 0.5 (and 1 more keys)" in line
    # These change no number.
    assert world.nla(*command, "--config.log_every=5", "--config.checkpoint_every=7") == 0


def test_run_left_what_it_says(finished):
    run = finished / "run"
    left = {p.name for p in run.iterdir()}
    assert left == {"bundle", "bundle_warm", "config.json", "data", "done", "fingerprints.json", "metrics",
                    "params", "summary.json", "tensorboard", "times"}
    rows = {
        s: metrics_log.read(run / "metrics" / f"{s}.jsonl")
        for s in ("lessons_ar", "warm_av", "warm_ar", "rl")
    }
    assert all([r["step"] for r in found] == [0, 1] for found in rows.values())
    assert rows["rl"][0].keys() >= {"reward", "kl", "best", "worst"}
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["rows"] == {"heldout": 6, "ood": 8, "rl": 32, "warm": 48}
    assert summary["seconds"].keys() == {p.stem for p in (run / "done").iterdir()}
    gain = summary["fve_rl"] - summary["fve_warm_start"]
    assert summary["rl_gain"] == pytest.approx(gain, abs=1e-3)
    low, high = summary["fve_rl_interval"]
    assert low <= summary["fve_rl"] <= high


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluate_repeats_the_summary(finished, tmp_path, capsys):
    summary = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    for name, key in (("bundle", "rl"), ("bundle_warm", "warm_start")):
        bundle, out = finished / "run" / name, tmp_path / f"{name}.json"
        argv = ("--probes", "round_trip", "--splits", "heldout,ood", "--seed", world.SEED, "--json", out)
        assert world.nla("evaluate", "--bundle", bundle, *argv) == 0
        found = json.loads(out.read_text("utf-8"))
        assert found.keys() == summary[key].keys() == {"heldout", "ood"}
        for split, table in found.items():
            for a, b in zip(table["figures"], summary[key][split], strict=True):
                numbers = [[f[k] for k in ("value", "low", "high", "n") if f[k] is not None] for f in (a, b)]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5), (split, a["name"])
    assert "mean direction" in " ".join(capsys.readouterr().out.split())
    # A split alone scores as beside others.
    argv = (*argv, "--splits", "ood")
    assert world.nla("evaluate", "--bundle", bundle, *argv) == 0
    assert json.loads(out.read_text("utf-8")) == {"ood": found["ood"]}


def test_evaluate_refuses(refused, copy):
    bundle = copy / "bundle"
    line = refused("evaluate", "--bundle", bundle, "--splits", "heldout,test")
    assert "no split 'test'; it has heldout, ood, rl, warm" in line
    assert "no activations here" in refused("evaluate", "--bundle", bundle, "--store", copy / "metrics")
    line = refused("evaluate", "--bundle", bundle, "--json", copy / "none" / "out.json")
    assert "there is no directory" in line and "create it first" in line
    meta = store.read_meta(copy / "data")
    for change in ({"layer": 1}, {"target": "0" * 16}):
        other = {**meta, "plan": {**meta["plan"], **change}}
        (copy / "data" / store.META).write_text(json.dumps(other), "utf-8")
        assert "another model or layer" in refused("evaluate", "--bundle", bundle)


# --- explain --------------------------------------------------------------------------------------


def test_a_terminal_obeys_nothing_that_a_model_wrote(capsys):
    said = nla_jax.TokenReport(0, " town", "[red]a\x1b[2J\x9b1m\nb[/red]", 0.5, 0.5, True)
    explain_command.print_reports([said], "title", "")
    out = capsys.readouterr().out
    assert "[red]a\ufffd[2J\ufffd1m" in out and "b[/red]" in out


def test_explain_json(finished, capsys):
    argv = explain(finished / "run" / "bundle", "--json", "--tokens=-3:", "--samples", 4, "--seed", 1)
    assert world.nla(*argv) == 0
    first = capsys.readouterr().out
    rows = json.loads(first)
    assert [r["position"] for r in rows] == [6] * 4 + [7] * 4 + [8] * 4
    assert [r["token"] for r in rows[::4]] == list("own")
    for r in rows:
        assert r.keys() == {"position", "token", "explanation", "fve", "cos", "ok"}
        assert r["ok"] is bool(r["explanation"]) and -1 <= r["cos"] <= 1 and r["fve"] <= 1
    assert {r["ok"] for r in rows} == {True, False}
    assert world.nla(*argv) == 0
    assert capsys.readouterr().out == first


def test_explain_table(finished, capsys, tmp_path):
    svg = tmp_path / "table.svg"
    assert world.nla(*explain(finished / "run" / "bundle", "--tokens", "-1", "--svg", svg)) == 0
    out = capsys.readouterr().out
    assert "explanation" in out and "what block 0 holds" in " ".join(out.split())
    assert svg.read_text("utf-8").startswith("<svg")


def test_table_shows_text_as_it_is(capsys, tmp_path):
    """Words in brackets are no markup, and a failed answer is said to be one."""
    from nla_jax import TokenReport

    reports = [TokenReport(0, "[b]", "[red]a[/red]", 0.5, 0.5, True), TokenReport(1, "\n", "", -1, 0, False)]
    explain_command.print_reports(reports, "title", "")
    out = capsys.readouterr().out
    assert "[b]" in out and "[red]a[/red]" in out and "\\n" in out and "no readable explanation" in out


def test_explain_refuses(refused, finished):
    bundle = finished / "run" / "bundle"
    assert "--samples 0: must be at least 1" in refused(*explain(bundle, "--samples", 0))
    for tokens, message in [
        ("9", "token 9 is outside the text, which has 9 tokens"),
        ("20:30", "--tokens 20:30 selects nothing in a text of 9 tokens"),
        ("first", "--tokens 'first': use all, an index"),
    ]:
        assert message in refused(*explain(bundle, "--tokens", tokens))
    for text, message in [
        ("", "the text is empty"),
        ("a" * 1537, "1537 tokens; this target reads at most 1536"),
    ]:
        assert message in refused("explain", "--bundle", bundle, "--text", text)


def test_choose_tokens():
    wanted = {
        "all": [0, 1, 2, 3, 4],
        "-1": [-1],
        "3": [3],
        "1:3": [1, 2],
        "3:": [3, 4],
        ":-3": [0, 1],
        "3:99": [3, 4],
    }
    assert {spec: explain_command.choose_tokens(spec, 5) for spec in wanted} == wanted
    for bad in ("", "x", "1:2:3", "1.5", "a:b", "4:2", "3:3"):
        with pytest.raises(UserError, match="--tokens"):
            explain_command.choose_tokens(bad, 5)


def test_values_may_begin_with_a_dash():
    args, rest = cli.make_parser().parse_known_args(
        cli._join_dashed("explain --bundle b --tokens -3: --text --json --seed 2".split())
    )
    assert (args.tokens, args.text, args.seed, args.json, rest) == ("-3:", "--json", 2, "", [])


def test_a_wrong_text_or_token_is_found_before_weights_are_read(refused, finished, monkeypatch):
    def place(*a, **kw):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("nla_jax.lm.sharded_load.place", place)
    bundle = finished / "run" / "bundle"
    assert "outside the text, which has 9 tokens" in refused(*explain(bundle, "--tokens", "9"))
    assert "selects nothing" in refused(*explain(bundle, "--tokens", "20:30"))
    assert "the text is empty" in refused("explain", "--bundle", bundle, "--text", "")
    assert "1537 tokens" in refused("explain", "--bundle", bundle, "--text", "a" * 1537)
    assert "create it first" in refused(*explain(bundle, "--svg", finished / "none" / "x.svg"))
    with pytest.raises(AssertionError, match="the weights were read"):
        world.nla(*explain(bundle))


def test_a_run_is_taken_for_its_bundle(finished, capsys):
    run = finished / "run"
    argv = ("--tokens=-1", "--json")
    assert world.nla(*explain(run / "bundle", *argv)) == 0
    by_bundle = capsys.readouterr()
    assert world.nla(*explain(run, *argv)) == 0
    by_run = capsys.readouterr()
    assert by_run.out == by_bundle.out
    assert f"{run} is a run: using its bundle, {run / 'bundle'}" in by_run.err


# --- info -----------------------------------------------------------------------------------------


def info(capsys, path) -> dict:
    capsys.readouterr()
    assert world.nla("info", path, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_info_of_everything_that_a_run_wrote(finished, capsys, refused, monkeypatch):
    monkeypatch.setattr("nla_jax.lm.sharded_load.place", None)  # no weights are read
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    of = {p: info(capsys, p) for p in (run, run / "bundle", run / "bundle_warm", run / "data",
                                       finished / "target")}
    kinds = [found["kind"] for found in of.values()]
    assert kinds == ["run", "bundle", "bundle", "store of activations", "model in Hugging Face layout"]
    fingerprint = of[finished / "target"]["fingerprint"]
    assert {of[p]["target fingerprint"] for p in (run, run / "bundle", run / "data")} == {fingerprint}
    whole = of[run]
    assert whole["finished"] and len(whole["stages"]) == 10 and whole["rows"] == summary["rows"]
    assert whole["bundles"] == ["bundle_warm", "bundle"] and whole["versions"] == summary["versions"]
    for path, key in ((run / "bundle", "rl"), (run / "bundle_warm", "warm_start")):
        fve = next(f for f in summary[key]["heldout"] if f["name"] == "fve")
        assert of[path]["figures"]["heldout"]["fve"] == {k: fve[k] for k in ("value", "low", "high")}
    assert whole["figures of RL"] == of[run / "bundle"]["figures"]
    assert (of[run / "bundle"]["layer"], of[run / "bundle"]["blocks"]) == (0, 2)
    size = sum(p.stat().st_size for p in (run / "data").rglob("*") if p.is_file())
    assert of[run / "data"]["bytes"] == size
    assert {s: a["rows"] for s, a in of[run / "data"]["splits"].items()} == summary["rows"]
    assert of[finished / "target"]["blocks"] == 2 and of[finished / "target"]["parameters"] > 1000
    # As text: one fact a line, with figures and their intervals.
    assert world.nla("info", run / "bundle") == 0
    lines = [re.split("  +", line.strip(), maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["kind", "bundle"] in lines and ["mean direction", "yes"] in lines
    fve = next(f for f in summary["rl"]["heldout"] if f["name"] == "fve")
    low, high = fve["low"], fve["high"]
    assert ["fve", f"{fve['value']:.3f} [{low:.3f}, {high:.3f}]"] in lines
    assert f"does not exist; did you mean '{run / 'bundle'}'?" in refused("info", run / "bundel")
    assert "no bundle, run, store, model" in refused("info", finished / "run" / "done")


# --- results, cache -------------------------------------------------------------------------------


def test_results_page(finished, copy, refused, tmp_path, capsys):
    nasty = "a|b <script>x</script>\n# [l](u) `c` *d* & \\e"
    path = copy / "done" / "eval_rl.json"
    done = json.loads(path.read_text("utf-8"))
    done["samples"]["heldout"][0]["explanation"] = nasty
    path.write_text(json.dumps(done), "utf-8")
    page = tmp_path / "pages" / "tiny.md"
    assert world.nla("results", copy, "--out", page, "--made-by", "nla train X") == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text("utf-8")
    assert "nla train X" in text and "| fve_shuffled |" in text and "![curves](tiny.png)" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "## heldout" in text and "## ood" in text
    (line,) = [x for x in text.splitlines() if "script" in x]
    assert html.unescape(line) == "  - RL: " + nasty.replace("\n", " / ")
    assert not set("|<>[]`*\\") & set(line)
    (copy / "summary.json").unlink()
    assert "no summary.json" in refused("results", copy, "--out", page)


def test_compiled_programs_are_kept(monkeypatch, tmp_path):
    monkeypatch.undo()
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    try:
        cli._use_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_interrupt_and_closed_pipe(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain_command, "_explain", stop)
    assert world.nla(*explain("b")) == 130
    assert capsys.readouterr().err == "nla: stopped; run the same command again to continue\n"
