"""Each training step of a config, jitted on its mesh: `nla_jax.stages` runs it, `nla_jax.aot` compiles it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nla_jax import configs, steps
from nla_jax import mesh as mesh_lib
from nla_jax.lm.model import cast


def optimizer(config, section: str, lr: str = "lr"):
    """The optimizer of a section of the config ("warm_av", "rl", ...), with its key `lr`."""
    s = configs.section(config, section)
    return steps.optimizer(
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


def warm_step(config, stage: str, spec: steps.Spec, state: steps.Learner):
    """step(state, base, batch) of "lessons_av", "warm_ar", ...; `state` may be shapes with shardings."""
    step = steps.warm_start_av if stage.endswith("av") else steps.warm_start_ar
    tx = optimizer(config, stage)
    return mesh_lib.jit_step(functools.partial(step, spec=spec, tx=tx, micro=config[stage].micro), state)


def rl_step(config, spec: steps.Spec, state: steps.RLState, section: str = "rl"):
    """step(state, base, ref, batch, key) of "rl" or "rl_drill"; `state` may be shapes with shardings. An AR
    that is the frozen target (an empty tree) is not trained."""
    o = configs.section(config, section)
    opts = steps.RLOptions(**{f.name: o[f.name] for f in dataclasses.fields(steps.RLOptions)})
    opts = dataclasses.replace(opts, train_ar=opts.train_ar and bool(jax.tree.leaves(state.ar.params)))
    tx_av, tx_ar = optimizer(config, section, "lr_av"), optimizer(config, section, "lr_ar")
    step = functools.partial(steps.rl, spec=spec, opts=opts, tx_av=tx_av, tx_ar=tx_ar)
    return mesh_lib.jit_step(step, state)
