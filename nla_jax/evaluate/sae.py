"""A sparse autoencoder (SAE) of a run's activations: features of h that no NLA had a part in.

    a = relu((n(h) - b) E + c);  z keeps the K largest of a, and 0 elsewhere;  z W + b is near n(h)

n scales to norm sqrt(D), as FVE does. The rows of W have norm 1. Source: Gao et al., Scaling and evaluating
sparse autoencoders (arXiv:2406.04093), without its loss for dead latents: W begins with training rows, so
that few latents are dead.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.data import shuffle
from nla_jax.errors import UserError
from nla_jax.evaluate import fitted
from nla_jax.lm import optimize
from nla_jax.objectives import to_sqrt_d
from nla_jax.training import loop
from nla_jax.util.batching import map_rows

FEWEST = 64  # rows from which one can be trained
LATENTS, ROWS_PER_LATENT = 2048, 8  # at most, and fewer for few rows
K = 32  # active latents of a row
STEPS, EPOCHS, BATCH = 400, 40, 512  # at most; fewer and smaller for few rows
OPTIMIZER = {"lr": 1e-3, "warmup": 20, "final": 0.1, "clip": 1.0}


def top_k(a_BM, k: int):
    """Return a where it is among the k largest of its row, and 0 elsewhere."""
    least_B1 = jax.lax.top_k(a_BM, k)[0][:, -1:]
    return jnp.where(a_BM >= least_B1, a_BM, 0.0)


def encode(params, h_BD, k: int):
    """Return the latents z [B, M] of raw activations, at most k of a row above 0."""
    x_BD = to_sqrt_d(h_BD) - params["bias"][None]
    return top_k(jax.nn.relu(x_BD @ params["encoder"] + params["encoder_bias"][None]), k)


def decode(params, z_BM):
    """Return the reconstruction [B, D] of n(h)."""
    return z_BM @ params["decoder"] + params["bias"][None]


def init(h_ND, n_latents: int, seed: int = 0) -> dict:
    """Return parameters whose directions are those of random rows, seen from the mean row."""
    rng = np.random.default_rng([seed, n_latents])
    x_ND = np.asarray(to_sqrt_d(jnp.asarray(h_ND)))
    mean_D = x_ND.mean(0)
    x_MD = x_ND[rng.choice(len(x_ND), n_latents, replace=len(x_ND) < n_latents)] - mean_D
    w_MD = x_MD / np.maximum(np.linalg.norm(x_MD, axis=1, keepdims=True), 1e-6)
    # K correlated directions add up, so that the first reconstruction would be far too long.
    return jax.tree.map(jnp.asarray, {"encoder": w_MD.T.copy() / np.sqrt(K), "decoder": w_MD, "bias": mean_D,
                                      "encoder_bias": np.zeros(n_latents, np.float32)})


@functools.partial(jax.jit, static_argnames=("k", "tx"), donate_argnums=0)
def train_step(state: optimize.Learner, h_BD, k: int, tx):
    """Update once. Return (state, {"loss": the share of variance that is lost, "active": of M, and more})."""

    def loss(params):
        x_BD = to_sqrt_d(h_BD)
        z_BM = encode(params, h_BD, k)
        variance = jnp.mean(jnp.square(x_BD - x_BD.mean(0)[None]))
        return jnp.mean(jnp.square(decode(params, z_BM) - x_BD)) / variance, z_BM

    (lost, z_BM), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    state, metrics = optimize.apply(state, grads, tx)
    w_MD = state.params["decoder"]
    unit_MD = w_MD / jnp.maximum(jnp.linalg.norm(w_MD, axis=1, keepdims=True), 1e-6)
    state = state.replace(params={**state.params, "decoder": unit_MD})
    return state, {"loss": lost, "active": jnp.mean(jnp.any(z_BM > 0, 0)), **metrics}


def sizes(n_rows: int) -> dict[str, int]:
    """Return the sizes of an SAE for this number of training rows: latents, k, steps, batch."""
    most = min(LATENTS, n_rows // ROWS_PER_LATENT)
    latents = 2 ** (max(most, 1).bit_length() - 1)
    batch = min(BATCH, max(FEWEST, n_rows // 64))
    return {"latents": latents, "k": min(K, latents // 4), "batch": batch,
            "steps": min(STEPS, -(-EPOCHS * n_rows // batch))}


def train_or_read(h_ND, directory: Path | None, *, seed: int = 0) -> tuple[dict, int]:
    """Return (parameters, k) of an SAE of these rows, trained once and kept (`fitted.read_or_fit`).

    A killed training goes on where it was. Raises UserError for fewer than FEWEST rows.
    """
    if len(h_ND) < FEWEST:
        raise UserError(f"an SAE needs at least {FEWEST} training rows; there are {len(h_ND)}")
    h_ND, s = np.asarray(h_ND, np.float32), sizes(len(h_ND))
    like = {"encoder": (h_ND.shape[1], s["latents"]), "decoder": (s["latents"], h_ND.shape[1]),
            "bias": (h_ND.shape[1],), "encoder_bias": (s["latents"],)}
    about = {**s, "seed": seed, "optimizer": OPTIMIZER, "rows": fitted.digest(h_ND)}

    def fit(place: Path) -> dict:
        tx = optimize.optimizer(steps=s["steps"], **OPTIMIZER)
        draws = shuffle.epoch_indices(len(h_ND), s["batch"], seed, "sae")
        state = loop.fit(
            "sae",
            optimize.learner(init(h_ND, s["latents"], seed), tx),
            lambda state, h_BD, i: train_step(state, h_BD, s["k"], tx),
            lambda i: h_ND[np.asarray(draws[i])],
            s["steps"],
            workdir=place,
            every=200,
            log_every=20,
        )
        return state.params

    like = {name: np.zeros(shape, np.float32) for name, shape in like.items()}
    return fitted.read_or_fit(directory, "sae", about, like, fit), s["k"]


def latents_of(params, h_ND, k: int, batch: int = 256) -> np.ndarray:
    """Return z [N, M] of raw activations, or of reconstructions of them of any scale."""
    one = jax.jit(functools.partial(encode, k=k))
    return map_rows(lambda h_BD: (one(params, h_BD),), (np.asarray(h_ND, np.float32),), batch)[0]


def reconstruct(params, z_NM) -> np.ndarray:
    """Return the reconstruction of n(h) from latents: [N, D]."""
    return np.asarray(decode(params, jnp.asarray(z_NM)))


def active_share(params, h_ND, k: int, rows: Sequence[int]) -> np.ndarray:
    """Return for each latent the share of these rows in which it is active: [M]."""
    return (latents_of(params, np.asarray(h_ND)[rows], k) > 0).mean(0)
