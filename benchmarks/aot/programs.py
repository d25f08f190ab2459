"""Make the steps of a config with shapes in the place of arrays, for compilation without device memory."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax import configs, reconstructor, specs, steps, verbalizer
from nla_jax.lm import optimize
from nla_jax.lm import params as params_lib
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from nla_jax.util.keys import new_key


@dataclasses.dataclass(frozen=True)
class Program:
    """One step, `jitted(*args)`. `held`: a tree in device memory during the step that is not an argument."""

    name: str  # "warm_av", "warm_ar", "rl", ...
    jitted: object
    args: tuple
    held: object = None


def _on(mesh: Mesh, *parts) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*parts))


def tree_of(table: dict, mesh: Mesh, dtype=jnp.float32):
    def shape(name, s):
        small = "norm" in name or "bias" in name
        on = NamedSharding(mesh, mesh_lib.spec_of(s.shape, s.axes, mesh))
        return jax.ShapeDtypeStruct(s.shape, jnp.float32 if small else dtype, sharding=on)

    return params_lib.nest({n: shape(n, s) for n, s in table.items()})


def learner(params, tx, mesh: Mesh) -> optimize.Learner:
    """Return `jitted_steps.learner` for shapes."""
    whole = mesh_lib.replicated_sharding(mesh)
    state = jax.eval_shape(lambda p: optimize.learner(p, tx), params)
    place = lambda a, like=None: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=like.sharding if like is not None else whole)
    opt = optax.tree.map_params(tx, place, state.opt, params, transform_non_params=place)
    return optimize.Learner(params, opt, place(state.skipped), place(state.skipped_run))


def roles(config, spec: specs.Spec, mesh: Mesh) -> tuple[dict, dict, dict]:
    """Return (base in the compute dtype, AV, AR) as trees of shapes."""
    base = tree_of(params_lib.table(spec.lm), mesh, spec.compute)
    av = tree_of(verbalizer.table(spec.lm, rank=config.av.rank, affine=config.av.affine != "none"), mesh)
    ar = tree_of(reconstructor.table(spec.lm, spec.layer, rank=config.ar.rank, kind=config.ar.kind), mesh)
    return base, av, ar


def _batch(mesh: Mesh, n: int, **columns) -> dict:
    rows = _on(mesh, ("data", "fsdp"))
    return {k: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=rows)
            for k, (shape, dtype) in columns.items()}


def warm(config, stage: str, spec: specs.Spec, mesh: Mesh) -> Program:
    """Return the step of "lessons_av", "warm_ar", ..."""
    s, D = config[stage], spec.lm.d_model
    base, av, ar = roles(config, spec, mesh)
    T, rank = s.max_tokens, config[stage[-2:]].rank
    if stage.endswith("av"):
        tree = av
        batch = _batch(mesh, s.batch, h_BD=((D,), jnp.float32), ids_BT=((T,), jnp.int32),
                       mask_BT=((T,), jnp.bool_))
    else:
        tree = ar
        batch = _batch(mesh, s.batch, ids_BT=((T,), jnp.int32), valid_BT=((T,), jnp.bool_),
                       last_B=((), jnp.int32), h_BD=((D,), jnp.float32), weight_B=((), jnp.float32))
    state = learner(tree, jitted_steps.optimizer(config, stage), mesh)
    used = base if rank else {}
    return Program(stage, jitted_steps.warm_step(config, stage, spec, state), (state, used, batch),
                   None if rank else base)


def rl(config, spec: specs.Spec, mesh: Mesh) -> Program:
    """Return the RL step."""
    o = config.rl
    base, av, ar = roles(config, spec, mesh)
    state = steps.RLState(learner(av, jitted_steps.optimizer(config, "rl", "lr_av"), mesh),
                          learner(ar, jitted_steps.optimizer(config, "rl", "lr_ar"), mesh))
    ref = jax.eval_shape(lambda t: jitted_steps.reference(t, config.dtype), av)
    ref = jax.tree.map(
        lambda a, like: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=like.sharding), ref, av)
    base = base if config.av.rank or config.ar.rank or config.ar.kind == "frozen" else {}
    batch = _batch(mesh, o.batch, h_BD=((spec.lm.d_model,), jnp.float32), row_B=((), jnp.int32))
    key = jax.eval_shape(lambda: new_key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh_lib.replicated_sharding(mesh))
    return Program("rl", jitted_steps.rl_step(config, spec, state), (state, base, ref, batch, key))


def of(config, spec: specs.Spec, mesh: Mesh, names=()) -> list[Program]:
    """Return the programs of every stage that has steps; with `names`, only of these."""
    none = ("lessons_ar", "warm_ar") if config.ar.kind == "frozen" else ()
    stages = [s for s in (*configs.STAGES, "rl")
              if config[s].steps and s not in none and (not names or s in names)]
    return [rl(config, spec, mesh) if s == "rl" else warm(config, s, spec, mesh) for s in stages]
