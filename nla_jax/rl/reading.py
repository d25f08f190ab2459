"""Choose which words of an answer are read, and by whom."""

import dataclasses
import math

import jax.numpy as jnp

from nla_jax import objectives, reconstructor
from nla_jax.rl import widths
from nla_jax.specs import Spec

# `rl.reader`: the AR that is trained, the target itself, or the warm start's AR.
READERS = ("ar", "frozen_target", "warm_ar")


def read_words(spec: Spec, answers: dict, batch: dict, group: int):
    """Return (ids_NT, start_N, end_N): the words ids[start:end] that the readers of a step get.

    answers: of `steps.roll_out`. With edited_ids_NT, edited_end_N and edited_N, the words of rows where
      edited_N is True are edited_ids[:edited_end].
    batch: with prefix_B, the words are truncated to prefix_B tokens, the same number in a whole group. A line
      break at the end of the truncated words is not read, because the text path strips it.
    """
    ids_NT, start_N, end_N = answers["ids_NT"], answers["start_N"], answers["end_N"]
    if "edited_N" in answers:
        edited_N = answers["edited_N"]
        ids_NT = jnp.where(edited_N[:, None], answers["edited_ids_NT"], ids_NT)
        start_N = jnp.where(edited_N, 0, start_N)
        end_N = jnp.where(edited_N, answers["edited_end_N"], end_N)
    if "prefix_B" in batch:
        end_N = jnp.minimum(end_N, start_N + jnp.repeat(batch["prefix_B"], group))
        if len(spec.av.newline) == 1:
            last_N = jnp.take_along_axis(ids_NT, jnp.maximum(end_N - 1, 0)[:, None], 1)[:, 0]
            is_break_N = (last_N == spec.av.newline[0]) & (end_N - 1 > start_N)
            end_N = jnp.where(is_break_N, end_N - 1, end_N)
    return ids_NT, start_N, end_N


def bare_prompt(spec: Spec) -> Spec:
    """Return `spec` with the reconstructor's prompt of the frozen target: the words alone."""
    return dataclasses.replace(spec, ar=dataclasses.replace(spec.ar, before=spec.lead, after=(), suffix=()))


def score(ar, base, spec: Spec, ids_NT, start_N, end_N, h_ND, n_widths: int = 1, micro: int = 1):
    """Return each explanation's scaled MSE [N] and reconstruction [N, D], by the token path.

    n_widths: as for `widths.accumulate`. With several, the rows are read in about `micro` microbatches."""
    params = reconstructor.weights(base, ar, spec.layer, spec.compute, spec.lm)
    ids, valid, last = reconstructor.splice(spec.ar, ids_NT, start_N, end_N)

    def read(_, part, summed):
        prompts = (part[name] for name in ("ids_NT", "valid_NT", "last_N"))
        h_hat = reconstructor.reconstruct(
            params, spec.lm, *prompts, dtype=spec.compute, attention=spec.attention)
        return {}, {}, (objectives.scaled_mse(h_hat, part["h_ND"]), h_hat)

    batch = {"ids_NT": ids, "valid_NT": valid, "last_N": last, "h_ND": h_ND}
    micro = math.gcd(micro, len(ids)) if n_widths > 1 else 1
    return widths.accumulate(read, {}, batch, last + 1, n_widths, micro)[2]


def batch_fve(mse_N, ok_N, h_BD):
    """Return FVE over a batch. Its variance is estimated from the batch, so it is noisy for a small one.

    A failed answer counts as an orthogonal vector, as in the reward."""
    h_BD = objectives.to_sqrt_d(h_BD)
    n = h_BD.shape[0]
    spread = jnp.sum(jnp.mean(jnp.square(h_BD - h_BD.mean(0, keepdims=True)), -1)) / max(n - 1, 1)
    return 1.0 - jnp.mean(jnp.where(ok_N, mse_N, objectives.FAILED_MSE)) / jnp.maximum(spread, 1e-8)
