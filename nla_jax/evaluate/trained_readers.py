"""Train readers for an evaluation: ARs that learn from other texts than the AR under test.

A trained reader is cached with a description of all its inputs (about.json). An evaluation with the same
inputs loads it; another evaluation trains its own.
"""

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from nla_jax import reconstructor, steps
from nla_jax.errors import UserError
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import optimize
from nla_jax.lm import params as params_lib
from nla_jax.training import loop
from nla_jax.util import checkpoint, distributed, paths


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
      about: all other inputs of the training (JSON), such as a `digest` of the rows.
      directory: the cache; the reader and its checkpoints are under `name`. None keeps nothing.

    Raises UserError when `directory` cannot be written.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as scratch:
            return train_reader(runner, start, draw, name=name, n_steps=n_steps, optimizer=optimizer,
                           about=about, directory=Path(scratch))
    start = params_lib.float32_copy(start)  # it belongs to the caller, and may be in a narrower dtype
    place = paths.path(directory) / name
    about = {**about, "steps": n_steps, "optimizer": optimizer, "template": runner.ar_template,
             "spec": str(runner.spec), "base": digest(runner.base), "start": digest(start)}
    about = json.loads(json.dumps(about))
    try:
        if _read(place / "about.json") != about:
            paths.remove(place)
        distributed.write_json(place / "about.json", about)
    except OSError as e:
        raise UserError(
            f"{place}: cannot save the reader {name!r} there ({e.strerror}); copy the bundle where you can "
            "write, or choose --probes without independent and surface"
        ) from e
    if (place / "params").exists():
        return checkpoint.load_tree(place / "params", start)
    tx = optimize.optimizer(steps=n_steps, **optimizer)
    one = jax.jit(functools.partial(steps.warm_start_ar, spec=runner.spec, tx=tx), donate_argnums=0)
    state = loop.fit(
        name,
        optimize.learner(start, tx),
        lambda state, batch, i: one(state, runner.base, batch),
        lambda i: _batch(runner, *draw(i)),
        n_steps,
        workdir=place,
        every=20,
    )
    checkpoint.save_tree(place / "params", state.params)
    loop.delete_checkpoints(name, place)
    return state.params


def digest(*parts) -> str:
    """Return a hash of trees of arrays and of lists of texts."""
    hashed = hashlib.blake2b(digest_size=12)
    for part in parts:
        texts = isinstance(part, Sequence) and all(isinstance(t, str) for t in part)
        for leaf in part if texts else jax.tree.leaves(part):
            hashed.update(leaf.encode() if texts else np.ascontiguousarray(leaf).tobytes())
            hashed.update(b"\x1f")
    return hashed.hexdigest()


def _read(path: Path):
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


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
