"""Train readers for an evaluation: ARs that learn from other texts than the AR under test.

A trained reader is kept (`fitted`).
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nla_jax import reconstructor, steps
from nla_jax.evaluate import fitted
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import optimize
from nla_jax.lm import params as params_lib
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import loop


def train_reader(
    runner: Runner,
    start,
    draw: Callable[[int], tuple[np.ndarray, list[str], int]],
    *,
    name: str,
    n_steps: int,
    optimizer: dict,
    about: dict,
    directory: Path | None = None,
):
    """Train an AR from the tree `start` on the texts and activations of `draw`, and return its tree.

    Args:
      runner: provides Spec, base and tokenizer.
      draw: step -> (h [B, D], B texts, width in tokens that their prompts are padded to). A longer prompt
        gets weight 0.
      optimizer: arguments of `optimize.optimizer`, including "lr".
      about: all other inputs of the training (JSON), such as a `fitted.digest` of the rows.
      directory: where the reader is kept under `name` (`fitted.read_or_fit`, and its errors).
    """
    # Copied, because it belongs to the caller, and may be in a narrower dtype.
    start = _on_mesh(params_lib.float32_copy(start), mesh_lib.mesh_of(runner.base))
    about = {**about, "steps": n_steps, "optimizer": optimizer, "template": runner.ar_template,
             "spec": str(runner.spec), "base": fitted.digest(runner.base), "start": fitted.digest(start)}

    def fit(place: Path):
        tx = optimize.optimizer(steps=n_steps, **optimizer)
        one = jax.jit(functools.partial(steps.warm_start_ar, spec=runner.spec, tx=tx), donate_argnums=0)
        state = loop.fit(
            name,
            # Copied, because every step donates its state and `start` belongs to the caller.
            optimize.learner(jax.tree.map(jax.numpy.copy, start), tx),
            lambda state, batch, i: one(state, runner.base, batch),
            lambda i: _batch(runner, *draw(i)),
            n_steps,
            workdir=place,
            every=20,
        )
        return state.params

    return fitted.read_or_fit(directory, name, about, start, fit)


def _on_mesh(tree, mesh):
    """Replicate the arrays of a tree that are on one device, such as a new head. A kept reader is read with
    these shardings, and all its arrays must be on the target's devices."""
    one = lambda a: isinstance(a.sharding, jax.sharding.SingleDeviceSharding)
    whole = mesh_lib.replicated_sharding(mesh)
    return tree if mesh is None else jax.tree.map(
        lambda a: mesh_lib.shard_array(a, whole) if one(a) else a, tree)


def _batch(runner: Runner, h_BD, texts: list[str], width: int) -> dict:
    ids, valid, last = reconstructor.rows(
        runner.tok, runner.ar_template, texts, runner.spec.ar.pad, multiple=width
    )
    return {
        "ids_BT": ids[:, :width],
        "valid_BT": valid[:, :width],
        "last_B": np.minimum(last, width - 1),
        "h_BD": np.asarray(h_BD, np.float32),
        "weight_B": (last < width).astype(np.float32),
    }
