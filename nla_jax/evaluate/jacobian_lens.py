"""The Jacobian lens: what an activation disposes the target to say, as a ranking of its own tokens.

    lens(h) = unembed(J h),   J = E[ sum over p' >= p of d y_p' / d x_p ]

x is the residual stream after block K and y the one after the last block. The expectation is over texts and
over positions p after the first SKIP, which are unlike the others. Source: Gurnee et al., Verbalizable
Representations Form a Global Workspace in Language Models (2026); github.com/anthropics/jacobian-lens.
"""

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import specs
from nla_jax.errors import UserError
from nla_jax.evaluate import fitted
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import params as params_lib
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.util.batching import chunks, map_rows
from nla_jax.util.progress import Progress

TEXTS, WIDTH = 16, 64  # texts of the expectation, and their tokens
SKIP = 16  # first positions of a text that are no sources
ROWS = 32  # rows of J that are computed together
BATCH = 4  # texts that are read together


@functools.partial(jax.jit, static_argnames="spec")
def _jacobian(base, ids_BT, spec: specs.Spec):
    """Return the mean of d(sum of y) / dx [D, D] over texts and source positions."""
    lm, K = spec.lm, spec.layer
    valid = jnp.ones(ids_BT.shape, bool)
    x, _ = forward(params_lib.truncate(base, K + 1, lm), lm, embed(base, lm, ids_BT), valid)
    upper = {"blocks": params_lib.slice_blocks(base["blocks"], lm, K + 1, lm.n_blocks)}
    part = lm.of_blocks(K + 1, lm.n_blocks)
    y, back = jax.vjp(lambda x: forward(upper, part, x, valid)[0], x)

    def rows(d_C):
        # The same unit cotangent at every target position: causality sums over p' >= p.
        ones = jax.nn.one_hot(d_C, lm.d_model, dtype=y.dtype)[:, None, None]
        (g_CBTD,) = jax.vmap(back)(jnp.broadcast_to(ones, (len(d_C), *y.shape)))
        return g_CBTD[:, :, SKIP:].mean((1, 2))

    size = min(ROWS, lm.d_model)
    n = -(-lm.d_model // size)
    d_NC = jnp.minimum(jnp.arange(n * size), lm.d_model - 1).reshape(n, size)
    return jax.lax.map(rows, d_NC).reshape(n * size, -1)[: lm.d_model]


def source_rows(runner: Runner, texts: Iterable[str]) -> list[list[int]]:
    """Return the ids of the first TEXTS texts that have WIDTH tokens, cut to that width.

    Raises UserError if K is the last block, or if no text is long enough.
    """
    spec = runner.spec
    if spec.layer + 1 >= spec.lm.n_blocks:
        raise UserError(f"layer {spec.layer} is the last block: the Jacobian lens is the unembedding itself")
    ids = ([*spec.lead, *plain_ids(runner.tok, t)] for t in texts)
    rows = list(itertools.islice((row[:WIDTH] for row in ids if len(row) >= WIDTH), TEXTS))
    if not rows:
        raise UserError(f"no text has {WIDTH} tokens for the Jacobian lens")
    return rows


def fit_lens(runner: Runner, rows: list[list[int]], label: str = "") -> np.ndarray:
    """Return J [D, D], float32, over `source_rows`.

    It costs D backward passes through the blocks after K for each text.
    """
    spec, size = runner.spec, min(BATCH, len(rows))
    batches = list(chunks(rows[: len(rows) // size * size], size))
    total = np.zeros((spec.lm.d_model,) * 2, np.float64)
    with Progress(label, len(rows), unit="texts") as bar:
        for part in batches:
            total += np.asarray(_jacobian(runner.base, jnp.array(part, jnp.int32), spec), np.float64)
            bar.advance(len(part))
    return (total / len(batches)).astype(np.float32)


def fit_or_read(runner: Runner, texts: Iterable[str], directory: Path | None, label: str = "") -> np.ndarray:
    """Return `fit_lens` of the texts' `source_rows`, kept in `directory` (`fitted.read_or_fit`)."""
    rows, spec = source_rows(runner, texts), runner.spec
    about = {"layer": spec.layer, "lm": str(spec.lm), "base": fitted.digest(runner.base),
             "rows": fitted.digest(np.array(rows)), "first source": SKIP, "batch": BATCH}
    like = {"j_DD": np.zeros((spec.lm.d_model,) * 2, np.float32)}
    found = fitted.read_or_fit(directory, f"jacobian_lens_{spec.layer}", about, like,
                               lambda _: {"j_DD": fit_lens(runner, rows, label)})
    return np.asarray(found["j_DD"])


@functools.partial(jax.jit, static_argnames=("spec", "n"))
def _top(base, j_DD, h_BD, spec, n):
    logits = unembed(base, spec.lm, (h_BD @ j_DD.T)[:, None])[:, 0]
    return jax.lax.top_k(logits, n)


def rank_tokens(runner: Runner, j_DD, h_ND, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids [N, n] of the tokens that the lens ranks first, best first, and their logits [N, n]."""
    top = functools.partial(_top, runner.base, jnp.asarray(j_DD), spec=runner.spec, n=n)
    logit_NK, ids_NK = map_rows(top, (np.asarray(h_ND, np.float32),), runner.batch)
    return ids_NK, logit_NK
