"""Each training step of a config, jitted on its mesh: `nla_jax.stages` runs it, `nla_jax.aot` compiles it."""

import functools

import jax.numpy as jnp

from nla_jax import mesh as mesh_lib
from nla_jax import steps
from nla_jax.lm.model import cast


def optimizer(config, section: str, lr: str = "lr"):
    """The optimizer of a section of the config ("warm_av", "rl", ...), with its key `lr`."""
    s = config[section]
    return steps.optimizer(
        s[lr],
        s.steps,
        warmup=min(s.warmup, max(s.steps // 4, 1)),
        final=s.final_lr,
        clip=s.clip,
        weight_decay=s.weight_decay,
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


def rl_step(config, spec: steps.Spec, state: steps.RLState):
    """step(state, base, ref, batch, key); `state` may be shapes with shardings."""
    o = config.rl
    opts = steps.RLOptions(
        group=o.group,
        max_new=o.max_new,
        reward=o.reward,
        advantage=o.advantage,
        kl=o.kl,
        length_penalty=o.length_penalty,
        train_ar=o.train_ar and config.ar.kind == "trained",
        length_free=o.length_free,
        update_group=o.update_group,
        micro_av=o.micro_av,
        micro_ar=o.micro_ar,
    )
    tx_av, tx_ar = optimizer(config, "rl", "lr_av"), optimizer(config, "rl", "lr_ar")
    step = functools.partial(steps.rl, spec=spec, opts=opts, tx_av=tx_av, tx_ar=tx_ar)
    return mesh_lib.jit_step(step, state)
