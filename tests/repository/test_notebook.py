"""launch/colab.ipynb: committed without outputs, and run from top to bottom on the toy config."""

import json
import os
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from nla_jax.interchange import pack
from nla_jax.view import notebook

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


def test_it_runs_and_goes_on_where_it_was(book, toy_world, finished, tmp_path):
    (tmp_path / "toy_world").symlink_to(toy_world)
    run, ships = tmp_path / "run", pack.pack(finished / "run" / "bundle", tmp_path / "shipped")
    cells = {c.id: (i, c) for i, c in enumerate(book.cells)}
    # What CI chooses, in place of the choices in the notebook; every other cell is run as it stands.
    cells["parameters"][1].source = (
        f"BUDGET, REPOSITORY, WORKDIR, CHANGES = 'toy', '', {str(run)!r}, {SMALL!r}\n"
        # A tiny NLA is shipped in this kernel, whose target is on this machine.
        f"import pathlib\nfrom nla_jax import bundle\nbundle.SHIPPED = pathlib.Path({str(ships)!r})"
    )
    # One device; programs hardly optimized, and each compiled once; nothing in a home directory.
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
    }
    client = NotebookClient(
        book, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
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
    assert text["workdir"].strip() == f"{run} has nothing yet"
    assert "warm_ar" in text["run"] and "rl  2/2" in text["run"]
    assert text["fve"].count("[") == 4
    assert "srcdoc" in text["report"] and "Content-Security-Policy" in text["report"]
    assert text["sentence"].count("FVE") == 3 and "' tower'" in text["sentence"]
    assert f"{run} has extract" in said(cells["workdir"][1]) and "rl  2/2" not in said(cells["run"][1])
