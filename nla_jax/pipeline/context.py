"""The context of a run's stages: the target, the mesh, the Spec, and each role's tree."""

import dataclasses
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from nla_jax import bundle, configs, prompts, reconstructor, specs, verbalizer
from nla_jax.errors import UserError
from nla_jax.lm import attention_kernels, chat_prompts, sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.pipeline import activations, config_checks, fingerprints, foreign_store, reuse, run_mesh
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import checkpoint, distributed, hardware, wandb_log
from nla_jax.util.keys import key_for


@dataclasses.dataclass
class RunContext:
    """The state that all stages of a run share."""

    config: object
    workdir: Path
    mesh: object
    path: Path
    lm: object
    tok: object
    base: dict  # the target in compute dtype, on the mesh
    given: dict  # arguments of `specs.make_spec`, from the config, or from the bundle or store that it names
    prompt_settings: dict = dataclasses.field(default_factory=dict)  # `fingerprints.prompt_settings`
    chat_template: str | None = None  # as the target's files or the config have it
    spec: specs.Spec | None = None
    held: dict = dataclasses.field(default_factory=dict)  # columns by split (`activations.columns_of`)
    mean_D: np.ndarray | None = None  # the mean direction, once it is computed
    tracker: wandb_log.WandbLog = dataclasses.field(default_factory=wandb_log.WandbLog)
    statistics: dict | None = None  # of the training activations (`evaluate.distribution`), with `mean_D`

    @property
    def templates(self):
        g = self.given
        return g["av_template"] or prompts.AV_TEMPLATE, g["ar_template"] or prompts.ar_template_for(self.tok)


def open_run(config, workdir: Path, source: str | Path = "") -> RunContext:
    """Return the context of a run with its target on the mesh.

    source: another run, whose finished stages are linked first (`nla_jax.pipeline.reuse`).

    Raises UserError for all faults of model and settings, before minutes of work, and if the run was begun
    with another target, tokenizer or texts.
    """
    known = fingerprints.read(workdir)
    theirs = fingerprints.read(source) if source and not known else {}
    r = _describe(config, workdir, known or theirs)

    def check():
        present = fingerprints.of_run(r)
        if source:
            reuse.link_stages(config, source, workdir, present | fingerprints.of_texts(config))
        return fingerprints.settle(r, present, known, theirs)

    new = distributed.run_on_first(check)
    _, r.base = sharded_load.place(r.path, r.mesh, config.dtype)
    if new:
        distributed.write_json(workdir / fingerprints.FILE, new)
    return r


def _describe(config, workdir: Path, known: dict) -> RunContext:
    """Return the context of a run without its target's parameters. A role whose prompt has the settings in
    `known`, a file of fingerprints, gets its ids."""
    mesh = mesh_lib.make(**config.mesh) if config.mesh.tensor else None  # refused before a download
    path = weights.resolve(config.target)
    facts = {}
    if config.data.store:
        facts = foreign_store.check(config, workdir / "data", weights.read_config(path), path)
    given = foreign_store.settings(config, facts)
    lm = weights.read_config(path)
    mesh = mesh or run_mesh.make(config, lm)
    if config.init:
        meta = bundle.read_sidecar(config.init)
        bundle.check_target(config.init, meta, path, lm)
        given["n_suffix"] = len(meta["tokens"]["critic_suffix_ids"])
        foreign_store.check_bundle(config, facts, meta)
        given["ids"] = meta.get("prompt_ids") or {}
    settings = fingerprints.prompt_settings(given)
    given |= fingerprints.recorded_prompts(known, given)
    # A bundle's own tokenizer renders its prompts, as in `bundle.load`.
    tok = tok_lib.load((config.init and bundle.tokenizer_dir(config.init, meta)) or path)
    tok.chat_template = template = config.chat_template or tok.chat_template
    if not config.init:
        chat_prompts.stop_thinking(tok)
    foreign_store.check_tokenizer(config, workdir / "data", tok)
    run_mesh.check_batches(config, mesh_lib.n_batch_shards(mesh))
    spec = specs.make_spec(
        lm,
        tok,
        layer=config.layer,
        dtype=config.dtype,
        attention=attention_kernels.resolve(config.attention, mesh.devices.flat[0], lm, config.dtype),
        **{**given, "alpha": given["alpha"] or 1.0},
    )
    _check_lengths(config, spec)
    if config.init:
        bundle.check_ids(config.init, spec, meta, tok)
    foreign_store.check_tokens(config, facts, spec)
    hardware.announce(config.dtype, spec.attention, mesh)
    given["ids"] = prompts.ids_of(spec.av, spec.ar)  # rendered once
    return RunContext(config, workdir, mesh, path, lm, tok, {}, given, settings, template)


