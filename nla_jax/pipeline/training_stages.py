"""The training stages: the warm start of each role, RL of the drill, and joint RL of both roles.

`nla_jax.pipeline.stages` has their order, and writes the bundles.
"""

import dataclasses
import functools

import numpy as np
import optax

from nla_jax import configs, prompts, reconstructor, specs, steps
from nla_jax.data import online, shuffle
from nla_jax.errors import UserError
from nla_jax.evaluate.heldout_watch import make_watch
from nla_jax.evaluate.probe_types import rows_of_other_documents
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import optimize, sharded_load
from nla_jax.lm import params as params_lib
from nla_jax.pipeline import activations, chosen_step, context, rl_step
from nla_jax.pipeline.context import RunContext
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import feeds, jitted_steps, loop
from nla_jax.util import checkpoint
from nla_jax.util.keys import key_for


def texts_of(r: RunContext, stage: str, **options) -> feeds.WarmStartPairs | feeds.OnlinePairs:
    """Return the rows and explanations of a warm-start stage. Raises UserError if there are none."""
    pairing = (
        feeds.pairs_arguments(r.config, stage, r.tok, context.with_spec(r).spec, r.templates[1]) | options
    )
    if r.config.activations == "online":
        return feeds.OnlinePairs(online.Passes(r.config.data, r.config.seed, r.tok, "warm"), **pairing)
    return feeds.WarmStartPairs(activations.columns_of(r, "warm"), **pairing)


def warm_stage(stage: str, r: RunContext) -> dict:
    """Run lessons_av, lessons_ar, warm_av or warm_ar, which train one role; return the stage's outcome."""
    kind, role = stage.split("_")
    c, s = r.config, r.config[stage]
    spec = context.with_spec(r).spec
    before = f"lessons_{role}"
    first = kind == "lessons" or not (r.workdir / "params" / before).exists()
    if not s.steps or (role == "ar" and c.ar.kind == "frozen"):
        return {}
    texts = texts_of(r, stage)
    tree = context.initial_tree(r, role) if first else context.load_params(r, role, before)
    state = jitted_steps.learner(tree, jitted_steps.optimizer(c, stage), r.mesh)
    if role == "ar":
        batch = functools.partial(feeds.ar_batch, texts, r.tok, spec, r.templates[1], s.max_tokens)
        step = _ignore_step(jitted_steps.warm_step(c, stage, spec, state))
    else:
        batch, step = _av_feed(r, stage, texts, state)
    watch, every = None, s.get("watch_every", 0)
    if 0 < every <= s.steps:
        ar = last_warm(r, "ar")
        look = _watcher(r, tree, ar)
        watch = lambda state, i: look(state.params, ar)
    state = loop.fit(
        stage,
        state,
        lambda state, b, i: step(state, r.base, b, i),
        lambda i: mesh_lib.shard_batch(batch(i), r.mesh),
        s.steps,
        **_loop_options(r),
        watch=watch,
        watch_every=every,
        minutes=s.minutes,
    )
    checkpoint.save_tree(r.workdir / "params" / stage, state.params)
    return {
        "steps": _steps_of(state),
        "skipped": int(state.skipped),
        "rows": len(texts.rows),
        "too_long": texts.dropped,
    }


def _loop_options(r: RunContext) -> dict:
    """Return the arguments of `loop.fit` that are the same in every stage."""
    c = r.config
    return {"workdir": r.workdir, "every": c.checkpoint_every, "log_every": c.log_every,
            "callback": c.metrics_callback, "tracker": r.tracker, "profile": c.profile_steps,
            "max_skipped": c.rl.max_skipped}


def _steps_of(role: optimize.Learner) -> int:
    """Return the number of a role's steps in a stage, skipped updates included."""
    return int(optax.tree_utils.tree_get_all_with_path(role.opt, "count")[0][1]) + int(role.skipped)


def _ignore_step(step):
    """Return `step` with a further argument, the step's number, which it ignores."""
    return lambda state, base, batch, i: step(state, base, batch)


