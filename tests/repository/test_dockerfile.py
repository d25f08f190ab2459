"""The Dockerfile: built where a docker daemon and its base image are, and linted everywhere."""

import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "Dockerfile").read_text("utf-8")


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, without comments."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    return [tuple(x.split(None, 1)) for x in "\n".join(lines).replace("\\\n", " ").splitlines() if x.strip()]


def test_what_it_copies_exists_and_is_sent_to_the_daemon(monkeypatch):
    rules = [r for r in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if r and r[0] != "#"]
    copied = []
    for name, arguments in instructions():
        if name == "COPY":
            owner, *sources, _ = arguments.split()
            assert owner == "--chown=1000"
            copied += sources
    assert {"setup.py", "nla_jax", "experiments", "launch"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        kept = [not r.startswith("!") for r in rules if fnmatch(source, r.lstrip("!"))]
        assert kept and not kept[-1], source
    assert rules[0] == "*"  # nothing else, such as runs or files of tokens
    asked = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = re.findall(r"EXTRAS=([a-z,]+)", TEXT + (ROOT / "launch" / "gke.sh").read_text("utf-8"))
    assert extras and set(",".join(extras).split(",")) <= asked["extras_require"].keys()
    read = [name for name in ("README.md", "LICENSE", "pyproject.toml") if name in copied]
    assert len(read) == 3  # setup.py reads them, before the code is there


def test_it_runs_as_an_ordinary_user_and_holds_no_secret():
    names = [name for name, _ in instructions()]
    users = [arguments for name, arguments in instructions() if name == "USER"]
    assert users == ["1000"] and names.index("USER") < names.index("COPY")
    assert not re.search(r"(ARG|ENV)[^\n]*(TOKEN|KEY|SECRET)", TEXT)


def test_it_is_linted():
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_is_built_where_docker_is():
    """And the command in it runs. Nothing is built without a daemon, or a registry that has the base."""
    base = f"python:{re.search(r'ARG PYTHON=(.+)', TEXT)[1]}-slim"
    there = shutil.which("docker") and not subprocess.run(
        ["docker", "pull", "--quiet", base], capture_output=True, timeout=300).returncode
    if there:
        subprocess.run(["docker", "build", "--tag", "nla_jax_test", ROOT], check=True)
        say = ["docker", "run", "--rm", "nla_jax_test", "nla", "--version"]
        assert subprocess.run(say, capture_output=True, text=True).stdout.startswith("nla_jax ")
