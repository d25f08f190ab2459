"""Jit each training step of a config on its mesh. `nla_jax.pipeline.stages` runs the steps, and
`benchmarks.aot` compiles them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nla_jax import configs, specs, steps
from nla_jax.lm import optimize
from nla_jax.lm.model import cast
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement


def optimizer(config, section: str, lr: str = "lr"):
    """Return the optimizer of a config section ("warm_av", ...). `lr`: the key of its learning rate."""
    s = configs.section(config, section)
    rate, steps, shape = _rate_arguments(s, lr)
    return optimize.optimizer(
        rate,
        steps,
        **shape,
        clip=s["clip"],
        weight_decay=s["weight_decay"],
        mu_dtype=config.mu_dtype,
    )


def _rate_arguments(s: dict, lr: str) -> tuple[float, int, dict]:
    return s[lr], s["steps"], {"warmup": min(s["warmup"], max(s["steps"] // 4, 1)), "final": s["final_lr"]}


def learning_rates(config, section: str, lr: str = "lr") -> list[float]:
    """Return the learning rate of each step of a config section; `lr` as for `optimizer`."""
    rate, steps, shape = _rate_arguments(configs.section(config, section), lr)
    at = optimize.learning_rates(rate, steps, **shape)
    return [float(at(i)) for i in range(steps)]


def reference(av: dict, dtype: str) -> dict:
    """Return the warm-start AV as the KL reference of RL, cast to the compute dtype because it is frozen.

    A learned affine map ("inject") is not cast, because it is applied in float32."""
    return {n: t if n == "inject" else cast(t, jnp.dtype(dtype)) for n, t in av.items()}


def warm_step(config, stage: str, spec: specs.Spec, state: optimize.Learner):
    """Return the jitted step(state, base, batch) of "lessons_av", "warm_ar", ...

    The leaves of `state` may be `jax.ShapeDtypeStruct`s with shardings."""
    step = steps.warm_start_av if stage.endswith("av") else steps.warm_start_ar
    tx = optimizer(config, stage)
    more = {"loss_mean": loss_mean(config, stage)} if stage.endswith("av") else {}
    return jit_step(functools.partial(step, spec=spec, tx=tx, micro=config[stage].micro, **more), state)


def loss_mean(config, stage: str) -> str:
    """Return the mean of an AV stage's loss (`loss_weights.LOSS_MEANS`); reading lessons have no choice."""
    return config[stage].get("loss_mean", "tokens")


def rl_step(config, spec: specs.Spec, state: steps.RLState, section: str = "rl"):
    """Return the jitted step(state, base, ref, batch, key) of "rl" or "rl_drill".

    The leaves of `state` may be `jax.ShapeDtypeStruct`s with shardings. An AR with an empty tree is the
    frozen target, and is not trained."""
    step = functools.partial(steps.rl, spec=spec, **_rl_arguments(config, state, section))
    return jit_step(step, state)


def _rl_arguments(config, state: steps.RLState, section: str) -> dict:
    """Return opts, tx_av and tx_ar of an RL step."""
    o = configs.section(config, section)
    opts = steps.RLOptions(**{f.name: o[f.name] for f in dataclasses.fields(steps.RLOptions)})
    opts = dataclasses.replace(opts, train_ar=opts.train_ar and bool(jax.tree.leaves(state.ar.params)))
    return {"opts": opts, "tx_av": optimizer(config, section, "lr_av"),
            "tx_ar": optimizer(config, section, "lr_ar")}


def edited_rl_step(config, spec: specs.Spec, state: steps.RLState, edit):
    """Return step(state, base, ref, batch, key, reader, i) of "rl", with an edit of the answers on the host.

    edit: (step i, answers as NumPy arrays) -> (further answers [N, ...] for `steps.update`, metrics). Every
      process of a pod calls it with all answers, and must return the same.
    """
    arguments, mesh = _rl_arguments(config, state, "rl"), mesh_lib.mesh_of(state)
    rows = mesh_lib.rows_sharding(mesh)
    roll_out = jax.jit(
        placement.trace_under_mesh(
            mesh, functools.partial(steps.roll_out, spec=spec, opts=arguments["opts"])),
        # The answers are replicated, so that every process of a pod can read them.
        out_shardings=(rows, mesh_lib.replicated_sharding(mesh)),
        compiler_options=placement.compiler_options(mesh),
    )
    update = jit_step(functools.partial(steps.update, spec=spec, **arguments), state)

    def step(state, base, ref, batch, key, reader, i):
        batch, answers = roll_out(state.av.params, base, batch, key)
        answers = {name: np.asarray(a) for name, a in answers.items()}
        edited, metrics = edit(i, answers)
        answers = mesh_lib.shard_batch(answers | edited, mesh) if mesh else answers | edited
        state, more = update(state, base, ref, batch, answers, reader)
        return state, more | metrics

    return step


def learner(params, tx, mesh: Mesh):
    """Return the initial training state of a role, with each optimizer moment sharded as its parameter.

    With Auto axes, `jit(tx.init)` would put all moments on one device, and step 2 would recompile.
    """
    import optax

    from nla_jax.lm import optimize

    state = optimize.learner(params, tx)
    opt = optax.tree.map_params(
        tx, lambda s, p: mesh_lib.shard_array(s, p.sharding), state.opt, params,
        transform_non_params=lambda s: mesh_lib.shard_array(s, mesh_lib.replicated_sharding(mesh)))
    return state.replace(
        opt=opt,
        skipped=mesh_lib.shard_array(state.skipped, mesh_lib.replicated_sharding(mesh)),
        skipped_run=mesh_lib.shard_array(state.skipped_run, mesh_lib.replicated_sharding(mesh)),
    )


def jit_step(step, state):
    """Jit `step(state, ...) -> (state, metrics)`. Donate the state, keep its shardings, replicate metrics.

    Without `out_shardings`, XLA would choose other shardings for small parameters, and the second step would
    compile again.
    """
    places, mesh = jax.tree.map(lambda a: a.sharding, state), mesh_lib.mesh_of(state)
    return jax.jit(
        placement.trace_under_mesh(mesh, step),
        donate_argnums=0,
        out_shardings=(places, mesh_lib.replicated_sharding(mesh)),
        compiler_options=placement.compiler_options(mesh),
    )
