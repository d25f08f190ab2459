"""A whole run: which stages there are, what each needs, and which are done.

    extract -> lessons_ar, lessons_av -> warm_ar, warm_av -> eval_warm -> rl -> eval_rl -> summary

A stage that has finished leaves WORKDIR/done/STAGE.json; started again, a run goes on with the first
stage that has none, and inside a stage from its last checkpoint.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import bundle, checkpoint, configs, mesh as mesh_lib, reconstructor, steps, target
from nla_jax import train as T
from nla_jax import verbalizer
from nla_jax.data import extract, order, store
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate import report
from nla_jax.evaluate.roundtrip import Runner
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights

# Settings that may differ when a run is taken up again: they change no number.
HARMLESS = {"checkpoint_every", "log_every", "explain_text", "target"}


@dataclasses.dataclass
class Run:
    """What every stage uses. `base` and everything after it is there once the target is loaded."""

    config: object
    workdir: Path
    mesh: object
    path: Path
    lm: object
    tok: object
    base: dict  # the target in compute dtype, on the mesh
    source: dict  # the target as loaded, from which trainable copies are made
    spec: steps.Spec | None = None

    @property
    def templates(self):
        from nla_jax import prompts

        c = self.config
        return c.av_template or prompts.AV_TEMPLATE, c.ar_template or prompts.AR_TEMPLATE


def run(config, workdir: str | Path, only: str = "") -> dict:
    """Run what is missing of every stage (or up to stage `only`) and return the summary.

    Raises UserError for a config that is impossible, or that differs from the one `workdir` began
    with.
    """
    config = configs.lock(config)
    workdir = Path(workdir).absolute()
    _same_config(config, workdir)
    if not only and (workdir / "summary.json").exists():
        return json.loads((workdir / "summary.json").read_text("utf-8"))
    r = _open(config, workdir)
    for stage, work in STAGES:
        if not _done(workdir, stage):
            began = time.monotonic()
            outcome = work(r) or {}
            _finish(workdir, stage, {"seconds": round(time.monotonic() - began, 1), **outcome})
        if stage in T_STAGES or stage == "rl":
            T.finished(stage, workdir)
        if stage == only:
            return _read(workdir, stage)
    return summarise(config, workdir)


def _open(config, workdir: Path) -> Run:
    mesh = mesh_lib.make(**config.mesh)
    path = weights.resolve(config.target)
    lm, params = weights.load(path)
    tok = tok_lib.load(path)
    # Everything that depends only on model and settings is refused here, before the minutes of work.
    bundle.make_spec(lm, tok, layer=config.layer, dtype=config.dtype, alpha=config.alpha or 1.0,
                     marker=config.marker, av_template=config.av_template,
                     ar_template=config.ar_template)
    source = mesh_lib.place(params, params_lib.table(lm), mesh)
    base = bundle.frozen(source, config.dtype)
    return Run(config, workdir, mesh, path, lm, tok, base, source)


# --- stages ---------------------------------------------------------------------------------------

def extract_stage(r: Run) -> dict:
    """Capture h for every split into WORKDIR/data."""
    c, directory = r.config, r.workdir / "data"
    if not store.is_complete(directory):
        layer = r.lm.default_layer() if c.layer == -1 else c.layer
        wanted, drops = extract.requests(c.data, c.seed, r.tok)
        jitted = jax.jit(functools.partial(target.capture, cfg=r.lm, layer=layer))
        capture = lambda ids, valid, pos: jitted(  # noqa: E731
            r.base, **mesh_lib.batch({"ids_BT": ids, "valid_BT": valid, "positions_BP": pos}, r.mesh))
        plan = {"target": bundle.fingerprint(r.path), "layer": layer, "dtype": c.dtype,
                "seed": c.seed, "data": c.data.to_dict()}
        extract.extract(directory, wanted, r.lm.d_model, capture, plan=plan, batch=c.data.batch,
                        pad_id=r.tok.eos_token_id or 0, drops=drops)
    meta = store.read_meta(directory)
    return {"rows": {s: a["rows"] for s, a in meta["splits"].items()},
            "documents": {s: a["documents"] for s, a in meta["splits"].items()},
            "norm": meta["splits"]["warm"]["norm"], "drops": meta.get("drops", {})}


def _ready(r: Run) -> Run:
    """`r` with its Spec: alpha is known once activations are."""
    if r.spec is None:
        c = r.config
        p75 = store.read_meta(r.workdir / "data")["splits"]["warm"]["norm"]["p75"]
        alpha = c.alpha or float(f"{p75:.2g}")
        r.spec = bundle.make_spec(
            r.lm, r.tok, layer=c.layer, dtype=c.dtype, alpha=alpha, marker=c.marker,
            av_template=c.av_template, ar_template=c.ar_template, remat=c.remat,
            vocab_chunk=c.vocab_chunk)
    return r


def _columns(r: Run, split: str) -> dict:
    return store.load_columns(r.workdir / "data", split)


def _role_table(r: Run, role: str) -> dict:
    c = r.config
    if role == "av":
        return verbalizer.table(r.lm, rank=c.av.rank, affine=c.av.affine != "none")
    return reconstructor.table(r.lm, _ready(r).spec.layer, rank=c.ar.rank)


def _fresh(r: Run, role: str) -> dict:
    """A role's tree before any training, on the mesh."""
    c, key = r.config, T.key_for(r.config.seed, f"init_{role}")
    if role == "av":
        tree = verbalizer.init(r.source, r.lm, rank=c.av.rank, affine=c.av.affine != "none", key=key)
    else:
        tree = reconstructor.init(r.source, r.lm, _ready(r).spec.layer, rank=c.ar.rank, key=key)
    return mesh_lib.place(tree, _role_table(r, role), r.mesh)


