"""launch/colab.ipynb: committed without outputs, and run from top to bottom on a wheel and the toy config."""

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

import nla_jax
from nla_jax.interchange import pack
from nla_jax.view import notebook
from tests.helpers import wheel as wheels

NOTEBOOK = Path(__file__).parent.parent.parent / "launch" / "colab.ipynb"
SMALL = {
    "data.explained_rows": 40, "data.warm_windows": 10, "data.rl_windows": 10, "data.heldout_rows": 8,
    "warm_ar.steps": 2, "warm_ar.batch": 8, "warm_av.steps": 2, "warm_av.batch": 8, "rl.steps": 2,
    "rl.batch": 4, "rl.group": 2, "rl.max_new": 24, "eval.batch": 8, "eval.bootstrap": 50,
}


@pytest.fixture
def book():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_stripped(book):
    nbformat.validate(book)
    cells = [c for c in book.cells if c.cell_type == "code"]
    assert [(c.outputs, c.execution_count) for c in cells] == [([], None)] * len(cells)
    assert not any(set(c.metadata) - {"tags"} for c in book.cells)
    assert max(len(c.source.splitlines()) for c in cells) < 30  # to be read by a stranger


def said(cell) -> str:
    """All that a cell has printed and shown, as text."""
    shown = [o.get("text") or o.data.get("text/html") or o.data.get("text/plain") for o in cell.outputs]
    return "".join(shown)


def ask(url: str, fields: dict | None = None):
    """(headers, body) of a page, or of an answer to fields."""
    body = None if fields is None else json.dumps(fields).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return answer.headers, answer.read().decode()


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The name of a kernel whose packages are those of the tests, without nla_jax."""
    python = wheels.environment(tmp_path)
    place = tmp_path / "jupyter" / "kernels" / "bare"
    place.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "bare", "language": "python"}
    (place / "kernel.json").write_text(json.dumps(spec), "utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return "bare"


def test_it_runs_from_a_wheel_and_goes_on_where_it_was(
        book, toy_world, finished, wheel, kernel, tmp_path, monkeypatch):
    """In an empty directory, without a checkout."""
    (tmp_path / "toy_world").symlink_to(toy_world)
    run, ships = tmp_path / "run", pack.pack(finished / "run" / "bundle", tmp_path / "shipped")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.txt").write_text("The merry king walked", "utf-8")
    cells = {c.id: (i, c) for i, c in enumerate(book.cells)}
    # What CI chooses, after the choices in the notebook; every other cell is run as it stands.
    cells["parameters"][1].source += (
        f"\nPACKAGE, FILES, BUDGET = {str(wheel)!r}, {str(tmp_path / '*.txt')!r}, 'toy'\n"
        f"WORKDIR, CHANGES = {str(run)!r}, {SMALL!r}\n"
    )
    # A tiny NLA is shipped in this kernel, whose target is on this machine.
    cells["install"][1].source += (
        f"\nimport pathlib\nfrom nla_jax import bundle\nbundle.SHIPPED = pathlib.Path({str(ships)!r})"
    )
    # One device; programs hardly optimized, and each compiled once; nothing in a home directory; no index.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "PIP_NO_INDEX": "1",
    }
    client = NotebookClient(
        book, timeout=None, kernel_name=kernel, resources={"metadata": {"path": str(tmp_path / "empty")}}
    )
    with client.setup_kernel(env=env):
        for i, cell in enumerate(book.cells):
            client.execute_cell(cell, i)
        text = {name: said(c) for name, (_, c) in cells.items() if c.cell_type == "code"}
        headers, page = ask(url := text["explorer"].split('src="')[1].split('"')[0])
        assert "<title>" in page and headers["content-security-policy"].endswith(notebook.FRAMES)
        assert '"tokens"' in ask(f"{url}api/read", {"text": "The merry king walked"})[1]
        # As if stopped in the last evaluation, and the cells run again.
        done = {p.stem: p.stat().st_mtime_ns for p in (run / "done").iterdir()}
        before = json.loads((run / "summary.json").read_text("utf-8"))
        (run / "done" / "eval_rl.json").unlink()
        (run / "summary.json").unlink()
        for name in ("workdir", "run"):
            client.execute_cell(cells[name][1], cells[name][0])
    after = json.loads((run / "summary.json").read_text("utf-8"))
    again = {p.stem for p in (run / "done").iterdir() if p.stat().st_mtime_ns > done[p.stem]}
    assert again == {"eval_rl"}
    for found in (before, after):
        found.pop("seconds")
    assert after == before
    assert text["find"] == "no accelerator: the CPU is used\n"
    assert "jax" in text["devices"] and "1 × cpu" in text["devices"] and "restart" not in text["devices"]
    assert text["words"].count("\n") >= 3 and "' out'" not in text["words"] and "'t'" in text["words"]
    assert f"kept: jax {jax.__version__}, " in text["devices"] and text["install"] == ""
    assert {n: text[n] for n in ("login", "pair")} == {
        "login": "left out: HF_LOGIN in step 1 is off\n", "pair": "left out: PAIR in step 1 is empty\n"}
    rows = (tmp_path / "empty" / "explanations.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(r)["file"] for r in rows] == [str(tmp_path / "mine.txt")] and "mine.txt" in text["own"]
    assert text["workdir"].strip() == f"{run} has nothing yet"
    assert "warm_ar" in text["run"] and "rl  2/2" in text["run"]
    assert text["fve"].count("[") == 4
    assert "srcdoc" in text["report"] and "Content-Security-Policy" in text["report"]
    assert text["sentence"].count("FVE") == 3 and "' tower'" in text["sentence"]
    assert f"{run} has extract" in said(cells["workdir"][1]) and "rl  2/2" not in said(cells["run"][1])


def write_distribution(site: Path, name: str, version: str) -> None:
    """Write what pip reads of an installed package."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    (info / "INSTALLER").write_text("pip\n", "utf-8")
    (info / "RECORD").write_text("", "utf-8")


@pytest.mark.parametrize("version, fits", [("0.10.1", True), ("0.9.2", False)])
def test_pip_keeps_the_jax_of_the_runtime(book, wheel, tmp_path, version, fits):
    """Another jax that fits stays, and with one that does not fit nothing is installed."""
    python = wheels.environment(tmp_path, without=("nla_jax", "jax", "jaxlib"))
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name in ("jax", "jaxlib"):
        write_distribution(site, name, version)
    cells = {c.id: c.source for c in book.cells}
    code = [cells["parameters"], f"PACKAGE = {str(wheel)!r}", cells["find"], cells["install"],
            "print(constraints.read_text())", "print(versions()['jax'], versions()['nla-jax'])"]
    (tmp_path / "empty").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
    done = subprocess.run([python, "-c", "\n".join(code)], env=env, cwd=tmp_path / "empty", text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (site / f"jax-{version}.dist-info").is_dir() and (site / f"jaxlib-{version}.dist-info").is_dir()
    assert bool(list(site.glob("nla_jax*"))) == fits
    if fits:
        assert done.returncode == 0, done.stdout
        assert f"jax=={version}" in done.stdout and f"jaxlib=={version}" in done.stdout
        assert f"\n{version} {nla_jax.__version__}\n" in done.stdout
    else:
        assert done.returncode and "set KEEP_JAX = False in step 1" in done.stdout, done.stdout
        assert "jax" in done.stdout.split("pip failed")[0]
