"""Fraction of variance explained, and its interval. NumPy, float64."""

import numpy as np

FEWEST = 4  # documents that an interval needs


def normalised(h_ND) -> np.ndarray:
    """Rows scaled to norm sqrt(D)."""
    h = np.asarray(h_ND, np.float64)
    return h * np.sqrt(h.shape[1]) / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)


def errors(h_hat_ND, h_ND, ok_N=None) -> np.ndarray:
    """Squared distance [N] of normalised rows; where `ok_N` is False, an orthogonal vector's: 2 D.

    A failed explanation has no reconstruction; it is charged what the reward charges it.
    """
    d = np.sum((normalised(h_hat_ND) - normalised(h_ND)) ** 2, 1)
    return d if ok_N is None else np.where(ok_N, d, 2.0 * np.shape(h_ND)[1])


def variances(h_ND, meannorm: bool = False) -> np.ndarray:
    """Squared distance [N] of each normalised row from the rows' mean.

    The mean is NOT rescaled (ours and the paper's denominator); `meannorm` rescales it to norm
    sqrt(D), the other denominator in use, which reads higher.
    """
    h = normalised(h_ND)
    mean = h.mean(0)
    if meannorm:
        mean = normalised(mean[None])[0]
    return np.sum((h - mean) ** 2, 1)


def fve(error_N, variance_N) -> float:
    """1 - sum of errors / sum of variances."""
    return float(1.0 - np.sum(error_N) / np.sum(variance_N))


def interval(error_N, variance_N, docs, *, n: int = 2000, seed: int = 0):
    """95 % bootstrap interval of `fve`, resampling whole documents (rows of one are not independent)."""
    low, high = ratio_interval(error_N, variance_N, docs, n=n, seed=seed)
    return (None, None) if low is None else (1.0 - high, 1.0 - low)


def ratio_interval(above_N, below_N, docs, *, n: int = 2000, seed: int = 0):
    """The same of sum(above) / sum(below); resamples with nothing below are left out.

    (None, None) when fewer than FEWEST documents have anything below: resampling those says nothing.
    """
    _, doc_N = np.unique(np.asarray(docs), return_inverse=True)
    m = doc_N.max() + 1
    a = np.bincount(doc_N, above_N, m)
    b = np.bincount(doc_N, below_N, m)
    if np.count_nonzero(b) < FEWEST:
        return None, None
    pick = np.random.default_rng(seed).integers(0, m, (n, m))
    above, below = a[pick].sum(1), b[pick].sum(1)
    low, high = np.percentile(above[below != 0] / below[below != 0], [2.5, 97.5])
    return float(low), float(high)


def mean_direction(h_train_ND) -> np.ndarray:
    """The baseline that knows nothing: the mean of normalised training activations, [D]."""
    return normalised(h_train_ND).mean(0)
