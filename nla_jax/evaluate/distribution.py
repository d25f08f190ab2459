"""Compare vectors with the activations that a bundle was trained on: percentiles of norm and of angle.

AV was trained on activations of one block. It writes an explanation of any vector, also of one that is no
activation: a difference, a steering vector, a row of an SAE's decoder. Two numbers say how unusual a vector
is: its norm, and its cosine with the mean direction of the training activations. A difference of two
activations has lost the mean direction, so its cosine is near 0. The test is coarse: a vector that keeps the
mean direction and has noise for the rest passes it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F

LEVELS = (0, 0.1, 1, 5, 25, 50, 75, 95, 99, 99.9, 100)  # percentiles that a bundle has
MOST = 20_000
USUAL = (0.1, 99.9)  # a vector outside these percentiles is unusual
SCALES = ("mean", "raw")  # and any number: `strengths`


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a vector compares with the training activations.

    norm: its length. cos_mean: its cosine with their mean direction. norm_percentile, angle_percentile: the
    share of training activations, in percent, with a smaller norm or cosine; None if the bundle has no
    statistics. unusual: what is outside the percentiles USUAL: "", "norm", "angle" or "norm, angle"; None
    without statistics.
    """

    norm: float
    cos_mean: float | None
    norm_percentile: float | None = None
    angle_percentile: float | None = None
    unusual: str | None = None


def statistics(h_ND, mean_D) -> dict:
    """Return the statistics of training activations for a bundle's sidecar, about 300 bytes.

    Of more than MOST rows, evenly spaced ones are used. mean_D: `fve.mean_direction` of training activations.
    """
    h = np.asarray(h_ND[:: -(-len(h_ND) // MOST)], np.float64)
    norms = np.linalg.norm(h, axis=1)

    def levels(values) -> list[float]:
        return [float(f"{x:.5g}") for x in np.percentile(values, LEVELS)]

    return {"rows": len(h), "levels": list(LEVELS), "norm": levels(norms),
            "cos_mean": levels(cos_mean(h, mean_D)), "mean_norm": float(f"{norms.mean():.5g}")}


def of_store(directory: str | Path, fingerprint: str, layer: int, mean_D=None) -> tuple[np.ndarray, dict]:
    """Return (mean direction, `statistics`) of the warm rows of a store. mean_D: the direction, if known.

    Raises UserError if the store is of another target (its fingerprint) or layer."""
    plan = store.read_meta(directory)["plan"]
    if (plan["target"], plan["layer"]) != (fingerprint, layer):
        raise UserError(f"{directory} holds activations of another model or layer than the pair explains")
    h_ND = store.load_columns(directory, "warm", ["h"])["h"]
    mean_D = F.mean_direction(h_ND) if mean_D is None else mean_D
    return mean_D, statistics(h_ND, mean_D)


def checked(value, where: str) -> dict | None:
    """Return `statistics` that were read from a file, or None. Raises UserError if they are malformed."""
    if value is None:
        return None
    lists = [value.get(k) if isinstance(value, dict) else None for k in ("levels", "norm", "cos_mean")]
    numbers = [*lists, [value.get("mean_norm")] if isinstance(value, dict) else None]
    whole = all(isinstance(a, list) and len(a) > 1 for a in lists) and len({len(a) for a in lists}) == 1
    if not whole or not all(isinstance(x, int | float) and np.isfinite(x) for a in numbers for x in a):
        raise UserError(f"{where}: activations are no statistics of activations; remove the key")
    return value


def cos_mean(h_ND, mean_D) -> np.ndarray:
    """Return the cosine [N] of each row with the mean direction."""
    mean = np.asarray(mean_D, np.float64)
    return F.normalise(h_ND) @ mean / (np.linalg.norm(mean) * np.sqrt(len(mean)))


def compare_rows(h_ND, mean_D, known: Mapping | None) -> list[Fit]:
    """Return each row's Fit. known: `statistics`, or None for a bundle without them."""
    norm_N = np.linalg.norm(np.asarray(h_ND, np.float64), axis=1)
    if mean_D is None:
        return [Fit(float(n), None) for n in norm_N]
    cos_N = cos_mean(h_ND, mean_D)
    if known is None:
        return [Fit(float(n), float(c)) for n, c in zip(norm_N, cos_N, strict=True)]
    percent = [_percentiles(values, known[name], known["levels"])
               for name, values in (("norm", norm_N), ("cos_mean", cos_N))]
    out = []
    for n, c, p_norm, p_angle in zip(norm_N, cos_N, *percent, strict=True):
        odd = [what for what, p in (("norm", p_norm), ("angle", p_angle)) if not USUAL[0] <= p <= USUAL[1]]
        out.append(Fit(float(n), float(c), float(p_norm), float(p_angle), ", ".join(odd)))
    return out


def _percentiles(values, at: Sequence[float], levels: Sequence[float]) -> np.ndarray:
    """Return the percentile of each value by linear interpolation; 0 below the least value, 100 above."""
    at = np.maximum.accumulate(np.asarray(at, np.float64))
    return np.interp(values, at, levels)


def parse_scale(text: str) -> str | float:
    """Return "mean", "raw" or a number above 0. Raises UserError."""
    if text in SCALES:
        return text
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"scale {text}: must be mean, raw, or a number above 0, such as 0.5")
    return value


def strengths(h_ND, scale: str | float, known: Mapping | None) -> np.ndarray | None:
    """Return by how much [N] the injected vectors are larger than in training; None: as in training.

    In training every h is scaled to one norm before it is injected (`verbalizer.inject`), so its own norm
    does not matter. That is "mean". A number is a multiple of it. With "raw" the multiple is each row's norm
    over the mean norm of training activations. Raises UserError for "raw" without statistics.
    """
    if scale == "mean":
        return None
    if scale != "raw":
        return np.full(len(h_ND), scale, np.float32)
    if known is None:
        raise UserError("scale raw: this bundle has no statistics of its training activations, so their mean "
                        "norm is unknown: give a number, or write them with `nla pack --store STORE`")
    return (np.linalg.norm(np.asarray(h_ND, np.float64), axis=1) / known["mean_norm"]).astype(np.float32)
