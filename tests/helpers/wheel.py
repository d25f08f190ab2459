"""A wheel of this checkout, and environments without the checkout in which it is installed."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def pip(*argv) -> None:
    quiet = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]
    subprocess.run([*quiet, *map(str, argv)], check=True)


def build(place: Path) -> None:
    """Build the wheel in `place`."""
    source = place / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("nla_jax", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", place, source)
    shutil.rmtree(source)


def environment(place: Path, without: tuple[str, ...] = ("nla_jax",)) -> Path:
    """Make a virtual environment with the packages of this one, except some, and return its interpreter.

    Nothing is copied, and what pip installs there stays there.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    known = place / "packages"
    known.mkdir()
    for found in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = found.name.lower().removeprefix("__editable__.").removeprefix("__editable___")
        if not any(name.startswith((f"{w}-", f"{w}.", f"{w}_0")) for w in without) and found.suffix != ".pth":
            (known / found.name).symlink_to(found)
    python = place / "venv" / "bin" / "python"
    (site,) = (place / "venv" / "lib").glob("python*/site-packages")
    (site / "known.pth").write_text(f"{known}\n", "utf-8")
    return python
