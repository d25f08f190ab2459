"""Measure the time to a held-out FVE: nla_jax, a PyTorch reference and another release, in turns.

    python -m benchmarks.time_to_fve --from runs/quickstart --json out.json --plot out.png
    python -m benchmarks.time_to_fve --from runs/quickstart --no-torch --variant k2:rl.update_group=2
    python -m benchmarks.time_to_fve --from runs/quickstart --release v0.1.0 --no-torch --json out.json

All sides start from the warm start of the run and train on the same batches with the same losses, reward and
learning rates. Each side is a process that waits while another works. The clock counts training alone:
compilation, exports and evaluation are outside. After every few steps each side exports its pair, and one
evaluator measures it on held-out rows through text: FVE by the side's own AR and by the frozen target.

Before the timing the sides must agree: on log-probabilities of the same answers and AR's predictions in
float32, and on losses, KL and gradient norms of an update. docs/performance.md explains the figures.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import agreement, machine
from benchmarks.child import ROOT, Process
from benchmarks.fve import child, points
from benchmarks.fve import problem as problems
from nla_jax.errors import UserError
from nla_jax.evaluate import written_explanations
from nla_jax.evaluate.runner import Runner
from nla_jax.pipeline import activations, context


@dataclasses.dataclass
class Side:
    """One side: its settings, its process and its points so far."""

    name: str
    kind: str  # ours | torch
    settings: list[str]
    release: Path | None = None
    problem: Path | None = None
    process: Process | None = None
    steps: int = 0
    seconds: float = 0.0
    points: list = dataclasses.field(default_factory=list)
    metrics: list = dataclasses.field(default_factory=list)
    about: dict = dataclasses.field(default_factory=dict)

    def result(self) -> dict:
        return {"kind": self.kind, "settings": self.settings, "about": self.about, "points": self.points,
                "steps": self.metrics}


def find_release(name: str, place: Path) -> Path:
    """Return a checkout: a directory, or a git ref of this one, which is unpacked into `place`."""
    if (Path(name) / "nla_jax" / "__init__.py").is_file():
        return Path(name).resolve()
    done = subprocess.run(["git", "archive", "--format=tar", name, "nla_jax"], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise UserError(f"--release {name}: neither a checkout of nla_jax nor a git ref of this one")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(place, filter="data")
    return place


def sides_of(args, scratch: Path) -> list[Side]:
    """Return the sides that the arguments ask for."""
    out = [Side("ours", "ours", args.set)]
    for word in args.variant:
        name, colon, settings = word.partition(":")
        if not colon or not name or name in {s.name for s in out}:
            raise UserError(f"--variant {word}: write NAME:KEY=VALUE,KEY=VALUE with a new name")
        out.append(Side(name, "ours", [*args.set, *settings.split(",")]))
    if args.release:
        out.append(Side("release", "ours", args.set, find_release(args.release, scratch / "release")))
    if not args.no_torch:
        out.append(Side("torch", "torch", args.set))
    return out


def check_agreement(first: dict, other: dict) -> dict:
    """Return the differences between two `check` answers. Raises SidesDisagree if one is too large."""
    out = agreement.check_agreement(first, other)
    for phase in ("ar", "av"):
        if phase in first:
            out |= agreement.check_scalar_agreement(phase, first[phase], other[phase])
    return out


class Run:
    """A comparison in progress: the sides, the evaluator, and the JSON so far."""

    def __init__(self, args, sides: list[Side], scratch: Path):
        self.args, self.sides, self.scratch = args, sides, scratch
        self.end = time.monotonic() + 60 * args.minutes
        self.found = {"machine": machine.describe(), "stage": args.stage, "from": str(args.source),
                      "sides": {}, "checks": {}, "time_to": {}}

    def prepare(self) -> None:
        """Write each side's problem, and open the evaluator."""
        made: dict[tuple, Path] = {}
        steps = self.args.steps
        for side in self.sides:
            if side.kind == "torch":
                problems.refuse_for_torch(problems.read_config(self.args.source, side.settings))
            if tuple(side.settings) in made:
                side.problem = made[tuple(side.settings)]
                continue
            side.problem = made[tuple(side.settings)] = self.scratch / side.name / "problem"
            config = problems.read_config(self.args.source, side.settings, steps, self.args.stage)
            r = context.open_run(config, self.scratch / side.name / "run", self.args.source)
            trees = problems.start_trees(context.with_spec(r), self.args.stage)
            pair = trees["av"], trees["ar"]
            runner = Runner(r.spec, r.base, *pair, r.tok, r.templates[1], config.eval.batch)
            self.steps = steps = config[self.args.stage].steps  # of all sides
            if side is self.sides[0]:
                self.evaluator = self._evaluator(r, runner)
                first = problems.batches(r, self.args.stage, 1)[0]
                self.check = problems.checked_answers(r, runner, first)
            problems.write(r, self.args.stage, steps, side.problem, self.check, trees)

    def _evaluator(self, r, runner: Runner) -> points.Evaluator:
        c, columns, written = r.config, activations.columns_of(r, "heldout"), None
        if self.args.stage == "warm_ar":
            pick, written = written_explanations.training_form(columns, c.to_dict(), runner)
            columns = {name: [columns[name][i] for i in pick] for name in ("h", "doc_id")}
            columns["h"] = np.stack(columns["h"])
        rows = min(self.args.rows or len(columns["h"]), len(columns["h"]))
        written = written and written[:rows]
        given = self.args.temperature
        temperature = c.eval.temperature if given is None else given
        self.found["evaluation"] = {"rows": rows, "temperature": temperature}
        return points.Evaluator(runner, columns, rows, seed=c.seed, temperature=temperature,
                                max_new=c.rl.max_new, bootstrap=c.eval.bootstrap, written=written)

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start the processes, let them agree, and warm them up."""
        answers = {}
        for side in self.sides:
            links = self.scratch / side.name / "links"
            side.process = stack.enter_context(child.start(
                side.name, side.kind, side.problem, links, side.release, self.args.torch_compile,
                self.args.torch_dtype))
            side.about = dict(side.process.ready)
            answers[side.name] = side.process.ask("check")
            if side is not self.sides[0] and side.settings == self.sides[0].settings:
                self.found["checks"][side.name] = check_agreement(answers["ours"], answers[side.name])
        log("the sides agree", **{n: max(c.values()) for n, c in self.found["checks"].items()})
        for side in self.sides:
            side.about["warm_up_s"] = side.process.ask("warm_up")["seconds"]
            log("warmed up", side=side.name, seconds=side.about["warm_up_s"])
        start = self.measure(self.sides[0])
        for side in self.sides:
            side.points.append(start | {"step": 0, "seconds": 0.0})

    def measure(self, side: Side) -> dict:
        path = self.scratch / f"{side.name}.npz"
        side.process.ask("export", path=str(path))
        trees = problems.nest(dict(np.load(path, allow_pickle=False)))
        return self.evaluator.measure({"av": {}, "ar": {}} | trees)  # no arrays: the frozen target

    def turn(self, side: Side) -> None:
        """Let a side train for `every` steps, then measure it."""
        end = min(side.steps + self.args.every, self.steps)
        got = side.process.ask("run", first=side.steps, end=end)
        side.metrics += got["steps"]
        side.seconds += sum(m["seconds"] for m in got["steps"])
        side.steps, side.about["rss"] = end, got["rss"]
        point = self.measure(side) | {"step": end, "seconds": side.seconds}
        side.points.append(point)
        log("point", side=side.name, step=end, seconds=side.seconds,
            **{r: point[r]["fve"] for r in points.READERS if r in point})

    def train(self) -> None:
        """Give turns to the sides until all steps are done or the next round would exceed the time."""
        while any(s.steps < self.steps for s in self.sides):
            began = time.monotonic()
            for side in self.sides:
                self.turn(side)
            self.save()
            if time.monotonic() + (time.monotonic() - began) > self.end:
                if any(s.steps < self.steps for s in self.sides):
                    log("the time is up", steps=self.sides[0].steps, of=self.steps)
                    self.found["stopped_at_step"] = self.sides[0].steps
                break
        self.save()

    def save(self) -> None:
        self.found["sides"] = {s.name: s.result() for s in self.sides}
        self.found["time_to"] = points.summarise(self.found["sides"], self.args.levels)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1) + "\n", "utf-8")


def log(event: str, **values) -> None:
    words = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
    print("  ".join([event, *words]), file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="source", type=Path, required=True, metavar="RUN",
                   help="a run with a finished warm start, such as runs/quickstart")
    p.add_argument("--stage", choices=problems.STAGES, default="rl",
                   help="rl: from the warm start. warm_ar: AR on written explanations, from the target")
    p.add_argument("--steps", type=int, default=0, help="steps of the stage; 0: as in the run's config")
    p.add_argument("--every", type=int, default=3, help="steps of a turn, after which FVE is measured")
    p.add_argument("--minutes", type=float, default=14.0, help="no round begins that would exceed this")
    p.add_argument("--rows", type=int, default=0, help="held-out rows; 0: all")
    p.add_argument("--temperature", type=float, help="of the evaluation; 0: greedy; default: the config's")
    p.add_argument("--levels", type=lambda text: [float(x) for x in text.split(",")], default=[],
                   help="FVE levels of the table, comma-separated; default: multiples of .05")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="change the config of all sides")
    p.add_argument("--variant", action="append", default=[], metavar="NAME:KEY=VALUE,...",
                   help="one more side: nla_jax with other settings; may be repeated")
    p.add_argument("--release", default="", help="one more side: another checkout, or a git ref of this one")
    p.add_argument("--no-torch", action="store_true", help="leave the PyTorch side out")
    p.add_argument("--torch-compile", choices=("auto", "on", "off"), default="off",
                   help="on: compiles for minutes first, and again for every new width of answers")
    machine.add_torch_dtype(p)
    p.add_argument("--json", type=Path)
    p.add_argument("--plot", type=Path)
    return p


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of the evaluator, beside the sides
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        run = Run(args, sides_of(args, Path(scratch)), Path(scratch))
        run.save()  # fails now if the file cannot be written
        run.prepare()
        run.start(stack)
        run.train()
    print("\n".join(points.table(run.found)))
    if args.plot:
        points.plot(run.found, args.plot)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, agreement.SidesDisagree, RuntimeError) as err:
        sys.exit(f"benchmarks: {err}")
