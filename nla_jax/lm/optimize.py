"""A trainable tree with its optimizer state: one update, and gradient accumulation over microbatches."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from nla_jax.sharding import placement


@flax.struct.dataclass
class Learner:
    """One trainable role: its tree, its optimizer state, and the number of skipped updates."""

    params: Any
    opt: Any
    skipped: jax.Array  # total of updates skipped because a gradient was not finite
    skipped_run: jax.Array  # number of skipped updates since the last good one


def learner(params, tx: optax.GradientTransformation) -> Learner:
    """Return the learner of `params` at the start of training."""
    return Learner(params, tx.init(params), jnp.int32(0), jnp.int32(0))


def learning_rates(lr: float, steps: int, *, warmup: int = 0, final: float = 0.1) -> optax.Schedule:
    """Return step -> learning rate: linear warm-up, then a cosine decay to `final` * `lr`."""
    return optax.warmup_cosine_decay_schedule(
        lr / (warmup + 1), lr, warmup, max(steps, warmup + 1), lr * final)


def optimizer(lr: float, steps: int, *, warmup: int = 0, final: float = 0.1, clip: float = 1.0,
              weight_decay: float = 0.0, b2: float = 0.99,
              mu_dtype: str = "float32") -> optax.GradientTransformation:
    """Return AdamW after a global-norm clip (0: none), with the learning rates of `learning_rates`."""
    schedule = learning_rates(lr, steps, warmup=warmup, final=final)
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mu_dtype=mu_dtype),
    )


def apply(role: Learner, grads, tx) -> tuple[Learner, dict]:
    """Update once; if the gradient's norm is not finite, skip the update and count it.

    Returns (learner, {"grad_norm", "skipped", "skipped_run"}).
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm)
    grads = jax.tree.map(lambda g: jnp.where(good, g, 0.0), grads)
    updates, opt = tx.update(grads, role.opt, role.params)
    params = optax.apply_updates(role.params, updates)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    bad = (~good).astype(jnp.int32)
    new = Learner(keep(params, role.params), keep(opt, role.opt),
                  role.skipped + bad, (role.skipped_run + bad) * bad)
    return new, {"grad_norm": norm, "skipped": new.skipped, "skipped_run": new.skipped_run}


def accumulate(grad_fn, params, batch, n: int, remat: bool = False):
    """Sum gradients and auxiliaries of `grad_fn(params, part, summed)` over n equal parts of the batch.

    `grad_fn` returns (grads, scalars, rows): scalars are summed, rows are concatenated. `summed` is the sum
    so far of the blocks' gradients, to which `grad_fn` must add its own (`model.forward`). It is None unless
    there are several devices, `remat` is set and all block parameters are trained.
    """
    if n == 1:
        return grad_fn(params, placement.shard_rows(batch), None)
    in_place = placement.has_mesh() and remat and "params" in params
    parts = jax.tree.map(lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:]), batch)

    def body(total, part):
        summed = total[0]["params"]["blocks"] if in_place else None
        grads, scalars, rows = grad_fn(params, placement.shard_rows(part), summed)
        if not in_place:
            return jax.tree.map(jnp.add, total, (grads, scalars)), rows
        blocks = grads["params"].pop("blocks")
        rest = {n: a for n, a in total[0]["params"].items() if n != "blocks"}
        grads, scalars = jax.tree.map(
            jnp.add, ({**total[0], "params": rest}, total[1]), (grads, scalars))
        grads["params"]["blocks"] = blocks
        return (grads, scalars), rows

    first = jax.eval_shape(lambda *a: grad_fn(*a, None), params, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first[:2])
    (grads, scalars), rows = jax.lax.scan(body, zeros, parts)
    return grads, scalars, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), rows)
