"""Each training step of a config, jitted on its mesh: `nla_jax.pipeline.stages` runs it, `benchmarks.aot`
compiles it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nla_jax import configs, specs, steps
from nla_jax.lm import optimize
from nla_jax.lm.model import cast
from nla_jax.sharding import mesh as mesh_lib


def optimizer(config, section: str, lr: str = "lr"):
    """The optimizer of a section of the config ("warm_av", "rl", ...), with its key `lr`."""
    s = configs.section(config, section)
    return optimize.optimizer(
        s[lr],
        s["steps"],
        warmup=min(s["warmup"], max(s["steps"] // 4, 1)),
        final=s["final_lr"],
        clip=s["clip"],
        weight_decay=s["weight_decay"],
        mu_dtype=config.mu_dtype,
    )


def reference(av: dict, dtype: str) -> dict:
    """The warm-start AV as the reference of RL: never trained, so kept in the dtype of products. (A learned
    affine map stays as it is: it acts in float32.)"""
    return {n: t if n == "inject" else cast(t, jnp.dtype(dtype)) for n, t in av.items()}


def warm_step(config, stage: str, spec: specs.Spec, state: optimize.Learner):
    """step(state, base, batch) of "lessons_av", "warm_ar", ...; `state` may be shapes with shardings."""
    step = steps.warm_start_av if stage.endswith("av") else steps.warm_start_ar
    tx = optimizer(config, stage)
    return jit_step(functools.partial(step, spec=spec, tx=tx, micro=config[stage].micro), state)


def rl_step(config, spec: specs.Spec, state: steps.RLState, section: str = "rl"):
    """step(state, base, ref, batch, key) of "rl" or "rl_drill"; `state` may be shapes with shardings. An AR
    that is the frozen target (an empty tree) is not trained."""
    o = configs.section(config, section)
    opts = steps.RLOptions(**{f.name: o[f.name] for f in dataclasses.fields(steps.RLOptions)})
    opts = dataclasses.replace(opts, train_ar=opts.train_ar and bool(jax.tree.leaves(state.ar.params)))
    tx_av, tx_ar = optimizer(config, section, "lr_av"), optimizer(config, section, "lr_ar")
    step = functools.partial(steps.rl, spec=spec, opts=opts, tx_av=tx_av, tx_ar=tx_ar)
    return jit_step(step, state)


def learner(params, tx, mesh: Mesh):
    """A role at the start of training, each optimizer moment placed like its parameter.

    Under Auto axes `jit(tx.init)` would put them all on one device, and step 2 would recompile.
    """
    import optax

    from nla_jax.lm import optimize

    state = optimize.learner(params, tx)
    opt = optax.tree.map_params(
        tx, lambda s, p: mesh_lib.put(s, p.sharding), state.opt, params,
        transform_non_params=lambda s: mesh_lib.put(s, mesh_lib.everywhere(mesh)))
    return state.replace(opt=opt, skipped=mesh_lib.put(state.skipped, mesh_lib.everywhere(mesh)),
                         skipped_run=mesh_lib.put(state.skipped_run, mesh_lib.everywhere(mesh)))


def jit_step(step, state):
    """jit of `step(state, ...) -> (state, metrics)`, the state donated and placed as it was, the metrics
    whole on every device.

    Left to itself, XLA chooses where the new state goes: small parameters drift from the table's
    places, and the second step compiles again.
    """
    from nla_jax.sharding import placement

    places, mesh = jax.tree.map(lambda a: a.sharding, state), mesh_lib.mesh_of(state)
    return jax.jit(
        placement.under(mesh, step),
        donate_argnums=0,
        out_shardings=(places, mesh_lib.everywhere(mesh)),
        compiler_options=placement.compiler_options(mesh),
    )
