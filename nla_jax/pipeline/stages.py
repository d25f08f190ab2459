"""A whole run: its stages in order, and which of them are finished.

    extract -> lessons_ar, lessons_av -> warm_ar, warm_av -> eval_warm -> rl_drill -> rl -> eval_rl -> summary

A finished stage writes WORKDIR/done/STAGE.json. A restarted run continues with the first stage that has no
such file, and inside a stage from its last checkpoint. In a pod (`nla_jax.util.distributed`) every process
runs every stage; process 0 decides which are finished.
"""

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np

from nla_jax import bundle, configs, specs
from nla_jax.data import store
from nla_jax.evaluate import fve, probe_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import sharded_load
from nla_jax.pipeline import (
    activations,
    config_checks,
    context,
    fingerprints,
    reuse,
    rl_step,
    run_directory,
    tracking,
    training_stages,
)
from nla_jax.pipeline.context import RunContext
from nla_jax.training import loop
from nla_jax.util import distributed, locks, paths, writable
from nla_jax.util.keys import key_for


def run(
    config,
    workdir: str | Path,
    only: str = "",
    source: str | Path = "",
    host: tuple[int, int] = (0, 1),
) -> dict:
    """Run all unfinished stages (or those up to stage `only`) and return the summary.

    In a pod, processes other than the first return {}. With `only`, the outcome of that stage is returned.

    Args:
      source: another run, whose finished stages are reused if the settings agree
        (`nla_jax.pipeline.reuse`).
      host: (i, n) for host i of n hosts that extract into one directory without a pod.

    Raises UserError for an impossible config, for one that differs from that of the run in `workdir`, for a
    `workdir` that cannot be written, if that run was begun with other weights, tokenizer or texts, and if
    another process uses `workdir`.
    Raises distributed.Stopped after SIGTERM in a training stage.
    """
    workdir = paths.absolute(workdir)
    config = context.apply_bundle(config_checks.lock(config))
    run_directory.check_config(config, workdir)
    if source:
        reuse.check_source(source, workdir)
    if not only and distributed.broadcast_flags((workdir / "summary.json").exists()):
        path = workdir / "summary.json"
        fingerprints.check_target(config, workdir)
        return distributed.run_on_first(lambda: json.loads(path.read_text("utf-8"))) or {}
    writable.check_directory(workdir)
    with contextlib.ExitStack() as locked:
        distributed.run_on_first(lambda: _lock(locked, workdir, host))
        run_directory.check_config(config, workdir)  # another process may have begun a run until now
        return _run(config, workdir, only, source, host)


def _lock(locked: contextlib.ExitStack, workdir: Path, host: tuple[int, int]) -> None:
    """Hold the locks of a run. Hosts that extract together share that of the directory."""
    alone = host[1] == 1
    locked.enter_context(locks.hold_directory(workdir, shared=not alone))
    if not alone:
        lock = workdir / f"{locks.NAME}-host-{host[0]}"
        locked.enter_context(locks.hold(lock, f"--host-index {host[0]} of {workdir}"))


def _run(config, workdir: Path, only: str, source: str | Path, host: tuple[int, int]) -> dict:
    r = context.open_run(config, workdir, source)
    rl_step.fetch(config)
    for probe in probe_table.find_probes(config.eval.probes.split(",")).values():
        probe.fetch()
    with tracking.open_tracker(config, workdir) as r.tracker:
        return _run_stages(r, only, host)


def _run_stages(r: RunContext, only: str, host: tuple[int, int]) -> dict:
    config, workdir = r.config, r.workdir
    done = list(distributed.broadcast_flags([run_directory.is_done(workdir, stage) for stage, _ in STAGES]))
    # `nla data extract` stores activations even if the run itself uses online activations.
    keep = only == "extract"
    done[0] = done[0] and (not keep or distributed.broadcast_flags(store.is_complete(workdir / "data")))
    for (stage, work), is_done in zip(STAGES, done, strict=True):
        trains = stage in (*configs.STAGES, *configs.RL_STAGES)
        if not is_done:
            with distributed.defer_sigterm() if trains else contextlib.nullcontext() as sigterm:
                began = time.monotonic()
                outcome = (extract_stage(r, host, keep) if keep and stage == only else work(r)) or {}
                # config.json is written after the first stage; until then the store's plan has the settings.
                run_directory.record_config(config, workdir)
                run_directory.write_done(
                    workdir, stage, {"seconds": round(time.monotonic() - began, 1), **outcome}
                )
            if "figures" in outcome:
                tracking.log_evaluation(r.tracker, stage, outcome)
            # This is also a barrier, after which the next stage can read this stage's files.
            if distributed.any_process(trains and sigterm.asked):
                raise distributed.Stopped(f"stopped by SIGTERM, {stage} is done", together=True)
        if trains:
            loop.delete_checkpoints(stage, workdir)
        if stage == only:
            return distributed.run_on_first(lambda: run_directory.read_done(workdir, only)) or {}
    names = tuple(name for name, _ in STAGES)
    summary = distributed.run_on_first(lambda: run_directory.summarise(config, workdir, names)) or {}
    tracking.log_summary(r.tracker, summary)
    return summary


def extract_stage(r: RunContext, host: tuple[int, int] = (0, 1), keep: bool = False) -> dict:
    """Run the first stage: capture activations into WORKDIR/data, or link the store that the config names.

    With online activations they are only measured, unless `keep` is set.
    """
    c = r.config
    online = c.activations == "online" and not keep and not store.is_complete(r.workdir / "data")
    meta = activations.measure(r) if online else activations.write_store(r, host)
    # This raises now if a stage has no usable text, before any training.
    for stage in configs.STAGES if c.data.store else ("warm_ar", "warm_av"):
        if c[stage].steps:
            training_stages.texts_of(r, stage)
    rl_step.check_rows(r)
    return {
        "rows": {s: a["rows"] for s, a in meta["splits"].items()},
        "documents": {s: a["documents"] for s, a in meta["splits"].items()},
        "norm": meta["splits"]["warm"]["norm"],
        "drops": meta.get("drops", {}),
        "corpus": meta.get("corpus", {}),
    }


