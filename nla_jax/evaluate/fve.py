"""Compute the fraction of variance explained and its bootstrap interval, with NumPy in float64."""

import numpy as np

FEWEST = 4  # an interval needs at least so many documents


def normalise(h_ND) -> np.ndarray:
    """Scale each row to norm sqrt(D)."""
    h = np.asarray(h_ND, np.float64)
    return h * np.sqrt(h.shape[1]) / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)


def errors(h_hat_ND, h_ND, ok_N=None) -> np.ndarray:
    """Return the squared distance [N] between normalised rows.

    Where `ok_N` is False the error is 2 D, that of an orthogonal vector: a failed explanation has no
    reconstruction, and the reward uses the same error.
    """
    d = np.sum((normalise(h_hat_ND) - normalise(h_ND)) ** 2, 1)
    return d if ok_N is None else np.where(ok_N, d, 2.0 * np.shape(h_ND)[1])


def variances(h_ND, meannorm: bool = False) -> np.ndarray:
    """Return the squared distance [N] of each normalised row from the mean of the normalised rows.

    The mean is not rescaled, as in the paper's denominator. `meannorm` rescales it to norm sqrt(D), another
    denominator in use, which gives a larger variance and so a higher FVE.
    """
    h = normalise(h_ND)
    mean = h.mean(0)
    if meannorm:
        mean = normalise(mean[None])[0]
    return np.sum((h - mean) ** 2, 1)


def fve(error_N, variance_N) -> float:
    """Return 1 - sum of errors / sum of variances."""
    return float(1.0 - np.sum(error_N) / np.sum(variance_N))


def interval(error_N, variance_N, docs, *, n: int = 2000, seed: int = 0):
    """Return the 95 % bootstrap interval of `fve`. It resamples documents, because their rows are dependent.

    Args:
      docs: the document of each row. n: resamples.
    """
    low, high = ratio_interval(error_N, variance_N, docs, n=n, seed=seed)
    return (None, None) if low is None else (1.0 - high, 1.0 - low)


def ratio_interval(above_N, below_N, docs, *, n: int = 2000, seed: int = 0):
    """Return the 95 % bootstrap interval of sum(above) / sum(below), resampling documents.

    Resamples with a denominator of 0 are dropped. Returns (None, None) when n is 0, or when fewer than FEWEST
    documents have a denominator other than 0.
    """
    _, doc_N = np.unique(np.asarray(docs), return_inverse=True)
    m = doc_N.max() + 1
    a = np.bincount(doc_N, above_N, m)
    b = np.bincount(doc_N, below_N, m)
    if not n or np.count_nonzero(b) < FEWEST:
        return None, None
    pick = np.random.default_rng(seed).integers(0, m, (n, m))
    above, below = a[pick].sum(1), b[pick].sum(1)
    low, high = np.percentile(above[below != 0] / below[below != 0], [2.5, 97.5])
    return float(low), float(high)


def mean_direction(h_train_ND) -> np.ndarray:
    """Return the mean of the normalised training activations [D]: the baseline that ignores the row."""
    return normalise(h_train_ND).mean(0)
