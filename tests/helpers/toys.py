"""Runs on the toy world of `nla_jax.toy` through the real command line, in processes of their own.

Here things are learned, in minutes; `tests/helpers/world.py` has a run of seconds that learns nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

EXPERIMENT = Path(__file__).parent.parent.parent / "experiments" / "toy.py"


def python(code: str, argv: list, cache: Path) -> subprocess.Popen:
    """Python on `code` as a process of its own, with what it prints in one pipe."""
    # One device, and programs optimised as for users. All are kept in `cache` for the next process.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"NLA_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)],
        env=env,
        cwd=EXPERIMENT.parent.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def build(directory: Path) -> Path:
    finish(python("from nla_jax import toy; toy.main()", [directory], directory / "cache"))
    return directory


def start(world: Path, argv: list, code: str = "") -> subprocess.Popen:
    """`nla ARGV`; `code` runs in its process first."""
    command = f"import sys\n{code}\nfrom nla_jax.cli import main\nsys.exit(main(sys.argv[1:]))"
    return python(command, argv, world / "cache")


def train(
    world: Path, workdir: Path, overrides: list[str] = (), code: str = "", source: Path | None = None
) -> subprocess.Popen:
    """`nla train` of the toy experiment, begun in the background, where `source` is if one is given."""
    overrides = [f"--config.{o}" for o in overrides]
    where = ["--config", f"{EXPERIMENT}:{world}", "--workdir", workdir]
    return start(world, ["train", *where, *(["--from", source] if source else []), *overrides], code)


def finish(process: subprocess.Popen) -> str:
    """What a process printed, once it has ended well."""
    out, _ = process.communicate()
    assert process.returncode == 0, out[-4000:]
    return out


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text("utf-8"))


def figures(workdir: Path, key: str = "rl") -> dict[str, float]:
    """Held-out figures by name; `key` is "warm_start" or "rl"."""
    return {f["name"]: f["value"] for f in summary(workdir)[key]["heldout"]}
