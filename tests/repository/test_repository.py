"""The repository itself: light import, one version, packaged data, no traces of one machine."""

import ast
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nla_jax

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("nla_jax", "benchmarks", "experiments", "launch", "tests", "docs", ".ci")
TEXT = {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".cfg", ".csv", ""}
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])


def project_files():
    """Text files of the project: its folders and the files beside setup.py."""
    found = [p for p in ROOT.iterdir() if p.is_file()]
    for folder in FOLDERS:
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [p for p in found if p.suffix in TEXT and "__pycache__" not in p.parts]


def run_python(code, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_import_is_light():
    """No device (the platform named here does not exist), no flags, no heavy packages."""
    code = """
import sys
import nla_jax
from absl import flags
import jax
heavy = {"torch", "tensorflow", "tensorflow_datasets", "transformers", "gguf", "matplotlib",
         "orbax.checkpoint", "grain"}
print("heavy:", sorted(heavy & set(sys.modules)))
print("parsed:", flags.FLAGS.is_parsed())
try:
    jax.devices()
except RuntimeError:
    print("devices: untouched until asked for")
"""
    done = run_python(code, "--no_such_flag=1", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "heavy: []",
        "parsed: False",
        "devices: untouched until asked for",
    ]


def test_public_names_resolve():
    missing = [name for name in nla_jax.__all__ if not hasattr(nla_jax, name)]
    undocumented = [name for name in nla_jax.__all__ if not getattr(nla_jax, name).__doc__]
    assert (missing, undocumented) == ([], [])
    # An imported module takes the place of a name of its own.
    assert {m.name for m in pkgutil.iter_modules(nla_jax.__path__)} & set(nla_jax.__all__) == set()


def test_one_version():
    setup = re.search(r'^VERSION = "(.+)"$', (ROOT / "setup.py").read_text(), re.M).group(1)
    changes = (ROOT / "CHANGELOG.md").read_text().split("## [Unreleased]", 1)[1]
    newest = re.search(r"\d+\.\d+\.\d+", changes).group()
    assert nla_jax.__version__ == setup == newest


def test_setup_names_every_imported_package():
    """What nla_jax imports, at module level or inside functions, setup.py requires."""
    own_name = {"yaml": "pyyaml", "tensorflow_datasets": "tensorflow-datasets"}
    own_name |= {"orbax": "orbax-checkpoint", "absl": "absl-py", "sklearn": "scikit-learn"}
    brought = {"jaxlib", "huggingface_hub", "tokenizers", "setuptools", "requests"}
    imported = set()
    for path in (ROOT / "nla_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"nla_jax"} - brought
    setup = (ROOT / "setup.py").read_text()
    unnamed = {n for n in third_party if not re.search(rf'"{own_name.get(n, n)}[\[>=<"]', setup)}
    assert unnamed == set()


def test_package_data():
    explanations = ROOT / "nla_jax" / "data" / "warmstart" / "explanations.jsonl"
    with open(explanations, encoding="utf-8") as f:
        assert sum(1 for _ in f) == 3900
    setup = (ROOT / "setup.py").read_text()
    for data in ("data/warmstart/*", "shipped/*", "view/static/*", "view/explorer/static/*"):
        assert f'"{data}"' in setup


def test_no_paths_of_one_machine():
    # Put together here, so that this file does not contain them.
    slash, up = "/", ".." + "/"
    forbidden = [slash + name + slash for name in ("work", "farm", "root", "home", "Users")]
    forbidden += [up + "shared", up + ".library"]
    files = project_files()
    assert ROOT / "setup.py" in files and Path(__file__).resolve() in files
    found = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}: {bad}" for bad in forbidden if bad in text]
    assert found == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_environment_refuses_an_unfit_python():
    code = f'source "{ROOT}/launch/env.sh"; NLA_PYTHON=no-such-python nla_find_python'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "nla: NLA_PYTHON=no-such-python is not a Python 3.11, 3.12 or 3.13\n"
