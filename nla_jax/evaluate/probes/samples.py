"""Measure the variation between samples: several explanations of each activation, and the best of them."""

import numpy as np

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.probe_types import Evidence, Figure, evenly_spaced
from nla_jax.util.keys import key_for

N = 4  # explanations per activation, including that of the round trip
ROWS = 64  # activations, at most


def samples(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of one of N samples, of the best one by error, and of the mean of the readable ones."""
    if not ev.temperature:
        return []  # at temperature 0 all samples are equal
    rows = evenly_spaced(range(len(ev)), ROWS)
    h = ev.columns["h"][rows]
    said = [[ev.trip.explanations[i] for i in rows]]
    said += [
        ev.runner.explain(
            h,
            key_for(ev.seed, "samples", i),
            temperature=ev.temperature,
            max_new=ev.max_new,
            label=label and f"{label} sample {i + 1} of {N}",
        )
        for i in range(1, N)
    ]
    ok_XN = np.array([[bool(t) for t in texts] for texts in said])
    h_hat_XND = np.stack([F.normalise(ev.reconstruct(texts)) for texts in said])
    error_XN = np.stack([F.errors(h_hat, h, ok) for h_hat, ok in zip(h_hat_XND, ok_XN, strict=True)])
    mean_ND = (h_hat_XND * ok_XN[..., None]).sum(0)
    of_mean_N = F.errors(mean_ND, h, ok_XN.any(0))

    def figure(name, error, asks):
        whole = np.zeros(len(ev))
        whole[rows] = error
        return ev.fve(name, whole, asks, rows=rows)

    return [
        figure(f"fve_one_of_{N}", error_XN.mean(0), f"{N} explanations an activation, each for itself"),
        figure(f"fve_best_of_{N}", error_XN.min(0), "the best of them, chosen with h at hand"),
        figure(f"fve_mean_of_{N}", of_mean_N, "the mean of what the readable ones say"),
    ]
