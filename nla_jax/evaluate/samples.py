"""How much hangs on the one sample? Several explanations of each activation, and the best of them."""

import jax
import numpy as np

from nla_jax.evaluate.evidence import Evidence, Figure

N = 4  # explanations an activation, that of the round trip included


def samples(ev: Evidence, label: str = "") -> list[Figure]:
    """FVE of the best of N by AR's own judgement, and how far the samples of one h lie apart."""
    errors = [ev.errors(ev.trip.h_text, ev.trip.ok)]
    rebuilt = [ev.trip.h_text]
    for i in range(1, N):
        texts = ev.runner.explain(
            ev.columns["h"],
            jax.random.fold_in(jax.random.key(ev.seed), 200 + i),
            temperature=ev.temperature,
            max_new=ev.max_new,
            label=label and f"{label} sample {i + 1} of {N}",
        )
        rebuilt.append(ev.runner.reconstruct(texts))
        errors.append(ev.errors(rebuilt[-1], np.array([bool(t) for t in texts])))
    return [
        ev.fve(f"fve_best_of_{N}", np.min(errors, 0), f"the best of {N} explanations, chosen with h at hand"),
        ev.fve(f"fve_mean_of_{N}", ev.errors(np.mean(rebuilt, 0)),
               f"the mean of {N} reconstructions: what sampling noise costs"),
    ]  # fmt: skip
