"""What a run logs to Weights & Biases apart from its metrics: figures, verdicts and samples."""

from pathlib import Path

from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.verdict import verdict
from nla_jax.pipeline import held_out_rows, run_directory
from nla_jax.util import paths
from nla_jax.util.wandb_log import WandbLog, open_log

FIGURES = ("name", "value", "low", "high", "n", "asks")


def open_tracker(config, workdir: Path) -> WandbLog:
    """Return the log of the run at `workdir`; config.wandb says whether and where."""
    return open_log(config.wandb, workdir, {**config.to_dict(), "versions": run_directory.versions()})


def log_evaluation(log: WandbLog, stage: str, outcome: dict) -> None:
    """Log the figures, verdict and samples of an evaluation stage (`stages._evaluate`)."""
    for split, figures in outcome["figures"].items():
        found = [Figure(**f) for f in figures]
        log_figures(log, f"{stage}/{split}", found, verdict(found))
    for split, samples in outcome["samples"].items():
        head = ("doc_id", "text", "explanation", "written")
        rows = [[s["doc_id"], s["text"], s["explanation"] or "", s["written"] or ""] for s in samples]
        log.table(f"{stage}/{split}/samples", head, rows)


def log_figures(log: WandbLog, name: str, figures: list[Figure], sentences: list[str]) -> None:
    """Log figures as a table and as numbers of the summary, and the sentences of the verdict as a table."""
    log.table(f"{name}/figures", FIGURES, [[getattr(f, key) for key in FIGURES] for f in figures])
    log.table(f"{name}/verdict", ("sentence",), [[s] for s in sentences])
    log.summary({f"{name}/{f.name}": f.value for f in figures})


def log_summary(log: WandbLog, summary: dict) -> None:
    """Log the numbers at the top of summary.json, and the seconds of each stage."""
    numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
    log.summary(numbers | {f"seconds/{stage}": s for stage, s in summary.get("seconds", {}).items()})


def log_grounding(project: str, bundle: Path, tables: dict) -> None:
    """Log the grounding tables of a bundle, {split: `grounding.Table`}, in the W&B run of its training.

    A bundle that is not in a tracked run gets a W&B run of its own.
    """
    name = paths.absolute(bundle).name
    with open_log(project, held_out_rows.evaluation_dir(bundle), {}) as log:
        for split, t in tables.items():
            log_figures(log, f"grounding/{name}/{split}", t.figures, t.verdict)
