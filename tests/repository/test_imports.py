"""Imports go down, those inside functions included, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# From the ground up; a line may import from the lines above it, and names of one line from each other.
ORDER = """
errors
util
sharding
lm
prompts
verbalizer reconstructor target
objectives
specs
rl
steps
bundle
data
configs
providers
recipes toy
training
evaluate
interchange
api
pipeline
studies
view
cli
"""
LEVELS = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}


def imports_of(path: Path, modules) -> set[str]:
    """Modules of the package that a file imports. `import nla_jax` gives no more than the version."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            full = [f"{node.module}.{a.name}" for a in node.names]
            found |= {name if name in modules else node.module for name in full}
    return found & modules - {"nla_jax"}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    paths = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "nla_jax").rglob("*.py")}
    files = {".".join(p.parts).removesuffix(".__init__"): ROOT / p.with_suffix(".py") for p in paths}
    return {name: imports_of(path, files.keys()) for name, path in files.items()}


def level(module: str) -> int:
    return LEVELS[module.split(".")[1]]


def test_imports_go_down(graph):
    edges = [(a, b) for a, found in graph.items() for b in found if a != "nla_jax"]
    assert len(edges) > 500
    assert [f"{a} imports {b}" for a, b in edges if level(b) > level(a)] == []


def test_no_circle(graph):
    left = dict(graph)
    while free := [m for m, found in left.items() if not found & left.keys() - {m}]:
        left = {m: found for m, found in left.items() if m not in free}
    assert left == {}


def test_few_modules_at_the_root():
    assert len(list((ROOT / "nla_jax").glob("*.py"))) <= 14