def _load_params(r: Run, role: str, stage: str) -> dict:
    """A role's tree as an earlier stage left it."""
    specs = _role_table(r, role)
    like = params_lib.nest({
        n: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=jax.sharding.NamedSharding(
            r.mesh, mesh_lib.spec_of(s.shape, s.axes, r.mesh))) for n, s in specs.items()})
    return checkpoint.load_tree(r.workdir / "params" / stage, like)


def _optimizer(s, n_steps: int, lr: float):
    return steps.optimizer(lr, n_steps, warmup=min(s.warmup, max(n_steps // 4, 1)), final=s.final_lr,
                           clip=s.clip, weight_decay=s.weight_decay)


def _warm_stage(stage: str, r: Run) -> dict:
    """lessons_av, lessons_ar, warm_av, warm_ar: supervised training of one role."""
    kind, role = stage.split("_")
    c, s = r.config, r.config[stage]
    spec = _ready(r).spec
    before = f"lessons_{role}"
    first = kind == "lessons" or not (r.workdir / "params" / before).exists()
    if not s.steps:
        return {}
    texts = T.Texts(_columns(r, "warm"), "lessons" if kind == "lessons" else "written",
                    batch=s.batch, seed=c.seed, which=c.data.explanation_lines)
    tx = _optimizer(s, s.steps, s.lr)
    state = mesh_lib.learner(_fresh(r, role) if first else _load_params(r, role, before), tx, r.mesh)
    if role == "av":
        one = functools.partial(steps.warm_start_av, spec=spec, tx=tx, micro=s.micro)
        batch = functools.partial(T.av_batch, texts, r.tok, spec, s.max_tokens)
    else:
        one = functools.partial(steps.warm_start_ar, spec=spec, tx=tx, micro=s.micro)
        batch = functools.partial(T.ar_batch, texts, r.tok, spec, r.templates[1], s.max_tokens)
    jitted = jax.jit(one, donate_argnums=0)
    state = T.fit(stage, state, lambda state, b, i: jitted(state, r.base, b),
                  lambda i: mesh_lib.batch(batch(i), r.mesh), s.steps, workdir=r.workdir,
                  every=c.checkpoint_every, log_every=c.log_every, max_skipped=c.rl.max_skipped)
    checkpoint.save_tree(r.workdir / "params" / stage, state.params)
    return {"steps": s.steps, "skipped": int(state.skipped)}


def _last_warm(r: Run, role: str) -> dict:
    for stage in (f"warm_{role}", f"lessons_{role}"):
        if (r.workdir / "params" / stage).exists():
            return _load_params(r, role, stage)
    raise UserError(f"{r.workdir}: no warm start of {role.upper()} found; delete done/ and start again")


def _write_bundle(r: Run, name: str, av, ar, stage: str) -> None:
    c, spec = r.config, _ready(r).spec
    av_template, ar_template = r.templates
    meta = bundle.sidecar(
        spec, target=c.target, target_path=r.path, av_rank=c.av.rank, ar_rank=c.ar.rank,
        affine=c.av.affine != "none", marker=r.tok.decode([spec.av.marker]), av_template=av_template,
        ar_template=ar_template, stage=stage, max_new=c.rl.max_new, mean_D=_mean_direction(r),
        training={"seed": c.seed, "kl_estimator": "exact", "config": c.to_dict()})
    bundle.save(r.workdir / name, meta, av, ar, r.tok)


def _mean_direction(r: Run) -> np.ndarray:
    return F.mean_direction(_columns(r, "warm")["h"])


def _evaluate(r: Run, name: str) -> dict:
    """Round-trip figures of the bundle at WORKDIR/name, on held-out and out-of-domain rows."""
    c = r.config
    _ready(r)
    # What is evaluated is what the bundle holds, read back from disk.
    trees = bundle.read_trees(r.workdir / name, bundle.read_sidecar(r.workdir / name), r.lm)
    trees = mesh_lib.replicated(trees, r.mesh)
    runner = Runner(r.spec, r.base, trees["av"], trees["ar"], r.tok, r.templates[1], c.eval.batch)
    out, samples = {}, {}
    mean = _mean_direction(r)
    splits = [s for s in ("heldout", "ood") if s in store.read_meta(r.workdir / "data")["splits"]]
    for i, split in enumerate(splits):
        columns = _columns(r, split)
        figures, trip = report.evaluate(
            runner, columns, mean, T.key_for(c.seed, "evaluate", i), temperature=c.eval.temperature,
            max_new=c.eval.max_new or c.rl.max_new, bootstrap=c.eval.bootstrap, seed=c.seed,
            label=f"{name} {split}")
        out[split] = [dataclasses.asdict(f) for f in figures]
        samples[split] = [
            {"doc_id": columns["doc_id"][j], "text": columns["text"][j],
             "explanation": trip.explanations[j], "written": columns["explanation"][j]}
            for j in range(min(10, len(columns["text"])))]
    return {"figures": out, "samples": samples}


def bundle_warm_stage(r: Run) -> dict:
    """The warm start as a bundle of its own."""
    _write_bundle(r, "bundle_warm", _last_warm(r, "av"), _last_warm(r, "ar"), "warm_start")


def rl_stage(r: Run) -> dict:
    """Joint training, then the bundle."""
    c, o = r.config, r.config.rl
    spec = _ready(r).spec
    av, ar, ref = _last_warm(r, "av"), _last_warm(r, "ar"), _last_warm(r, "av")
    if not o.steps:
        _write_bundle(r, "bundle", av, ar, "warm_start")
        return {}
    columns = _columns(r, "rl")
    if o.shuffle_h:
        columns = {**columns, "h": np.roll(columns["h"], len(columns["h"]) // 2, 0)}
    draws = order.epoch_indices(len(columns["h"]), o.batch, c.seed, "rl")
    opts = steps.RLOptions(
        group=o.group, max_new=o.max_new, reward=o.reward, advantage=o.advantage, kl=o.kl,
        length_penalty=o.length_penalty, train_ar=o.train_ar, micro_av=o.micro_av,
        micro_ar=o.micro_ar)
    tx_av, tx_ar = _optimizer(o, o.steps, o.lr_av), _optimizer(o, o.steps, o.lr_ar)
    state = steps.RLState(mesh_lib.learner(av, tx_av, r.mesh), mesh_lib.learner(ar, tx_ar, r.mesh))
    jitted = jax.jit(functools.partial(steps.rl, spec=spec, opts=opts, tx_av=tx_av, tx_ar=tx_ar),
                     donate_argnums=0)
    state = T.fit(
        "rl", state, lambda state, b, i: jitted(state, r.base, ref, b, T.key_for(c.seed, "rl", i)),
        lambda i: mesh_lib.batch(
            T.rl_batch(columns, batch=o.batch, seed=c.seed, step=i, draws=draws), r.mesh),
        o.steps, workdir=r.workdir, every=c.checkpoint_every, log_every=c.log_every,
        max_skipped=o.max_skipped, notes=T.rl_notes(r.tok))
    _write_bundle(r, "bundle", state.av.params, state.ar.params, "rl")
    return {"steps": o.steps, "skipped_av": int(state.av.skipped), "skipped_ar": int(state.ar.skipped)}


T_STAGES = configs.STAGES
STAGES = (
    ("extract", extract_stage),
    ("lessons_ar", functools.partial(_warm_stage, "lessons_ar")),
    ("lessons_av", functools.partial(_warm_stage, "lessons_av")),
    ("warm_ar", functools.partial(_warm_stage, "warm_ar")),
    ("warm_av", functools.partial(_warm_stage, "warm_av")),
    ("bundle_warm", bundle_warm_stage),
    ("eval_warm", lambda r: _evaluate(r, "bundle_warm")),
    ("rl", rl_stage),
    ("eval_rl", lambda r: _evaluate(r, "bundle")),
)


# --- what is done, and the summary ----------------------------------------------------------------

def _done(workdir: Path, stage: str) -> bool:
    return (workdir / "done" / f"{stage}.json").exists()


def _read(workdir: Path, stage: str) -> dict:
    return json.loads((workdir / "done" / f"{stage}.json").read_text("utf-8"))


def _finish(workdir: Path, stage: str, outcome: dict) -> None:
    _write_json(workdir / "done" / f"{stage}.json", outcome)


def _write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")
    os.replace(part, path)


def _same_config(config, workdir: Path) -> None:
    path = workdir / "config.json"
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        differ = [d for d in configs.differences(stored, config) if d.key not in HARMLESS]
        if differ:
            d = differ[0]
            more = f" (and {len(differ) - 1} more keys)" if len(differ) > 1 else ""
            raise UserError(f"{workdir} was begun with {d.key}={d.stored!r}, the config now says "
                            f"{d.present!r}{more}; use another --workdir, or delete it to start again")
    else:
        _write_json(path, config.to_dict())


def versions() -> dict:
    """Versions of what decides the numbers."""
    names = ("nla_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain",
             "tensorflow-datasets", "numpy")
    out = {}
    for n in names:
        try:
            out[n] = importlib.metadata.version(n)
        except importlib.metadata.PackageNotFoundError:
            out[n] = "unknown"
    return out


def summarise(config, workdir: Path) -> dict:
    """WORKDIR/summary.json: the figures of both bundles, seconds by stage, versions, seed."""
    warm, rl = _read(workdir, "eval_warm"), _read(workdir, "eval_rl")

    def figure(ev, name, split="heldout"):
        return next(f for f in ev["figures"][split] if f["name"] == name)

    def pair(f):
        return [f["low"], f["high"]]

    extracted = _read(workdir, "extract")
    out = {"seed": config.seed, "target": config.target}
    for name, ev in (("warm_start", warm), ("rl", rl)):
        out[f"fve_{name}"] = figure(ev, "fve")["value"]
        out[f"fve_{name}_interval"] = pair(figure(ev, "fve"))
    for name in ("fve_shuffled", "fve_mean_direction", "fve_token_path", "fve_meannorm"):
        out[name] = figure(rl, name)["value"]
        out[f"{name}_interval"] = pair(figure(rl, name))
    out["retokenization_mismatch"] = figure(rl, "retokenization_mismatch")["value"]
    out |= {
        "rows": extracted["rows"],
        "documents": extracted["documents"],
        "warm_start": warm["figures"],
        "rl": rl["figures"],
        "seconds": {s: _read(workdir, s)["seconds"] for s, _ in STAGES},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": versions(),
    }
    _write_json(workdir / "summary.json", out)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return out
