"""docs/howto/own.md: its code runs outside the checkout, on an installed wheel. Wrong names are refused."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import bundle, objectives, verbalizer
from nla_jax.data import corpora
from nla_jax.errors import UserError
from nla_jax.evaluate import probe_table
from nla_jax.interchange.export_pair import export_pair
from nla_jax.pipeline import config_checks, held_out_rows
from nla_jax.util import metrics_log
from tests.helpers import flags, world
from tests.helpers.wheel import pip

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "howto" / "own.md").read_text("utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [shlex.split(c.replace("\\\n", " ")) for c in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
RUN = """
import json, os, sys
import nla_jax
from nla_jax import cli
argvs = json.load(open("commands.json"))
out = {"file": nla_jax.__file__, "statuses": [cli.main(argv) for argv in argvs]}
sys.path.append(os.getcwd())
import my_loop
out["rewards"] = my_loop.train("runs/own/bundle", ["an old town by the sea", "the king went home"], 2)
out["files"] = sorted({m.__file__ for n, m in sys.modules.items() if n.startswith("nla_jax") and m.__file__})
json.dump(out, open("result.json", "w"))
"""


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory into which a wheel of this checkout is installed."""
    place = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", place / "lib", wheel)
    return place / "lib"


@pytest.fixture(scope="module")
def ran(installed, finished, programs, tmp_path_factory):
    """The directory in which the page was followed, with its outcome in result.json."""
    place, rng = tmp_path_factory.mktemp("elsewhere"), np.random.default_rng(0)
    for name, code in FILES.items():
        (place / name).write_text(code, "utf-8")
    words = lambda: " ".join("".join(rng.choice(list("aeioulnrst"), 4)) for _ in range(120))
    (place / "texts.tsv").write_text("".join(f"d{i}\t{words()}\n" for i in range(40)), "utf-8")
    instead = {"experiments/quickstart.py": f"{finished / 'experiment.py'}", "1000": "32"}
    assert {w for c in COMMANDS for w in c} >= instead.keys() and {c[0] for c in COMMANDS} == {"nla"}
    (place / "commands.json").write_text(json.dumps([[instead.get(w, w) for w in c[1:]] for c in COMMANDS]))
    env = os.environ | {
        "PYTHONPATH": f"{installed}", "XLA_FLAGS": flags.FAST, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": f"{programs / 'xla'}", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with open(place / "log.txt", "w") as log:
        status = subprocess.run([sys.executable, "-P", "-c", RUN], cwd=place, env=env, stdout=log, stderr=log)
    assert status.returncode == 0, (place / "log.txt").read_text("utf-8")[-5000:]
    return place


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The files of the page in a working directory of their own."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_runs_on_the_installed_wheel(ran, installed):
    result = json.loads((ran / "result.json").read_text("utf-8"))
    assert installed / "nla_jax" / "__init__.py" == Path(result["file"])
    assert all(Path(f).is_relative_to(installed) for f in result["files"]) and len(result["files"]) > 60
    log = (ran / "log.txt").read_text("utf-8")
    assert result["statuses"] == [0] * len(COMMANDS) == [0] * 4, log[-5000:]
    assert len(result["rewards"]) == 2 and np.isfinite(result["rewards"]).all()
    assert max(result["rewards"]) <= -np.log(0.1) + 1e-5


def test_each_of_them_was_used(ran):
    written = [json.loads(line) for line in (ran / "mine.jsonl").read_text("utf-8").splitlines()]
    assert len(written) == 32
    assert all(r["doc_id"].startswith("reader:my_corpora:tabs:texts.tsv:d") for r in written)
    assert all(r["explanation"].startswith("It begins: ") for r in written)
    meta = bundle.read_sidecar(ran / "runs" / "own" / "bundle")
    assert meta["extraction"]["injection"] == "my_injections:add"
    config = meta["training"]["config"]
    assert config["rl"]["reward"] == "my_rewards:clipped"
    assert config["rl"]["advantage"] == "my_advantages:ranks"
    assert config["data"]["corpus"] == "reader:my_corpora:tabs:texts.tsv"
    notes = [line.split(",") for line in (ran / "notes.csv").read_text("utf-8").splitlines()]
    rows = metrics_log.read(ran / "runs" / "own" / "metrics" / "rl.jsonl")
    assert [float(n[2]) for n in notes if n[0] == "rl"] == [r["reward"] for r in rows] and len(rows) == 2
    assert {n[0] for n in notes} == {"lessons_ar", "warm_ar", "warm_av", "rl"}
    figures = json.loads((ran / "figures.json").read_text("utf-8"))["heldout"]["figures"]
    assert {"fve", "fve_sorted_words"} <= {f["name"] for f in figures}


def test_a_reward_and_an_advantage(elsewhere):
    mse, ok = jnp.array([0.05, 0.5, 0.3]), jnp.array([True, True, False])
    np.testing.assert_allclose(
        objectives.reward(mse, ok, "my_rewards:clipped"), -np.log([0.1, 0.5, 2.0]), rtol=1e-6
    )
    ranks = objectives.advantages(jnp.array([[3.0, 9.0, 1.0]]), "my_advantages:ranks")
    np.testing.assert_allclose(ranks, [[0.0, 1.0, -1.0]])


def test_a_corpus(elsewhere):
    (elsewhere / "texts.tsv").write_text("a\tone  text\nb\tanother text\nc\tone text\n", "utf-8")
    found = corpora.open_corpus("reader:my_corpora:tabs:texts.tsv?limit=2")
    assert [(d.doc_id.split(":")[-1], d.text) for d in found] == [("a", "one text"), ("b", "another text")]


@pytest.mark.parametrize(
    "setting, value, named",
    [
        ("rl.reward", "cosine", "must be one of 'mse', 'log_mse', or your own as 'module:function'"),
        ("rl.reward", "my_rewards:gone", "module 'my_rewards' has no function 'gone'"),
        ("rl.reward", "nowhere_at_all:f", "cannot import 'nowhere_at_all'"),
        ("av.injection", "my_injections:gone", "module 'my_injections' has no function 'gone'"),
        ("metrics_callback", "note", "metrics_callback='note': must be 'module:function'"),
        ("data.corpus", "reader:my_corpora:gone:x", "module 'my_corpora' has no function 'gone'"),
        ("data.ood", "reader:my_corpora", "reader='my_corpora:': must be 'module:function'"),
    ],
)
def test_a_name_that_means_nothing(elsewhere, finished, setting, value, named):
    config = world.config(finished)
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(UserError, match=re.escape(named)):
        config_checks.validate(config)


def test_a_probe_or_a_provider_that_there_is_not(elsewhere, capsys):
    for name, said in (("magic", "must be one of 'round_trip'"), ("my_probes:gone", "no function 'gone'")):
        with pytest.raises(UserError, match=said):
            probe_table.find_probes(["form", name])
    found = probe_table.find_probes(["all", "my_probes:word_order"])
    assert [*found] == [*probe_table.PROBES, "my_probes:word_order"]
    for name, said in (("magic", "must be one of 'local'"), ("my_providers:gone", "no function 'gone'")):
        assert world.nla("data", "explain", "--provider", name, "--out", "x.jsonl") == 2
        assert said in capsys.readouterr().err


def test_functions_that_do_not_fit(elsewhere, capsys):
    (elsewhere / "unfit.py").write_text(
        "import jax.numpy as jnp\n"
        "def alone(v, marker):\n    return v\n"
        "def short(v, marker):\n    return v[:, :-1], None\n"
        "def fails(stage, step, numbers):\n    raise KeyError(step)\n"
        "def texts(place):\n    yield 'a text'\n"
        "def number(evidence, label):\n    return 3.0\n"
        "def broken(prompt):\n    raise OSError('the cable is out')\n"
    )
    for name, said in (("alone", "the function fails on arrays"), ("short", "must return two arrays")):
        with pytest.raises(UserError, match=said):
            verbalizer.adds_to_stream(f"unfit:{name}", 8)
    log = metrics_log.MetricsLog(elsewhere, "rl", callback="unfit:fails")
    with pytest.raises(UserError, match=r"'unfit:fails' failed at rl step 3 \(KeyError: 3\)"):
        log.write(3, {"reward": 1.0})
    log.close()
    with pytest.raises(UserError, match=r"record 0: the function must yield \(id, string\), not 'a text'"):
        corpora.open_corpus("reader:unfit:texts")
    runner = types.SimpleNamespace(round_trip=lambda *args, **options: None)
    with pytest.raises(UserError, match="probe 'unfit:number': the function must return a list"):
        options = dict(temperature=1.0, max_new=4, probes=["unfit:number"])
        probe_table.evaluate(runner, {"h": None}, None, None, **options)
    (elsewhere / "texts.tsv").write_text("a\tone two three four five six seven eight\n", "utf-8")
    explain = ["data", "explain", "--corpus", "reader:my_corpora:tabs:texts.tsv", "--out", "x.jsonl", "--yes"]
    explain += ["--n", "1", "--min-words", "3", "--max-words", "5", "--provider", "unfit:broken"]
    assert world.nla(*explain) == 2
    assert "provider 'unfit:broken' failed (OSError: the cable is out); what was" in capsys.readouterr().err
    sys.modules.pop("unfit")


def test_a_bundle_whose_injection_is_not_here(ran, tmp_path):
    made = ran / "runs" / "own" / "bundle"
    with pytest.raises(UserError, match="injection of the bundle='my_injections:add': cannot import"):
        bundle.load(made)
    with pytest.raises(UserError, match="my_injections:add injection, which the official format cannot"):
        export_pair(made, tmp_path / "out")
    (tmp_path / "bundle").mkdir()
    shutil.copy(made / bundle.SIDECAR, tmp_path / "bundle")
    (tmp_path / "bundle" / "my_injections.py").write_text("raise SystemExit\n")
    with pytest.raises(UserError, match="needs the code 'my_injections:add' and brings my_injections.py"):
        bundle.read_sidecar(tmp_path / "bundle")
    with pytest.raises(UserError, match="needs the code 'reader:my_corpora:tabs:texts.tsv' and brings"):
        held_out_rows.config_of(tmp_path / "bundle", bundle.read_sidecar(made))