def _write_bundle(r: RunContext, name: str, av, ar, stage: str, **training) -> None:
    c, spec = r.config, context.with_spec(r).spec
    av_template, ar_template = r.templates
    meta = specs.sidecar(
        spec,
        target=c.target,
        target_path=r.path,
        av_rank=c.av.rank,
        ar_rank=c.ar.rank,
        affine=c.av.affine != "none",
        ar_kind=c.ar.kind,
        marker=r.tok.decode([spec.av.marker]),
        av_template=av_template,
        ar_template=ar_template,
        stage=stage,
        max_new=c.rl.max_new,
        mean_D=activations.mean_direction(r),
        training={"seed": c.seed, "kl_estimator": "exact", "config": c.to_dict(), **training},
    ) | {"activations": activations.statistics(r)}
    bundle.save(r.workdir / name, meta, av, ar, r.tok)


def _evaluate(r: RunContext, name: str) -> dict:
    """Compute the figures of the bundle at WORKDIR/name on held-out and out-of-domain rows."""
    c = r.config
    context.with_spec(r)
    # Evaluate the bundle on disk, not the parameters in memory.
    meta = bundle.read_sidecar(r.workdir / name)
    trees = bundle.read_trees(r.workdir / name, meta, r.lm, r.mesh)
    if "final_norm" not in r.base:  # `train_rl` freed parts of the target, which the evaluation needs again
        _, r.base = sharded_load.place(r.path, r.mesh, c.dtype)
    runner = Runner(r.spec, r.base, trees["av"], trees["ar"], r.tok, r.templates[1], c.eval.batch)
    out, samples, distances = {}, {}, {}
    mean = activations.mean_direction(r)
    for i, split in enumerate(activations.evaluation_splits(r)):
        columns = activations.columns_of(r, split)
        figures, trip = probe_table.evaluate(
            runner,
            columns,
            mean,
            key_for(c.seed, "evaluate", i),
            temperature=c.eval.temperature,
            max_new=c.eval.max_new or c.rl.max_new,
            bootstrap=c.eval.bootstrap,
            seed=c.seed,
            label=f"{name} {split}",
            probes=c.eval.probes.split(","),
            more={"settings": c.to_dict()},
        )
        out[split] = [dataclasses.asdict(f) for f in figures]
        distances[split] = [round(e, 3) for e in fve.errors(trip.h_text, columns["h"], trip.ok).tolist()]
        samples[split] = [
            {
                "doc_id": columns["doc_id"][j],
                "text": columns["text"][j],
                "explanation": trip.explanations[j],
                "written": columns["explanation"][j],
            }
            for j in range(min(10, len(columns["text"])))
        ]
    return {"figures": out, "samples": samples, "errors": distances}


def eval_rl_stage(r: RunContext) -> dict:
    """Evaluate the final bundle and RL's gain. Without RL it is the warm start, so its figures are reused."""
    known = run_directory.read_done(r.workdir, "eval_warm")
    if not (r.config.rl.steps or r.config.rl_drill.steps):
        return {name: known[name] for name in ("figures", "samples")}
    found, gains = _evaluate(r, "bundle"), {}
    for split, before in known.get("errors", {}).items():
        columns = activations.columns_of(r, split)
        change = np.subtract(before, found["errors"][split])
        gain = paired_gain(change, columns["h"], columns["doc_id"], r.config.eval.bootstrap, r.config.seed)
        gains[split] = dataclasses.asdict(gain)
    return {**found, "gain": gains}


def paired_gain(change_N, h_ND, docs, bootstrap: int, seed: int) -> Figure:
    """Return the FVE that RL added on the rows h, with a paired interval.

    change_N: by how much RL lowered each row's squared error.
    """
    variance = fve.variances(h_ND)
    low, high = fve.ratio_interval(change_N, variance, docs, n=bootstrap, seed=seed)
    value = float(np.sum(change_N) / variance.sum())
    asks = "FVE that RL added on the same rows; a paired interval"
    return Figure("rl_gain", value, low, high, len(h_ND), asks)


def bundle_warm_stage(r: RunContext) -> dict:
    """Write the warm start as a bundle."""
    av, ar = (training_stages.last_warm(r, role) for role in ("av", "ar"))
    _write_bundle(r, "bundle_warm", av, ar, "warm_start")


def rl_stage(r: RunContext) -> dict:
    """Run joint RL, then write the bundle."""
    av, ar, outcome = training_stages.train_rl(r)
    chosen = {"chosen": outcome["chosen"]} if "chosen" in outcome else {}
    _write_bundle(r, "bundle", av, ar, "rl" if outcome or r.config.rl_drill.steps else "warm_start", **chosen)
    paths.remove(r.workdir / "params" / "rl_at")
    return outcome


_WORK = {
    "extract": extract_stage,
    **{name: functools.partial(training_stages.warm_stage, name) for name in configs.STAGES},
    "bundle_warm": bundle_warm_stage,
    "eval_warm": lambda r: _evaluate(r, "bundle_warm"),
    "rl_drill": training_stages.rl_drill_stage,
    "rl": rl_stage,
    "eval_rl": eval_rl_stage,
}
STAGES = tuple((name, _WORK[name]) for name in configs.RUN_STAGES)
