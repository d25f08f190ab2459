"""A trainable tree with its optimizer: one update, and gradients over microbatches."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from nla_jax.sharding import placement


@flax.struct.dataclass
class Learner:
    """One trainable role: its tree, its optimizer, and how many updates were refused."""

    params: Any
    opt: Any
    skipped: jax.Array  # updates refused because a gradient was not finite, in all
    skipped_run: jax.Array  # the same, since the last good update


def learner(params, tx: optax.GradientTransformation) -> Learner:
    """A role at the start of training."""
    return Learner(params, tx.init(params), jnp.int32(0), jnp.int32(0))


def optimizer(lr: float, steps: int, *, warmup: int = 0, final: float = 0.1, clip: float = 1.0,
              weight_decay: float = 0.0, b2: float = 0.99,
              mu_dtype: str = "float32") -> optax.GradientTransformation:
    """AdamW behind a global-norm clip; linear warm-up, then a cosine to `final` of the peak."""
    schedule = optax.warmup_cosine_decay_schedule(
        lr / (warmup + 1), lr, warmup, max(steps, warmup + 1), lr * final)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mu_dtype=mu_dtype),
    )


def apply(role: Learner, grads, tx) -> tuple[Learner, dict]:
    """One update, or none where the gradient's norm is not finite; counted either way."""
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

    `grad_fn` returns (grads, scalars, rows): scalars are summed, rows are concatenated back. `summed` is the
    sum so far of the blocks' gradients where `grad_fn` is to add to it itself (`model.forward`), else None:
    on several devices, where blocks are recomputed and all of them trained.
    """
    if n == 1:
        return grad_fn(params, placement.rows(batch), None)
    in_place = placement.active() and remat and "params" in params
    parts = jax.tree.map(lambda a: a.reshape(n, a.shape[0] // n, *a.shape[1:]), batch)

    def body(total, part):
        summed = total[0]["params"]["blocks"] if in_place else None
        grads, scalars, rows = grad_fn(params, placement.rows(part), summed)
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