def _av_feed(r: RunContext, stage: str, texts, state):
    """Return (i -> batch, step) of an AV stage.

    A drill uses the short prompt. In warm_av, a share `lessons` of the steps are drill steps, whose rows
    continue after those of lessons_av.
    """
    c, s, spec = r.config, r.config[stage], r.spec
    full = functools.partial(feeds.av_batch, texts, r.tok, spec, s.max_tokens)
    share = s.get("lessons", 0.0)
    if not share and s.get("form", "full") == "full":
        return full, _ignore_step(jitted_steps.warm_step(c, stage, spec, state))
    short = dataclasses.replace(spec, av=prompts.drill_prompt(spec.av))
    lessons = texts_of(r, "lessons_av") if share else texts
    drill = functools.partial(feeds.av_batch, lessons, r.tok, short, c.lessons_av.max_tokens)
    drill_step = jitted_steps.warm_step(c, stage, short, state)
    if not share:
        return drill, _ignore_step(drill_step)
    step, first = jitted_steps.warm_step(c, stage, spec, state), c.lessons_av.steps
    before = lambda i: int(i * share + 1e-9)  # number of drill steps before step i
    is_drill = lambda i: before(i + 1) > before(i)
    return (
        lambda i: drill(first + before(i)) if is_drill(i) else full(i - before(i)),
        lambda state, base, b, i: (drill_step if is_drill(i) else step)(state, base, b),
    )


def last_warm(r: RunContext, role: str) -> dict:
    """Return a role's tree at the end of the warm start. Raises UserError if there is none."""
    if role == "ar" and r.config.ar.kind == "frozen":
        return context.initial_tree(r, role)
    for stage in (f"warm_{role}", f"lessons_{role}"):
        if (r.workdir / "params" / stage).exists():
            return context.load_params(r, role, stage)
    if r.config.init:
        return context.initial_tree(r, role)
    raise UserError(f"{r.workdir}: no warm start of {role.upper()} found; delete done/ and start again")


def _start_of_rl(r: RunContext) -> dict:
    """Return AV's tree at the start of joint RL: that of rl_drill, or the warm start."""
    if (r.workdir / "params" / "rl_drill").exists():
        return context.load_params(r, "av", "rl_drill")
    return last_warm(r, "av")


def rl_drill_stage(r: RunContext) -> dict:
    """Run RL of AV on the drill's short answers, with the frozen target as AR. Returns the outcome."""
    o = configs.section(r.config, "rl_drill")
    if not o["steps"]:
        return {}
    spec = context.with_spec(r).spec
    bare = prompts.ar_prompt(r.tok, prompts.ar_template_for(r.tok))
    spec = dataclasses.replace(spec, av=prompts.drill_prompt(spec.av), ar=bare)
    batch_at, _ = _stored_batches(r, "rl_drill", o["batch"])
    state = _fit_rl(r, "rl_drill", spec, last_warm(r, "av"), dict(reconstructor.FROZEN), batch_at)
    checkpoint.save_tree(r.workdir / "params" / "rl_drill", state.av.params)
    return {"steps": _steps_of(state.av), "skipped_av": int(state.av.skipped)}


