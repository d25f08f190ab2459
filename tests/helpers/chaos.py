"""Kills a run at random moments with kill -9, starts it again, and wants the numbers of a run left alone.

    python -m tests.helpers.chaos --kills 50                      one or all of two processes with two devices
    each python -m tests.helpers.chaos --kills 50 --processes 1        a single process

Half of the kills come at any time, the others while a checkpoint or parameters are being written: whether
one did cut that short is seen by what it left. Every start is on another day, and the chat template prints
the date. Every second run has a directory with an odd name. In every run a second start is tried, which must
be refused, and one start finds the disk full. A run that came through is compared, to the last bit, and
another one is begun, until there were enough kills. Exit status 1 when anything differed, or when a refusal
was not told in one line.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nla_jax.lm import tokenizer as tok_lib
from nla_jax.util import locks
from tests.helpers import world
from tests.helpers.flags import DEVICES, FAST

LAUNCH = Path(__file__).parent.parent.parent / "launch"
CHANGES = [
    "checkpoint_every=1", "data.ood=", "lessons_ar.steps=0", "warm_ar.steps=3", "warm_av.steps=3",
    "rl.steps=5", "rl.batch=4", "rl.group=2",
]
ODD = "killed [lr=1]\\*{x} 100% \u00fc"  # characters of patterns, templates, formats and other systems' paths
DATED = "<|im_start|>system\nToday is {{ strftime_now('%A, %d %b %Y') }}.<|im_end|>\n"
# Python reads a file of this name at its start.
CLOCK = """
import datetime, os
class Moved(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=int(os.environ["NLA_TEST_DAY"]))
datetime.datetime = Moved
"""


class Run:
    """`nla train` on the world in `directory`, begun in the background: a pod, or one process.

    `logs` gets what each process printed, and its id. `day`: how many days the clock is ahead, if the world
    is `dated`. `room`: the largest file that it can write, in bytes, as on a full disk; 0: any.
    """

    def __init__(self, directory: Path, workdir: Path, processes: int, devices: int, changes=(), *,
                 day: int = 0, room: int = 0, logs: str = ""):
        self.workdir, self.processes = workdir, processes
        self.logs = workdir.with_name(f"{workdir.name}{logs}.logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        for old in self.logs.iterdir():
            old.unlink()
        nla = [sys.executable, "-m", "nla_jax.cli", "train", "--config", directory / "experiment.py"]
        nla += ["--workdir", workdir, *(f"--config.{c}" for c in changes)]
        pod = ["bash", LAUNCH / "local_pod.sh", "--processes", processes, "--devices", devices]
        pod += ["--logs", self.logs, "--"]
        # Programs are hardly optimized, and all are kept for the next start.
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{FAST} {DEVICES}={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "NLA_CACHE": str(directory / f"cache-{processes}x{devices}"),
            "NLA_TEST_DAY": str(day),
        }
        if (directory / "sitecustomize.py").exists():
            env["PYTHONPATH"] = f"{directory}{os.pathsep}{env.get('PYTHONPATH', '')}"
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))) if room else None
        with open(self.logs / ("launcher.log" if processes > 1 else "process-0.log"), "w") as out:
            argv = [str(a) for a in ([*pod, *nla] if processes > 1 else nla)]
            # The limit is not for the log: cat writes it.
            self.log = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) if room else None
            to = self.log.stdin if self.log else out
            self.process = subprocess.Popen(
                argv, env=env, cwd=LAUNCH.parent, stdout=to, stderr=to, preexec_fn=limit
            )
        if processes == 1:
            (self.logs / "process-0.pid").write_text(str(self.process.pid))

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait_for(self, seen) -> None:
        """Until `seen()`, or the end of the run."""
        while self.alive() and not seen():
            time.sleep(0.002)

    def send(self, number: int, victims) -> None:
        """A signal to these processes of the pod, as soon as they are there."""
        paths = [self.logs / f"process-{i}.pid" for i in victims]
        self.wait_for(lambda: all(p.exists() and p.read_text().strip() for p in paths))
        for path in paths:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                if self.alive():
                    os.kill(int(path.read_text()), number)

    def end(self) -> int:
        status = self.process.wait()
        if self.log:
            self.log.stdin.close()
            self.log.wait()
        return status

    def printed(self) -> str:
        return "\n".join(p.read_text("utf-8", "replace") for p in sorted(self.logs.glob("*.log")))


def dated(directory: Path) -> None:
    """Make the target's chat template print the date, and the clock of a `Run` one that `day` moves."""
    tok = tok_lib.load(directory / "target")
    tok.chat_template = DATED + tok.chat_template
    tok_lib.save(tok, directory / "target")
    (directory / "sitecustomize.py").write_text(CLOCK, "utf-8")


