"""Run one side of a problem in a separate process, which executes requests line by line.

`start` makes the parent's handle; `python -m benchmarks.fve.child` is the process.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

import nla_jax
from benchmarks import child, machine
from benchmarks.fve import problem as problems
from nla_jax.errors import UserError


def start(name: str, kind: str, directory: Path, links: Path, release: Path | None = None,
          torch_compile: str = "auto", torch_dtype: str = "auto") -> child.Process:
    """Start a side.

    Args:
      name, kind: kind is "ours" or "torch". directory: of its problem.
      links: an empty directory. release: another checkout, whose nla_jax is used with these benchmarks.
    """
    folders = [child.ROOT]
    if release:
        links.mkdir(parents=True)
        (links / "benchmarks").symlink_to(child.ROOT / "benchmarks")
        folders = [links, release]
    words = {"kind": kind, "directory": str(directory), "torch_compile": torch_compile,
             "torch_dtype": torch_dtype}
    env = child.environment(*folders, torch=kind == "torch")
    # -P: the working directory would otherwise come before PYTHONPATH, and its nla_jax before the release's.
    process = child.Process(name, ["-P", "-m", "benchmarks.fve.child", json.dumps(words)], env)
    source = process.ready.pop("source")
    if release and Path(source).resolve() != release.resolve():
        process.__exit__()
        raise UserError(f"--release {release}: Python imports nla_jax from {source}; uninstall that one")
    return process


def _open(words: dict):
    """Return (side, about)."""
    directory = Path(words["directory"])
    source = {"source": str(Path(nla_jax.__file__).parent.parent)}
    if words["kind"] == "ours":
        import jax

        from benchmarks.fve import ours

        about = {"jax": jax.__version__, "nla_jax": nla_jax.__version__,
                 "device": jax.devices()[0].device_kind}
        return ours.Side(directory), about | source
    import torch
    import transformers

    from benchmarks.fve import reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = child.wants_compile(words["torch_compile"], device)
    side = reference.Side(directory, device, compiled, machine.torch_dtype(words["torch_dtype"], device))
    about = {"torch": torch.__version__, "transformers": transformers.__version__, "compiled": compiled,
             "threads": torch.get_num_threads(), "device": device, "dtype": side.dtype}
    return side, about | source


def answer_request(side, request: dict) -> dict:
    """Do what a request asks of a side, and return the answer."""
    match request["do"]:
        case "check":
            return side.check()
        case "warm_up":  # two steps, because answers have other lengths in each; then back to the start
            begin = time.perf_counter()
            for i in range(min(2, side.problem.about["steps"])):
                side.run(i)
            side.reset()
            return {"seconds": time.perf_counter() - begin}
        case "run":
            done = [side.run(i) for i in range(request["first"], request["end"])]
            return {"steps": done, "rss": machine.rss_peak()}
        case "export":
            np.savez(request["path"], **problems.flatten(side.export()))
    return {}


def main() -> None:
    answer = child.open_answers()
    side, about = _open(json.loads(sys.argv[1]))
    answer(about)
    for line in sys.stdin:
        answer(answer_request(side, json.loads(line)))


if __name__ == "__main__":
    main()