def _check_lengths(config, spec: specs.Spec) -> None:
    """Raise UserError for a setting with which a stage would read more tokens than the target's context."""
    lm, stages = spec.lm, [s for s in configs.STAGES if config[s].steps]
    if not config.data.store:
        lm.check_fits(config.data.window_tokens + len(spec.lead), "a window of config data.window_tokens")
    for stage in stages:
        prompt = len(spec.av.before) + 1 + len(spec.av.after) if stage.endswith("av") else 0
        lm.check_fits(prompt + config[stage].max_tokens, f"a row of config {stage}.max_tokens")
    for name in configs.RL_STAGES:
        if config[name].steps:
            spec.check_answer_fits(config[name].max_new, f"config {name}.max_new")
    named = "eval.max_new" if config.eval.max_new else "rl.max_new"
    spec.check_answer_fits(config.eval.max_new or config.rl.max_new, f"config {named}")


def apply_bundle(config):
    """Return `config` with the settings of the bundle at `config.init`, if there is one.

    Raises UserError for a setting that is neither its default nor the bundle's.
    """
    if not config.init:
        return config
    meta = bundle.read_sidecar(config.init)
    roles, templates = meta["roles"], meta["prompt_templates"]
    decided = {
        "layer": meta["extraction"]["layer_index"],
        "alpha": float(meta["extraction"]["injection_scale"]),
        "marker": meta["tokens"]["injection_char"],
        "av_template": templates["av"],
        "ar_template": templates["ar"],
        "av.rank": roles["av_rank"],
        "av.affine": "identity" if roles["affine"] else "none",
        "av.injection": bundle.injection(meta),
        "ar.rank": roles["ar_rank"],
        "ar.kind": bundle.ar_kind(meta),
    }
    if config.target == configs.default().target:
        decided["target"] = meta["base_checkpoint"]
    out, known = ConfigDict(config.to_dict()), configs.default()
    for key, value in decided.items():
        section, _, name = key.rpartition(".")
        block, default = (out[section], known[section]) if section else (out, known)
        if block[name] not in (default[name], value):
            raise UserError(
                f"config {key}={block[name]!r}, but init={config.init!r} has {value!r}; omit {key}"
            )
        block[name] = value
    return config_checks.lock(out)


def attention_of(r: RunContext) -> str:
    """Return the attention implementation of `config.attention` for this model on this mesh."""
    return attention_kernels.resolve(r.config.attention, r.mesh.devices.flat[0], r.lm, r.config.dtype)


def with_spec(r: RunContext) -> RunContext:
    """Return `r` with its Spec. A default alpha needs the activations, so it cannot be set earlier."""
    if r.spec is None:
        c = r.config
        share = verbalizer.adds_to_stream(c.av.injection, r.lm.d_model)
        alpha = r.given["alpha"] or (1.0 if share else float(f"{activations.norm_p75(r):.2g}"))
        r.spec = specs.make_spec(
            r.lm,
            r.tok,
            layer=c.layer,
            dtype=c.dtype,
            **{**r.given, "alpha": alpha},
            remat=c.remat,
            vocab_chunk=c.vocab_chunk,
            attention=attention_of(r),
        )
    return r


def role_table(r: RunContext, role: str) -> dict:
    c = r.config
    if role == "av":
        return verbalizer.table(r.lm, rank=c.av.rank, affine=c.av.affine != "none")
    return reconstructor.table(r.lm, with_spec(r).spec.layer, rank=c.ar.rank, kind=c.ar.kind)


def initial_tree(r: RunContext, role: str) -> dict:
    """Return a role's tree before training, on the mesh: from the target, or that of the bundle `init`."""
    c, key = r.config, key_for(r.config.seed, f"init_{role}")
    if c.init:
        return bundle.read_trees(c.init, bundle.read_sidecar(c.init), r.lm, r.mesh)[role]
    if role == "av":
        source = r.base if c.av.rank else _float32(r, r.lm)
        tree = verbalizer.init(source, r.lm, rank=c.av.rank, affine=c.av.affine != "none", key=key)
    elif c.ar.kind == "frozen":
        return dict(reconstructor.FROZEN)
    else:
        layer = with_spec(r).spec.layer
        source = r.base if c.ar.rank else _float32(r, r.lm.first_blocks(layer + 1), ("final_norm", "lm_head"))
        tree = reconstructor.init(source, r.lm, layer, rank=c.ar.rank, key=key)
    return mesh_lib.shard_params(tree, role_table(r, role), r.mesh)


def _float32(r: RunContext, cfg, without: tuple[str, ...] = ()) -> dict:
    """Return the target in float32. It is read again from its files if `base` has another dtype."""
    if r.config.dtype == "float32":
        return r.base
    return sharded_load.place(r.path, r.mesh, cfg=cfg, without=without)[1]


def load_params(r: RunContext, role: str, stage: str) -> dict:
    """Load a role's tree from an earlier stage."""
    like = sharded_load.abstract(role_table(r, role), r.mesh)
    return checkpoint.load_tree(r.workdir / "params" / stage, like)
