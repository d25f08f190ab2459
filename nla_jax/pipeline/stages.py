"""A whole run: which stages there are, what each needs, and which are done.

    extract -> lessons_ar, lessons_av -> warm_ar, warm_av -> eval_warm -> rl_drill -> rl -> eval_rl -> summary

A stage that has finished leaves WORKDIR/done/STAGE.json; started again, a run goes on with the first
stage that has none, and inside a stage from its last checkpoint. In a pod (`nla_jax.util.distributed`) every
process goes through every stage; process 0 says what is done.
"""

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np

from nla_jax import bundle, configs, errors
from nla_jax.data import store
from nla_jax.evaluate import fve, probe_table
from nla_jax.evaluate.probe_types import Figure
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import sharded_load
from nla_jax.pipeline import activations, config_checks, context, reuse, run_directory, training_stages
from nla_jax.pipeline.context import RunContext
from nla_jax.training import loop
from nla_jax.util import distributed, paths
from nla_jax.util.keys import key_for


def run(
    config,
    workdir: str | Path,
    only: str = "",
    source: str | Path = "",
    host: tuple[int, int] = (0, 1),
) -> dict:
    """Run what is missing of every stage (or up to stage `only`) and return the summary ({} on a process
    of a pod that is not the first).

    Args:
      source: another run, whose finished stages are taken over where the settings agree
        (`nla_jax.pipeline.reuse`).
      host: (i, n): this is host i of n that extract into one directory, each for itself.

    Raises UserError for a config that is impossible, or that differs from the one `workdir` began
    with, and distributed.Stopped after SIGTERM in a stage that trains.
    """
    workdir = paths.absolute(workdir)
    with errors.room(workdir):
        return _run(context.adopt(config_checks.lock(config)), workdir, only, source, host)


def _run(config, workdir: Path, only: str, source: str | Path, host: tuple[int, int]) -> dict:
    run_directory.same_config(config, workdir)
    if source:
        distributed.on_first(lambda: reuse.take_over(config, source, workdir))
    if not only and distributed.agreed((workdir / "summary.json").exists()):
        path = workdir / "summary.json"
        return distributed.on_first(lambda: json.loads(path.read_text("utf-8"))) or {}
    r = context.open_run(config, workdir)
    done = list(distributed.agreed([run_directory.is_done(workdir, stage) for stage, _ in STAGES]))
    # Asked for by name, activations are stored even where the run itself reads online.
    keep = only == "extract"
    done[0] = done[0] and (not keep or distributed.agreed(store.is_complete(workdir / "data")))
    for (stage, work), is_done in zip(STAGES, done, strict=True):
        trains = stage in (*configs.STAGES, *configs.RL_STAGES)
        if not is_done:
            with distributed.sigterm_waits() if trains else contextlib.nullcontext() as sigterm:
                began = time.monotonic()
                outcome = (extract_stage(r, host, keep) if keep and stage == only else work(r)) or {}
                # Until activations are there, the store alone says what they must be made with.
                run_directory.record_config(config, workdir)
                run_directory.finish(
                    workdir, stage, {"seconds": round(time.monotonic() - began, 1), **outcome}
                )
            # Also where the processes wait for each other: what a stage wrote is there for the next.
            if distributed.anyone(trains and sigterm.asked):
                raise distributed.Stopped(f"stopped by SIGTERM, {stage} is done", together=True)
        if trains:
            loop.finished(stage, workdir)
        if stage == only:
            return distributed.on_first(lambda: run_directory.read_done(workdir, only)) or {}
    names = tuple(name for name, _ in STAGES)
    return distributed.on_first(lambda: run_directory.summarise(config, workdir, names)) or {}


def extract_stage(r: RunContext, host: tuple[int, int] = (0, 1), keep: bool = False) -> dict:
    """What the run must know of activations: captured for every split into WORKDIR/data, taken from the
    store that the config names, or, online, measured (unless it is to `keep` them)."""
    c = r.config
    online = c.activations == "online" and not keep and not store.is_complete(r.workdir / "data")
    meta = activations.measure(r) if online else activations.write_store(r, host)
    # Refused here when no explanation fits (or no text is there), while the config can still be mended.
    for stage in configs.STAGES if c.data.store else ("warm_ar", "warm_av"):
        if c[stage].steps:
            training_stages.texts_of(r, stage)
    return {
        "rows": {s: a["rows"] for s, a in meta["splits"].items()},
        "documents": {s: a["documents"] for s, a in meta["splits"].items()},
        "norm": meta["splits"]["warm"]["norm"],
        "drops": meta.get("drops", {}),
        "corpus": meta.get("corpus", {}),
    }


def _write_bundle(r: RunContext, name: str, av, ar, stage: str) -> None:
    c, spec = r.config, context.ready(r).spec
    av_template, ar_template = r.templates
    meta = bundle.sidecar(
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
        training={"seed": c.seed, "kl_estimator": "exact", "config": c.to_dict()},
    )
    bundle.save(r.workdir / name, meta, av, ar, r.tok)


def _evaluate(r: RunContext, name: str) -> dict:
    """Round-trip figures of the bundle at WORKDIR/name, on held-out and out-of-domain rows."""
    c = r.config
    context.ready(r)
    # What is evaluated is what the bundle holds, read back from disk.
    meta = bundle.read_sidecar(r.workdir / name)
    trees = bundle.read_trees(r.workdir / name, meta, r.lm, r.mesh)
    if "final_norm" not in r.base:  # RL dropped it; the frozen target reads the explanations too
        _, r.base = sharded_load.place(r.path, r.mesh, c.dtype)
    runner = Runner(r.spec, r.base, trees["av"], trees["ar"], r.tok, r.templates[1], c.eval.batch)
    out, samples, distances = {}, {}, {}
    mean = activations.mean_direction(r)
    for i, split in enumerate(activations.evaluated(r)):
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
    """The same figures of the final bundle; without RL that is the warm start, and they are known."""
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
    """FVE that RL added on the rows h, from how far it lowered each row's error; the interval is paired."""
    variance = fve.variances(h_ND)
    low, high = fve.ratio_interval(change_N, variance, docs, n=bootstrap, seed=seed)
    value = float(np.sum(change_N) / variance.sum())
    asks = "FVE that RL added on the same rows; a paired interval"
    return Figure("rl_gain", value, low, high, len(h_ND), asks)


def bundle_warm_stage(r: RunContext) -> dict:
    """The warm start as a bundle of its own."""
    av, ar = (training_stages.last_warm(r, role) for role in ("av", "ar"))
    _write_bundle(r, "bundle_warm", av, ar, "warm_start")


def rl_stage(r: RunContext) -> dict:
    """Joint training, then the bundle."""
    av, ar, outcome = training_stages.train_rl(r)
    _write_bundle(r, "bundle", av, ar, "rl" if outcome or r.config.rl_drill.steps else "warm_start")
    return outcome


STAGES = (
    ("extract", extract_stage),
    ("lessons_ar", functools.partial(training_stages.warm_stage, "lessons_ar")),
    ("lessons_av", functools.partial(training_stages.warm_stage, "lessons_av")),
    ("warm_ar", functools.partial(training_stages.warm_stage, "warm_ar")),
    ("warm_av", functools.partial(training_stages.warm_stage, "warm_av")),
    ("bundle_warm", bundle_warm_stage),
    ("eval_warm", lambda r: _evaluate(r, "bundle_warm")),
    ("rl_drill", training_stages.rl_drill_stage),
    ("rl", rl_stage),
    ("eval_rl", eval_rl_stage),
)
