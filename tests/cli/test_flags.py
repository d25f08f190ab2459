"""Flags of all commands: their ranges, hints for typing errors, one meaning, help texts, and completion."""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import nla_jax
from nla_jax import cli
from nla_jax.cli import parser
from nla_jax.util.number_types import real, several, whole
from tests.helpers import world

COMMANDS = dict(parser.commands(cli.make_parser()))
FLAGS = [(words, a) for words, p in COMMANDS.items() for a in p._actions if a.dest != "help"]


def said(capsys, *argv) -> str:
    """The line with which `nla ARGV` is refused."""
    capsys.readouterr()
    assert world.nla(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nla: ") and err.count("\n") == 1
    return err


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (whole(1), {"1": 1, "12": 12}, ("0", "-1", "1.5", "nan", "", "x")),
        (whole(1, 65535), {"65535": 65535}, ("0", "65536")),
        (real(0), {"0": 0.0, "0.7": 0.7}, ("-1", "-1e-9", "nan", "inf", "-inf", "x", "")),
        (real(0, 1), {"0": 0.0, "1": 1.0}, ("1.01", "-0.01", "nan")),
        (real(0, above=True), {"1e-9": 1e-9}, ("0", "-0.0", "nan")),
        (several(whole(0)), {"5,10": [5, 10], "3": [3]}, ("", ",", "1,-1", "1,x")),
        (several(real(0), 2), {"3,15": [3.0, 15.0]}, ("3", "1,2,3", "3,nan", "-1,2")),
    ],
)
def test_a_number_outside_its_range_is_refused(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="must be"):
            kind(text)


def test_no_number_of_any_command_may_be_nan_or_negative():
    """Every flag with a type is one of ours, which refuse what is not finite."""
    numbers = [(words, a) for words, a in FLAGS if a.type is not None]
    assert len(numbers) > 30
    for words, action in numbers:
        for text in ("nan", "inf", "-inf", "-1", "-0.5"):
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)
                raise AssertionError((words, action.option_strings, text))
    typed = {a.type for _, a in numbers}
    assert not {int, float} & typed


def test_the_temperature_of_a_command(capsys):
    text = ("explain", "--text", "x", "--temperature")
    assert "--temperature -1: must be at least 0" in said(capsys, *text, "-1")
    assert "--temperature nan: must be a finite number" in said(capsys, *text, "nan")
    assert "--samples 0: must be at least 1" in said(capsys, "explain", "--text", "x", "--samples", "0")


