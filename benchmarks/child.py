"""Run one side of a case in a separate process, which executes requests from standard input line by line.

`Child` is the parent's handle; `python -m benchmarks.child` is the process. `Process` is a handle of any
program that answers requests in this way.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import cases, machine

ROOT = Path(__file__).resolve().parent.parent

# Allocator settings that speed PyTorch up on a CPU: large buffers are reused from a heap in huge pages,
# because glibc would otherwise map and unmap them each time.
TORCH_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class Process:
    """A side in a child process, for one request at a time. Use it as a context manager.

    Args:
      side: its name, for messages. argv: the arguments of Python. env: the environment.
      python: the interpreter; default: this one.
    """

    def __init__(self, side: str, argv: list[str], env: dict[str, str], python: Path | str = sys.executable):
        self.side = side
        self.process = subprocess.Popen(
            [str(python), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        try:
            self.ready = self._read()
        except RuntimeError:
            self.__exit__()
            raise

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.side} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, do: str, **more) -> dict:
        print(json.dumps({"do": do, **more}), file=self.process.stdin, flush=True)
        return self._read()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()


def environment(*folders: Path | str, torch: bool = False) -> dict[str, str]:
    """Return the environment of a side, with `folders` first on the import path.

    torch: with the allocator settings for PyTorch on a CPU."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *filter(None, [env.get("PYTHONPATH")])])
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share a GPU
    env["PYTORCH_CUDA_ALLOC_CONF"] = env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return env | TORCH_ENVIRONMENT if torch else env


class Child(Process):
    """A side of a case of `benchmarks.rl_step`."""

    def __init__(self, side: str, case: str, settings: list[str], options: dict, alone: bool = False):
        env = environment(ROOT, torch=options.get("malloc") in ("both", side))
        if alone:
            env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94"}
        words = {"side": side, "case": case, "settings": settings, **options}
        super().__init__(side, ["-m", "benchmarks.child", json.dumps(words)], env)


def wants_compile(wanted: str, device: str) -> bool:
    """Return whether PyTorch compiles: `wanted` is on, off, or auto (on a GPU, and where there is g++)."""
    return wanted == "on" or (wanted == "auto" and (device == "cuda" or shutil.which("g++") is not None))


def _start(words: dict):
    """Return (side, function to time a phase, function to measure the machine, versions and device)."""
    case = cases.choose([words["case"]], words["settings"])[0]
    if words["side"] == "ours":
        import jax

        from benchmarks import ours
        from nla_jax import verbalizer

        verbalizer.parse_ids = ours.whole_answers
        if words.get("platform"):
            jax.config.update("jax_platforms", words["platform"])
        side = ours.Side(case)
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        return side, ours.time_phase, machine.measure_jax, about
    import torch
    import transformers

    from benchmarks import reference

    device = "cuda" if torch.cuda.is_available() and words.get("platform") != "cpu" else "cpu"
    compiled = wants_compile(words.get("torch_compile", "auto"), device)
    static = words.get("torch_cache", "auto")
    static = static == "static" or (static == "auto" and device == "cuda")
    share = bool(words.get("torch_share"))
    dtype = machine.torch_dtype(words.get("torch_dtype", "auto"), device)
    side = reference.Side(case, device, compiled, static, share, dtype)
    about = {"torch": torch.__version__, "transformers": transformers.__version__,
             "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
             "threads": torch.get_num_threads(), "compiled": compiled, "static_cache": static,
             "shared_prompt": share, "dtype": dtype}
    return side, reference.timed, lambda: machine.measure_torch(device), about


def open_answers():
    """Return a function that answers the parent. Libraries print to standard output, which therefore goes to
    standard error from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda value: print(json.dumps(value), file=answers, flush=True)


def main() -> None:
    answer = open_answers()
    side, timed, measure, about = _start(json.loads(sys.argv[1]))
    answer(about)
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "check":
                answer(side.check())
            case "machine":
                answer(measure())
            case "phase":
                begin = time.process_time()
                got = timed(side, request["phase"])
                answer({**got, "cpu": time.process_time() - begin})
            case "memory_reset":
                answer({"rss": machine.rss_peak(), "reset": machine.rss_reset()})
            case "memory":
                answer({"rss": machine.rss_peak(), "device": side.peak_memory(), "notes": side.notes})


if __name__ == "__main__":
    main()