def second_start(run: Run, directory: Path, devices: int, changes=()) -> str:
    """Start the same run again while it is going, and return what is wrong with how that ends; "" if it is
    refused in one line."""
    run.wait_for((run.workdir / locks.NAME).exists)
    again = Run(directory, run.workdir, 1, devices, changes, logs="-second")
    status, going = again.end(), run.alive()
    said = [line for line in again.printed().splitlines() if line.startswith("nla: ")]
    refused = status == 2 and len(said) == 1 and f"{run.workdir} is in use by process" in said[0]
    return "" if refused or not going else f"a second start ended with {status}: {again.printed()[-2000:]}"


def half_written(workdir: Path) -> set[tuple[str, int]]:
    """(name, inode) of what Orbax is writing now, or was when it was killed."""
    patterns = ("checkpoints/*/*orbax-checkpoint-tmp*", "params/*orbax-checkpoint-tmp*",
                "bundle*/*orbax-checkpoint-tmp*")
    found = set()
    for path in (p for pattern in patterns for p in workdir.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            found.add((str(path.relative_to(workdir)), path.stat().st_ino))
    return found


def saving(workdir: Path) -> bool:
    """Whether Orbax is writing something now."""
    return bool(half_written(workdir))


def numbers(workdir: Path) -> dict[str, str]:
    """Everything that a run has found out, as text by file: metrics, and the summary without its times."""
    out = {p.name: p.read_text("utf-8") for p in (workdir / "metrics").glob("*.jsonl")}
    summary = json.loads((workdir / "summary.json").read_text("utf-8"))
    del summary["seconds"]
    return {**out, "summary.json": json.dumps(summary)}


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def chaos(
    directory: Path, kills: int, processes: int, devices: int, seed: int = 0, say=print
) -> tuple[int, int]:
    """(files of numbers that differed from those of a run left alone, and other faults; kills that cut a save
    short), after `kills` kills."""
    rng, days = random.Random(seed), itertools.count()
    start = lambda workdir, **how: Run(
        directory, workdir, processes, devices, CHANGES, day=next(days), **how)
    # Once for the compiled programs, once for the time it takes.
    for name in ("first", "alone"):
        began, alone = time.monotonic(), start(directory / name)
        assert alone.end() == 0, alone.printed()[-4000:]
    seconds = time.monotonic() - began
    say(f"left alone: {seconds:.0f} s")
    done, bad, cut, round_ = 0, 0, 0, 0
    while done < kills:
        workdir = directory / (f"{ODD}-{round_}" if round_ % 2 else f"killed-{round_}")
        run, before, full = start(workdir), set(), False
        if fault := second_start(run, directory, devices, CHANGES):
            bad += 1
            say(fault)
        while done < kills:
            moment = rng.uniform(0, seconds)
            if rng.random() < 0.5:
                end = time.monotonic() + moment
                run.wait_for(lambda end=end: time.monotonic() > end)
                when = f"{moment:.1f} s after its start"
            else:
                after = time.monotonic() + moment / 2
                new = lambda w=workdir, b=before: half_written(w) - b
                run.wait_for(lambda a=after, new=new: time.monotonic() > a and new())
                when = "while it saved"
            if not run.alive():
                break
            victims = rng.choice([[rng.randrange(processes)], range(processes)])
            run.send(signal.SIGKILL, victims)
            status = run.end()
            if status == 0:
                break
            done += 1
            left = sorted(name for name, _ in half_written(workdir) - before)
            cut += bool(left)
            which = "one" if len(victims) < processes else "all"
            say(f"kill {done}: {which} of {processes}, {when}{'; left ' * bool(left)}{', '.join(left)}")
            if not full:
                full, room = True, rng.choice([2_000, 20_000, 60_000])
                run = start(workdir, room=room)
                status, told = run.end(), "no room left on the disk" in run.printed()
                # The logs of a pod's processes have the limit too.
                told |= processes > 1 and any(p.stat().st_size >= room for p in run.logs.glob("*.log"))
                say(f"no file beyond {room} bytes: status {status}{', told' * told}")
                if status and not told:
                    bad += 1
                    say(run.printed()[-4000:])
            before = half_written(workdir)
            run = start(workdir)
        assert run.end() == 0, run.printed()[-4000:]
        found = differing(numbers(directory / "alone"), numbers(workdir))
        say(f"came through: {', '.join(found) or 'nothing'} differs")
        bad, round_ = bad + len(found), round_ + 1
    return bad, cut


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        dated(world.lay_out(Path(directory)))
        say = lambda line: print(line, flush=True)
        bad, cut = chaos(Path(directory), args.kills, args.processes, args.devices, args.seed, say)
    print(f"{args.kills} kills, {cut} of them in the middle of a save; {bad} differing files or other faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
