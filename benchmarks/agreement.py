"""Compare what two sides computed, before anything is timed."""

import numpy as np

# Largest allowed differences between the sides: mean |log-probability difference| and 1 - cosine of AR's
# predictions by precision; relative differences of the updates' scalars (bfloat16).
LOGP = {"fp32": 1e-3, "bf16": 0.15}
COSINE = {"fp32": 1e-5, "bf16": 0.01}
SCALARS = {"loss": 0.02, "kl": 0.1, "mse": 0.02, "norm": 0.01, "grad_norm": 0.05, "av_grad_norm": 0.05}


class SidesDisagree(Exception):
    """The two sides do not agree."""


def check_agreement(ours: dict, theirs: dict) -> dict:
    """Return the differences between two `check` answers. Raises SidesDisagree if one is too large."""
    out = {}
    for kind in (k for k in LOGP if f"logp_{k}" in ours):
        a, b = (np.array(s[f"logp_{kind}"], np.float64) for s in (ours, theirs))
        out[f"logp_{kind}"] = float(np.abs(a - b).mean())
        x, y = (np.array(s[f"h_{kind}"], np.float64) for s in (ours, theirs))
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        out[f"ar_{kind}"] = float((1 - cosine).max())
        if not (out[f"logp_{kind}"] <= LOGP[kind] and out[f"ar_{kind}"] <= COSINE[kind]):
            raise SidesDisagree(f"the sides differ, nothing is timed: {out}")
    return out


def check_scalar_agreement(phase: str, ours: dict, theirs: dict) -> dict:
    """Return the relative differences of an update's metrics. Raises SidesDisagree if one is too large."""
    out = {}
    for name, limit in SCALARS.items():
        if name in ours and name in theirs:
            out[f"{phase}.{name}"] = abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-9)
            if not out[f"{phase}.{name}"] <= limit:
                raise SidesDisagree(
                    f"{phase}: {name} is {ours[name]:.6g} in nla_jax, {theirs[name]:.6g} in torch"
                )
    return out