def train_rl(r: RunContext):
    """Run joint RL: (AV's tree, AR's tree, the outcome of the stage). Without RL the outcome is empty."""
    c, o = r.config, r.config.rl
    spec, av, ar = context.with_spec(r).spec, _start_of_rl(r), last_warm(r, "ar")
    if not o.steps:
        return av, ar, {}
    rl_step.check_rows(r)  # `--from` may have linked the activations
    watched = 0 < o.watch_every <= o.steps
    if not (c.av.rank or c.ar.rank or c.ar.kind == "frozen" or c.activations == "online" or o.patch_kl):
        # RL's steps do not use the target, so free its memory. The watch, and the frozen target as reader,
        # need only the blocks up to K.
        reads = watched or o.reader == "frozen_target"
        r.base = params_lib.truncate(r.base, spec.layer + 1, spec.lm) if reads else {}
    reads_written = o.written_ar and o.train_ar and c.ar.kind == "trained"
    written = texts_of(r, "warm_ar", batch=o.written_ar) if reads_written else None
    if c.activations == "online":
        batch_at, rows_at = online.OnlineBatches(c.data, c.seed, r.tok, o.batch).at, None
    else:
        batch_at, rows_at = _stored_batches(r, "rl", o.batch)
    batch_at = rl_step.add_inputs(r, batch_at, rows_at)
    if written:
        batch_at = feeds.add_written_batch(batch_at, written, r.tok, spec, r.templates[1], o.max_new)
    chooser = None
    if o.choose != "last":
        log = r.workdir / "metrics" / "rl.jsonl"
        chooser = chosen_step.Chooser(r.workdir / "params" / "rl_at", o.choose, o.choose_loss, log)
    watch = _rl_watch(r, av, ar, chooser) if watched else None
    state = _fit_rl(r, "rl", spec, av, ar, batch_at, rows_at, watch=watch, watch_every=o.watch_every)
    outcome = {"steps": _steps_of(state.av), "skipped_av": int(state.av.skipped),
               "skipped_ar": int(state.ar.skipped)}
    if not chooser:
        return state.av.params, state.ar.params, outcome
    chosen = chooser.pick()
    like = {role: sharded_load.abstract(context.role_table(r, role), r.mesh) for role in ("av", "ar")}
    trees = checkpoint.load_tree(chooser.directory / str(chosen["step"]), like)
    return trees["av"], trees["ar"], outcome | {"chosen": chosen}


def _rl_watch(r: RunContext, av, ar, chooser: chosen_step.Chooser | None):
    """Return the watch of RL: (state, steps) -> held-out figures, which `chooser` sees too."""
    look = _watcher(r, av, ar, warm_ar=last_warm(r, "ar") if r.config.ar.kind == "trained" else None)

    def watch(state: steps.RLState, i: int) -> dict[str, float]:
        trees = {"av": state.av.params, "ar": state.ar.params}
        figures = look(**trees)
        if chooser:
            chooser.saw(i, figures, lambda: trees)
        return figures

    return watch


def _watcher(r: RunContext, av, ar, warm_ar=None):
    """Return (AV's tree, AR's tree) -> held-out figures. av, ar: trees with the shapes of its arguments.
    warm_ar: as in `make_watch`."""
    c = r.config
    return make_watch(
        Runner(r.spec, r.base, av, ar, r.tok, r.templates[1], c.eval.batch),
        activations.columns_of(r, "heldout"),
        c.rl.watch_rows,
        key_for(c.seed, "watch"),
        temperature=c.eval.temperature,
        max_new=c.rl.max_new,
        warm_ar=warm_ar,
    )


def _stored_batches(r: RunContext, stage: str, batch: int):
    """Return (i -> the activations of RL step i, from the store; i -> their rows)."""
    columns = dict(activations.columns_of(r, "rl"))
    if r.config.rl.shuffle_h:
        columns["goal"] = columns["h"][rows_of_other_documents(columns["doc_id"])]
    draws = shuffle.epoch_indices(len(columns["h"]), batch, r.config.seed, stage)
    batch_at = lambda i: feeds.rl_batch(columns, batch=batch, seed=r.config.seed, step=i, draws=draws)
    return batch_at, lambda i: np.asarray(draws[i])


def _fit_rl(r: RunContext, stage: str, spec: specs.Spec, av, ar, batch_at, rows_at=None,
            **watch) -> steps.RLState:
    """Run the steps of "rl" or "rl_drill" and return the state. The KL's reference is the warm start's AV.

    rows_at: as in `rl_step.add_inputs`."""
    c = r.config
    ref = jitted_steps.reference(last_warm(r, "av"), c.dtype)
    state = steps.RLState(
        jitted_steps.learner(av, jitted_steps.optimizer(c, stage, "lr_av"), r.mesh),
        jitted_steps.learner(ar, jitted_steps.optimizer(c, stage, "lr_ar"), r.mesh),
    )
    return loop.fit(
        stage,
        state,
        rl_step.make_step(r, spec, state, stage, ref, lambda: last_warm(r, "ar"), rows_at),
        lambda i: mesh_lib.shard_batch(batch_at(i), r.mesh),
        c[stage].steps,
        **_loop_options(r),
        notes=feeds.best_and_worst(r.tok),
        minutes=c[stage].minutes,
        **watch,
    )