# --- typing errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, hint",
    [
        ("explian", "unknown command 'explian'; did you mean 'explain'?"),
        ("data extrct", "unknown command 'extrct'; did you mean 'extract'?"),
        ("stats", "unknown command 'stats'; did you mean 'data stats'?"),
        ("explain --bundel b", "unknown argument '--bundel'; did you mean '--bundle'?"),
        ("pack --bundel b --out x", "did you mean '--bundle'?"),  # before the missing --bundle is reported
        ("train --config x.py --wrkdir y", "did you mean '--workdir'?"),
        ("train --rl.steps=3", "did you mean '--config.rl.steps'?"),
        ("export --out x --dtype float23", "--dtype float23: must be one of float32, bfloat16; did you mean"),
        ("train --config experiments/quikstart.py --workdir x", "did you mean 'experiments/quickstart.py'?"),
        ("data explain --out x --provider opnai", "did you mean 'openai'?"),
        ("data explain --out x --corpus nwes", "did you mean 'news'?"),
        ("evaluate --bundle b --probes round_tripp", "did you mean 'round_trip'?"),
        ("evaluate --bundle b --splits heldot", "did you mean 'heldout'?"),
        ("completion bsh", "did you mean 'bash'?"),
    ],
)
def test_a_typing_error_gets_the_nearest_name(argv, hint, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    assert hint in said(capsys, *argv.split())


def test_what_resembles_nothing_gets_no_hint(capsys):
    assert "did you mean" not in said(capsys, "explain", "--qqqqqq")
    assert "did you mean" not in said(capsys, "qqqqqq")


def test_flags_may_still_be_shortened_and_values_may_look_like_flags():
    for argv in (["explain", "--bund", "b"], ["explain", "--text=--bundel"], ["explain", "--text", "a --b"],
                 ["train", "--config.rl.steps=3"]):
        assert parser.refuse_unknown(cli.make_parser(), argv) is None  # it would exit
    with pytest.raises(SystemExit):
        parser.refuse_unknown(cli.make_parser(), ["explain", "--bundel", "b"])


# --- one meaning ----------------------------------------------------------------------------------


def test_a_flag_means_the_same_in_every_command():
    """The same name takes the same kind of value: none, one, or several, of the same type and metavar."""
    kinds = {}
    for words, a in FLAGS:
        # `nla data explain --out` is a file and `nla pack --out` a directory: both the main output.
        like = (a.nargs if a.option_strings else 1, a.type is None, None if a.dest == "out" else a.metavar)
        for name in a.option_strings or [a.dest]:
            kinds.setdefault(name, {}).setdefault(like, []).append(words)
    json_of_positional = kinds.pop("--json")  # with a position, --json takes no FILE, which would swallow it
    assert {like[0] for like in json_of_positional} == {"?", 0}
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_runs_come_by_position_and_stores_by_flag():
    takes = {name: {w for w, a in FLAGS if name in (a.option_strings or [a.dest])}
             for name in ("run", "--workdir", "--store", "--data", "--bundle")}
    assert takes["run"] == {("results",), ("report",), ("watch",)}
    assert takes["--workdir"] == {("train",), ("data", "extract"), ("data", "sweep")}  # they write the run
    assert takes["--store"] == {("evaluate",), ("trust",), ("pack",), ("data", "stats"), ("data", "export")}
    assert takes["--data"] == set()


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_defaults_and_an_example_that_parses(words):
    p = COMMANDS[words]
    text = " ".join(p.format_help().split())
    for a in p._actions:
        assert a.help, (words, a.dest)
        optional = a.nargs == "?" or (a.option_strings and not a.required and a.nargs != 0)
        if optional:
            assert "default" in parser.Help("nla")._get_help_string(a), (words, a.dest)
    assert "%(" not in text
    (example,) = re.findall(r"example:\n  (.+)", p.format_help())
    argv = shlex.split(example, comments=True)
    argv = argv if argv[0] == "nla" else ["nla", *words, "bash"]
    root = cli.make_parser()
    parser.refuse_unknown(root, argv[1:])
    args, rest = root.parse_known_args(argv[1:])
    assert tuple(argv[1 : 1 + len(words)]) == words and all(r.startswith("--config.") for r in rest)


def test_version_help_and_completion_wait_for_no_jax():
    code = """
import sys
from nla_jax import cli
for argv in (["--version"], ["--help"], ["data", "--help"], ["train", "--help"], ["completion", "fish"]):
    try:
        cli.main(argv)
    except SystemExit as e:
        assert not e.code, argv
print(sorted({"jax", "transformers", "orbax", "tensorflow_datasets"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith(f"nla_jax {nla_jax.__version__}\nusage: nla ")


# --- completion -----------------------------------------------------------------------------------


def completed(script, *words) -> set[str]:
    """What bash offers for the last of the words."""
    code = (f"source {script}; COMP_WORDS=({' '.join(map(shlex.quote, words))}); "
            f"COMP_CWORD={len(words) - 1}; COMPREPLY=(); _shtab_nla; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=script.parent)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_flags_choices_and_files(tmp_path, capsys):
    assert world.nla("completion", "bash") == 0
    script = tmp_path / "nla.bash"
    script.write_text(capsys.readouterr().out, "utf-8")
    (tmp_path / "mine").mkdir()
    assert completed(script, "nla", "") == {words[0] for words in COMMANDS}
    assert completed(script, "nla", "data", "ex") == {"extract", "explain", "export"}
    assert completed(script, "nla", "explain", "--te") == {"--text", "--temperature"}
    assert completed(script, "nla", "export", "--dtype", "") == {"float32", "bfloat16"}
    assert completed(script, "nla", "evaluate", "--bundle", "mi") == {"mine"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_has_every_command_and_flag(shell, capsys):
    assert world.nla("completion", shell) == 0
    script = capsys.readouterr().out
    names = itertools.chain(*COMMANDS, (o.lstrip("-") for _, a in FLAGS for o in a.option_strings))
    assert [n for n in names if n not in script] == []


# --- config list and print ------------------------------------------------------------------------


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "experiments"
    place.mkdir()
    (place / "mine.py").write_text(
        '"""My run.\n\nMore about it.\n"""\n\nfrom nla_jax import configs\n\n\ndef get_config(seed="0"):\n'
        "    c = configs.default()\n    c.seed, c.rl.steps = int(seed), 7\n    return c\n"
    )
    (place / "no_experiment.py").write_text("x = 1\n")
    (place / "broken.py").write_text("def get_config(:\n")
    return place


pytest_load = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_config_list_shows_the_experiments_that_there_are(experiments, capsys):
    assert world.nla("config", "list") == 0
    broken, mine = capsys.readouterr().out.splitlines()
    assert mine.split(maxsplit=1) == ["experiments/mine.py", "My run."] and "cannot be read" in broken
    assert world.nla("config", "list", experiments, "--json") == 0
    assert json.loads(capsys.readouterr().out)[str(experiments / "mine.py")] == "My run."
    assert "no experiment files here" in said(capsys, "config", "list", experiments.parent)


@pytest_load
def test_config_print_has_overrides_and_defaults(experiments, capsys):
    command = ("config", "print", "experiments/mine.py:3", "--config.rl.kl=0.5")
    assert world.nla(*command, "--changed") == 0
    assert capsys.readouterr().out.splitlines() == [
        "rl.kl=0.5    # default: 0.01", "rl.steps=7    # default: 100", "seed=3    # default: 0"]
    assert world.nla(*command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rl.kl"] == {"value": 0.5, "default": 0.01}
    assert found["rl.batch"] == {"value": 8, "default": 8}
    assert world.nla("config", "print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) and "rl.steps=100" in lines
    assert "unknown config key 'rl.stepz'" in said(capsys, *command, "--config.rl.stepz=1")


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, "40"])
def test_a_piped_table_cuts_no_name_and_no_value(columns, monkeypatch, capsys):
    from nla_jax.evaluate import figure_table
    from nla_jax.evaluate.probe_types import Figure
    from nla_jax.util.terminal_text import console

    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    name = "fve_mean_direction_of_a_long_name"
    figure = Figure(name, -0.1234, -0.5678, 0.9012, 8, "how close a constant vector comes to every h " * 3)
    console().print(figure_table.table({"warm start": [figure], "RL": [figure]}, "[heldout]: runs/x"))
    out = capsys.readouterr().out
    assert "…" not in out
    cells = ["".join(c.strip() for c in column) for column in
             zip(*[re.split("[│┃]", x)[1:5] for x in out.splitlines() if x[:1] in "│┃"], strict=True)]
    assert name in cells[0]
    assert all("-0.123[-0.568,0.901]" in c.replace(" ", "") for c in cells[1:3])
    assert (name in out) == (columns is None) and max(map(len, out.splitlines())) <= int(columns or 10_000)
    assert "heldout" in out.replace("\n", "")


def test_the_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "nla_jax.cli", "--version"], capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "no_such_platform"})
    assert done.stdout == f"nla_jax {nla_jax.__version__}\n"
