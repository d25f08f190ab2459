"""What every stage of a run uses: the target, the mesh, the Spec, and each role's tree."""

import dataclasses
from pathlib import Path

from nla_jax import bundle, checkpoint, configs, prompts, reconstructor, steps, verbalizer
from nla_jax import mesh as mesh_lib
from nla_jax import train as T
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights


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
        c = self.config
        return c.av_template or prompts.AV_TEMPLATE, c.ar_template or prompts.AR_TEMPLATE


def open_run(config, workdir: Path) -> Run:
    mesh = mesh_lib.make(**config.mesh)
    path = weights.resolve(config.target)
    lm, params = weights.load(path)
    tok = tok_lib.load(path)
    ways = mesh_lib.ways(mesh)
    for name in ("data", *configs.STAGES, "rl"):
        if config[name].batch % ways and config[name].get("steps", 1):
            raise UserError(
                f"config {name}.batch={config[name].batch} does not divide over {ways} devices; choose a "
                f"multiple of {ways}"
            )
    # Everything that depends only on model and settings is refused here, before the minutes of work.
    bundle.make_spec(
        lm,
        tok,
        layer=config.layer,
        dtype=config.dtype,
        alpha=config.alpha or 1.0,
        marker=config.marker,
        av_template=config.av_template,
        ar_template=config.ar_template,
    )
    source = mesh_lib.place(params, params_lib.table(lm), mesh)
    base = bundle.frozen(source, config.dtype)
    return Run(config, workdir, mesh, path, lm, tok, base, source)


def ready(r: Run) -> Run:
    """`r` with its Spec: alpha is known once activations are."""
    if r.spec is None:
        c = r.config
        p75 = store.read_meta(r.workdir / "data")["splits"]["warm"]["norm"]["p75"]
        alpha = c.alpha or float(f"{p75:.2g}")
        r.spec = bundle.make_spec(
            r.lm,
            r.tok,
            layer=c.layer,
            dtype=c.dtype,
            alpha=alpha,
            marker=c.marker,
            av_template=c.av_template,
            ar_template=c.ar_template,
            remat=c.remat,
            vocab_chunk=c.vocab_chunk,
        )
    return r


def columns_of(r: Run, split: str) -> dict:
    return store.load_columns(r.workdir / "data", split)


def role_table(r: Run, role: str) -> dict:
    c = r.config
    if role == "av":
        return verbalizer.table(r.lm, rank=c.av.rank, affine=c.av.affine != "none")
    return reconstructor.table(r.lm, ready(r).spec.layer, rank=c.ar.rank)


def fresh(r: Run, role: str) -> dict:
    """A role's tree before any training, on the mesh."""
    c, key = r.config, T.key_for(r.config.seed, f"init_{role}")
    if role == "av":
        tree = verbalizer.init(r.source, r.lm, rank=c.av.rank, affine=c.av.affine != "none", key=key)
    else:
        tree = reconstructor.init(r.source, r.lm, ready(r).spec.layer, rank=c.ar.rank, key=key)
    return mesh_lib.place(tree, role_table(r, role), r.mesh)


def load_params(r: Run, role: str, stage: str) -> dict:
    """A role's tree as an earlier stage left it."""
    like = bundle.abstract(role_table(r, role), r.mesh)
    return checkpoint.load_tree(r.workdir / "params" / stage, like)


def optimizer(s, n_steps: int, lr: float):
    return steps.optimizer(
        lr,
        n_steps,
        warmup=min(s.warmup, max(n_steps // 4, 1)),
        final=s.final_lr,
        clip=s.clip,
        weight_decay=s.weight_decay,
    )
