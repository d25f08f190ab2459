"""A whole run: which stages there are, what each needs, and which are done.

    extract -> lessons_ar, lessons_av -> warm_ar, warm_av -> eval_warm -> rl -> eval_rl -> summary

A stage that has finished leaves WORKDIR/done/STAGE.json; started again, a run goes on with the first
stage that has none, and inside a stage from its last checkpoint. In a pod (`nla_jax.pod`) every process
goes through every stage; process 0 says what is done.
"""

import contextlib
import dataclasses
import functools
import json
import time
from pathlib import Path

from nla_jax import activations as A
from nla_jax import (
    branch,
    build,
    bundle,
    checkpoint,
    configs,
    errors,
    paths,
    pod,
    prompts,
    rundir,
    steps,
)
from nla_jax import context as C
from nla_jax import mesh as mesh_lib
from nla_jax import train as T
from nla_jax.data import online, order, store
from nla_jax.errors import UserError
from nla_jax.evaluate import report
from nla_jax.evaluate.evidence import elsewhere
from nla_jax.evaluate.roundtrip import Runner
from nla_jax.evaluate.watch import watcher
from nla_jax.lm import params as params_lib
from nla_jax.lm import stream


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
        (`nla_jax.branch`).
      host: (i, n): this is host i of n that extract into one directory, each for itself.

    Raises UserError for a config that is impossible, or that differs from the one `workdir` began
    with, and pod.Stopped after SIGTERM in a stage that trains.
    """
    workdir = paths.absolute(workdir)
    with errors.room(workdir):
        return _run(C.adopt(configs.lock(config)), workdir, only, source, host)


def _run(config, workdir: Path, only: str, source: str | Path, host: tuple[int, int]) -> dict:
    rundir.same_config(config, workdir)
    if source:
        pod.on_first(lambda: branch.take_over(config, source, workdir))
    if not only and pod.agreed((workdir / "summary.json").exists()):
        path = workdir / "summary.json"
        return pod.on_first(lambda: json.loads(path.read_text("utf-8"))) or {}
    r = C.open_run(config, workdir)
    done = list(pod.agreed([rundir.is_done(workdir, stage) for stage, _ in STAGES]))
    # Asked for by name, activations are stored even where the run itself reads online.
    keep = only == "extract"
    done[0] = done[0] and (not keep or pod.agreed(store.is_complete(workdir / "data")))
    for (stage, work), is_done in zip(STAGES, done, strict=True):
        trains = stage in (*configs.STAGES, "rl")
        if not is_done:
            with pod.sigterm_waits() if trains else contextlib.nullcontext() as sigterm:
                began = time.monotonic()
                outcome = (extract_stage(r, host, keep) if keep and stage == only else work(r)) or {}
                # Until activations are there, the store alone says what they must be made with.
                rundir.record_config(config, workdir)
                rundir.finish(workdir, stage, {"seconds": round(time.monotonic() - began, 1), **outcome})
            # Also where the processes wait for each other: what a stage wrote is there for the next.
            if pod.anyone(trains and sigterm.asked):
                raise pod.Stopped(f"stopped by SIGTERM, {stage} is done", together=True)
        if trains:
            T.finished(stage, workdir)
        if stage == only:
            return pod.on_first(lambda: rundir.read_done(workdir, only)) or {}
    names = tuple(name for name, _ in STAGES)
    return pod.on_first(lambda: rundir.summarise(config, workdir, names)) or {}


def extract_stage(r: C.Run, host: tuple[int, int] = (0, 1), keep: bool = False) -> dict:
    """What the run must know of activations: captured for every split into WORKDIR/data, taken from the
    store that the config names, or, online, measured (unless it is to `keep` them)."""
    c = r.config
    online = c.activations == "online" and not keep and not store.is_complete(r.workdir / "data")
    meta = A.measure(r) if online else A.write_store(r, host)
    # Refused here when no explanation fits (or no text is there), while the config can still be mended.
    for stage in configs.STAGES if c.data.store else ("warm_ar", "warm_av"):
        if c[stage].steps:
            _texts(r, stage)
    return {
        "rows": {s: a["rows"] for s, a in meta["splits"].items()},
        "documents": {s: a["documents"] for s, a in meta["splits"].items()},
        "norm": meta["splits"]["warm"]["norm"],
        "drops": meta.get("drops", {}),
        "corpus": meta.get("corpus", {}),
    }


def _texts(r: C.Run, stage: str) -> T.Texts | T.FreshTexts:
    """The rows of a warm-start stage and their words. Raises UserError when there is none that fits."""
    pairing = T.pairing(r.config, stage, r.tok, C.ready(r).spec, r.templates[1])
    if r.config.activations == "online":
        return T.FreshTexts(online.Passes(r.config.data, r.config.seed, r.tok, "warm"), **pairing)
    return T.Texts(A.columns_of(r, "warm"), **pairing)


def _warm_stage(stage: str, r: C.Run) -> dict:
    """lessons_av, lessons_ar, warm_av, warm_ar: supervised training of one role."""
    kind, role = stage.split("_")
    c, s = r.config, r.config[stage]
    spec = C.ready(r).spec
    before = f"lessons_{role}"
    first = kind == "lessons" or not (r.workdir / "params" / before).exists()
    if not s.steps or (role == "ar" and c.ar.kind == "frozen"):
        return {}
    texts = _texts(r, stage)
    tree = C.fresh(r, role) if first else C.load_params(r, role, before)
    state = mesh_lib.learner(tree, build.optimizer(c, stage), r.mesh)
    if role == "ar":
        batch = functools.partial(T.ar_batch, texts, r.tok, spec, r.templates[1], s.max_tokens)
        step = _whole(build.warm_step(c, stage, spec, state))
    else:
        batch, step = _av_feed(r, stage, texts, state)
    state = T.fit(
        stage,
        state,
        lambda state, b, i: step(state, r.base, b, i),
        lambda i: mesh_lib.batch(batch(i), r.mesh),
        s.steps,
        workdir=r.workdir,
        every=c.checkpoint_every,
        log_every=c.log_every,
        max_skipped=c.rl.max_skipped,
    )
    checkpoint.save_tree(r.workdir / "params" / stage, state.params)
    return {
        "steps": s.steps,
        "skipped": int(state.skipped),
        "rows": len(texts.rows),
        "too_long": texts.dropped,
    }


def _whole(step):
    """A step that is the same whatever its number."""
    return lambda state, base, batch, i: step(state, base, batch)


def _av_feed(r: C.Run, stage: str, texts, state):
    """(i -> batch, step) of a stage of AV's. A drill reads the short prompt; of the written stage a share
    `lessons` of the steps are drill steps, which go on where lessons_av ended."""
    c, s, spec = r.config, r.config[stage], r.spec
    full = functools.partial(T.av_batch, texts, r.tok, spec, s.max_tokens)
    share = s.get("lessons", 0.0)
    if not share and s.get("form", "full") == "full":
        return full, _whole(build.warm_step(c, stage, spec, state))
    short = dataclasses.replace(spec, av=prompts.drill_prompt(spec.av))
    lessons = _texts(r, "lessons_av") if share else texts
    drill = functools.partial(T.av_batch, lessons, r.tok, short, c.lessons_av.max_tokens)
    drill_step = build.warm_step(c, stage, short, state)
    if not share:
        return drill, _whole(drill_step)
    step, first = build.warm_step(c, stage, spec, state), c.lessons_av.steps
    before = lambda i: int(i * share + 1e-9)  # noqa: E731 - drill steps before step i
    is_drill = lambda i: before(i + 1) > before(i)  # noqa: E731
    return (
        lambda i: drill(first + before(i)) if is_drill(i) else full(i - before(i)),
        lambda state, base, b, i: (drill_step if is_drill(i) else step)(state, base, b),
    )


def _last_warm(r: C.Run, role: str) -> dict:
    if role == "ar" and r.config.ar.kind == "frozen":
        return C.fresh(r, role)
    for stage in (f"warm_{role}", f"lessons_{role}"):
        if (r.workdir / "params" / stage).exists():
            return C.load_params(r, role, stage)
    if r.config.init:
        return C.fresh(r, role)
    raise UserError(f"{r.workdir}: no warm start of {role.upper()} found; delete done/ and start again")


def _write_bundle(r: C.Run, name: str, av, ar, stage: str) -> None:
    c, spec = r.config, C.ready(r).spec
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
        mean_D=A.mean_direction(r),
        training={"seed": c.seed, "kl_estimator": "exact", "config": c.to_dict()},
    )
    bundle.save(r.workdir / name, meta, av, ar, r.tok)


def _evaluate(r: C.Run, name: str) -> dict:
    """Round-trip figures of the bundle at WORKDIR/name, on held-out and out-of-domain rows."""
    c = r.config
    C.ready(r)
    # What is evaluated is what the bundle holds, read back from disk.
    meta = bundle.read_sidecar(r.workdir / name)
    trees = bundle.read_trees(r.workdir / name, meta, r.lm, r.mesh)
    if "final_norm" not in r.base:  # RL dropped it; the frozen target reads the explanations too
        _, r.base = stream.place(r.path, r.mesh, c.dtype)
    runner = Runner(r.spec, r.base, trees["av"], trees["ar"], r.tok, r.templates[1], c.eval.batch)
    out, samples = {}, {}
    mean = A.mean_direction(r)
    for i, split in enumerate(A.evaluated(r)):
        columns = A.columns_of(r, split)
        figures, trip = report.evaluate(
            runner,
            columns,
            mean,
            T.key_for(c.seed, "evaluate", i),
            temperature=c.eval.temperature,
            max_new=c.eval.max_new or c.rl.max_new,
            bootstrap=c.eval.bootstrap,
            seed=c.seed,
            label=f"{name} {split}",
            more={"settings": c.to_dict()},
        )
        out[split] = [dataclasses.asdict(f) for f in figures]
        samples[split] = [
            {
                "doc_id": columns["doc_id"][j],
                "text": columns["text"][j],
                "explanation": trip.explanations[j],
                "written": columns["explanation"][j],
            }
            for j in range(min(10, len(columns["text"])))
        ]
    return {"figures": out, "samples": samples}


def eval_rl_stage(r: C.Run) -> dict:
    """The same figures of the final bundle; without RL that is the warm start, and they are known."""
    if not r.config.rl.steps:
        known = rundir.read_done(r.workdir, "eval_warm")
        return {name: known[name] for name in ("figures", "samples")}
    return _evaluate(r, "bundle")


def bundle_warm_stage(r: C.Run) -> dict:
    """The warm start as a bundle of its own."""
    _write_bundle(r, "bundle_warm", _last_warm(r, "av"), _last_warm(r, "ar"), "warm_start")


def rl_stage(r: C.Run) -> dict:
    """Joint training, then the bundle."""
    c, o = r.config, r.config.rl
    spec = C.ready(r).spec
    ref = build.reference(_last_warm(r, "av"), c.dtype)
    av, ar = _last_warm(r, "av"), _last_warm(r, "ar")
    if not o.steps:
        _write_bundle(r, "bundle", av, ar, "warm_start")
        return {}
    watched = 0 < o.watch_every <= o.steps
    if not (c.av.rank or c.ar.rank or c.ar.kind == "frozen" or c.activations == "online"):
        # From here on no step computes anything from the target: its memory is the step's, but for the blocks
        # that read held-out explanations.
        r.base = params_lib.truncate(r.base, spec.layer + 1) if watched else {}
    if c.activations == "online":
        batch_at = online.Fresh(c.data, c.seed, r.tok, o.batch).at
    else:
        columns = A.columns_of(r, "rl")
        if o.shuffle_h:
            columns["goal"] = columns["h"][elsewhere(columns["doc_id"])]
        draws = order.epoch_indices(len(columns["h"]), o.batch, c.seed, "rl")
        batch_at = lambda i: T.rl_batch(columns, batch=o.batch, seed=c.seed, step=i, draws=draws)  # noqa: E731
    state = steps.RLState(
        mesh_lib.learner(av, build.optimizer(c, "rl", "lr_av"), r.mesh),
        mesh_lib.learner(ar, build.optimizer(c, "rl", "lr_ar"), r.mesh),
    )
    watch = None
    if watched:
        runner = Runner(spec, r.base, av, ar, r.tok, r.templates[1], c.eval.batch)
        look = watcher(
            runner,
            A.columns_of(r, "heldout"),
            o.watch_rows,
            T.key_for(c.seed, "watch"),
            temperature=c.eval.temperature,
            max_new=o.max_new,
        )
        watch = lambda state: look(state.av.params, state.ar.params)  # noqa: E731
    jitted = build.rl_step(c, spec, state)
    state = T.fit(
        "rl",
        state,
        lambda state, b, i: jitted(state, r.base, ref, b, T.key_for(c.seed, "rl", i)),
        lambda i: mesh_lib.batch(batch_at(i), r.mesh),
        o.steps,
        workdir=r.workdir,
        every=c.checkpoint_every,
        log_every=c.log_every,
        max_skipped=o.max_skipped,
        notes=T.rl_notes(r.tok),
        watch=watch,
        watch_every=o.watch_every,
    )
    _write_bundle(r, "bundle", state.av.params, state.ar.params, "rl")
    return {
        "steps": o.steps,
        "skipped_av": int(state.av.skipped),
        "skipped_ar": int(state.ar.skipped),
    }


STAGES = (
    ("extract", extract_stage),
    ("lessons_ar", functools.partial(_warm_stage, "lessons_ar")),
    ("lessons_av", functools.partial(_warm_stage, "lessons_av")),
    ("warm_ar", functools.partial(_warm_stage, "warm_ar")),
    ("warm_av", functools.partial(_warm_stage, "warm_av")),
    ("bundle_warm", bundle_warm_stage),
    ("eval_warm", lambda r: _evaluate(r, "bundle_warm")),
    ("rl", rl_stage),
    ("eval_rl", eval_rl_stage),
)
