"""Log a run to Weights & Biases (the extra `wandb`). A failure of W&B never ends the run.

The package is imported when a log is opened. WANDB_MODE, WANDB_API_KEY, WANDB_DIR and the other variables of
W&B have their usual meaning. nla_jax reads no key.
"""

import importlib.util
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nla_jax.errors import UserError, one_line
from nla_jax.util import distributed, metrics_log, paths

FILE = "wandb.json"  # in the run's directory: the project and the id of the W&B run
SAMPLES = 200  # rows of a stage's table of samples, the newest
_UPLOAD_SECONDS = 300  # the end of a run waits so long for W&B's uploads


def check(project: str) -> None:
    """Raise UserError if `project` is not PROJECT or ENTITY/PROJECT, or if the package is missing."""
    if not re.fullmatch(r"([\w.-]+/)?[^/\\#?%:]{1,128}", project):
        raise UserError(f"config wandb={project!r}: give PROJECT or ENTITY/PROJECT, without \\ # ? % :")
    found = importlib.util.find_spec("wandb")
    # A directory `wandb`, which W&B itself makes, is found as a package without an origin.
    if distributed.is_first() and not (found and found.origin):
        raise UserError("config wandb: the package is missing; pip install 'nla_jax[wandb]', or omit --wandb")


class WandbLog:
    """The W&B log of a run, or one that does nothing. After the first failure it does nothing either."""

    def __init__(self, run=None):
        self._run, self._stages = run, set()

    def row(self, stage: str, step: int, numbers: dict) -> None:
        """Log the numbers of a step as STAGE/NAME. The arguments are those of a metrics callback."""

        def work(run):
            if stage not in self._stages:  # stages count their steps from 0; W&B's own step must only grow
                run.define_metric(f"{stage}/step", hidden=True)
                run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._stages.add(stage)
            run.log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in numbers.items()}})

        self._try(work)

    def samples(self, stage: str, file: Path) -> None:
        """Log the texts in a stage's metrics file (its values that are {"text", "reward"}) as a table."""

        def work(run):
            rows = [[r["step"], name, v["text"], v["reward"]] for r in metrics_log.read(file)
                    for name, v in r.items() if isinstance(v, dict) and {"text", "reward"} <= v.keys()]
            if rows:
                head = ("step", "answer", "text", "reward")
                self._log_table(run, f"{stage}/samples", head, rows[-SAMPLES:])

        self._try(work)

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Log a table under a name such as "eval_rl/heldout/figures"."""
        self._try(lambda run: self._log_table(run, name, head, rows))

    def summary(self, numbers: dict) -> None:
        """Set values of the run's summary."""
        self._try(lambda run: run.summary.update(numbers))

    def __enter__(self) -> "WandbLog":
        return self

    def __exit__(self, error, *_) -> None:
        """End the log, as that of a failed run after an exception, and wait for its uploads."""
        self._try(lambda run: run.finish(exit_code=int(error is not None)))
        self._run = None

    def _log_table(self, run, name: str, head: Sequence[str], rows: Sequence[Sequence]) -> None:
        import wandb

        # A column of mixed types would be refused; a lone surrogate has no UTF-8.
        plain = [[v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in row]
                 for row in rows]
        run.log({name: wandb.Table(columns=list(head), data=plain, allow_mixed_types=True)})

    def _try(self, work: Callable) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        except Exception as e:
            self._run = None
            _warn(e)


def _warn(e: Exception) -> None:
    print(f"W&B: tracking failed and ends here; the run goes on ({type(e).__name__}: {one_line(e)})",
          file=sys.stderr)


def open_log(project: str, directory: Path, config: dict) -> WandbLog:
    """Return the log of the run in `directory`, on process 0; elsewhere, or without a project, an idle one.

    The id in `directory`/wandb.json makes a resumed run the same W&B run. If W&B cannot be reached or has no
    key, one warning follows and the log is idle.

    Args:
      project: "PROJECT", "ENTITY/PROJECT", or "".
      config: nested settings, logged as the run's config.
    """
    if not project or not distributed.is_first():
        return WandbLog()
    try:
        return WandbLog(_start(project, paths.path(directory), config))
    except Exception as e:
        _warn(e)
        return WandbLog()


def _start(project: str, directory: Path, config: dict):
    import wandb

    entity, _, name = project.rpartition("/")
    file = directory / FILE
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if known.get("project") != project:
        known = {"project": project, "id": secrets.token_hex(4)}
        paths.write(file, json.dumps(known))
    here = None if paths.is_remote(directory) else str(directory)
    return wandb.init(
        entity=entity or None,
        project=name,
        id=known["id"],
        resume="allow",
        name=directory.name,
        config=config,
        dir=os.environ.get("WANDB_DIR") or here,
        # Neither the terminal's output nor source code and uncommitted changes are uploaded.
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, quiet=True,
                                finish_timeout=_UPLOAD_SECONDS),
    )
