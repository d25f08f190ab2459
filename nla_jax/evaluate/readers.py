"""Readers trained for an evaluation: ARs that were shown something else than the one under test.

A reader is trained once and kept, with everything that decides its numbers beside it; the same
evaluation finds it again, another one trains its own.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from nla_jax import checkpoint, reconstructor, steps
from nla_jax import train as T
from nla_jax.evaluate.roundtrip import Runner


def trained(
    runner: Runner,
    start,
    draw: Callable[[int], tuple[np.ndarray, list[str], int]],
    *,
    name: str,
    steps_: int,
    lr: float,
    about: dict,
    directory: Path | None = None,
    warmup: int = 5,
):
    """An AR's tree, trained from the tree `start` on the words and activations of `draw`.

    Args:
      runner: gives Spec, base and tokenizer.
      draw: step -> (h [B, D], B texts, width in tokens that their prompts are padded to). A text that
        is longer counts nothing.
      about: whatever else decides the numbers (JSON). directory: where the reader is kept under
        `name`, and its training can be taken up again; None keeps nothing.
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as scratch:
            return trained(runner, start, draw, name=name, steps_=steps_, lr=lr, about=about,
                           directory=Path(scratch), warmup=warmup)  # fmt: skip
    place = Path(directory) / name
    about = json.loads(json.dumps({**about, "steps": steps_, "lr": lr, "warmup": warmup}))
    note = place / "about.json"
    if note.is_file() and json.loads(note.read_text("utf-8")) != about:
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(about), "utf-8")
    if (place / "params").exists():
        return checkpoint.load_tree(place / "params", start)
    tx = steps.optimizer(lr, steps_, warmup=min(warmup, max(steps_ // 4, 1)))
    one = jax.jit(functools.partial(steps.warm_start_ar, spec=runner.spec, tx=tx), donate_argnums=0)
    state = T.fit(
        name,
        # Every step consumes its state; `start` stays the caller's.
        steps.learner(jax.tree.map(jax.numpy.copy, start), tx),
        lambda state, batch, i: one(state, runner.base, batch),
        lambda i: _batch(runner, *draw(i)),
        steps_,
        workdir=place,
        every=20,
    )
    checkpoint.save_tree(place / "params", state.params)
    T.finished(name, place)
    return state.params


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
