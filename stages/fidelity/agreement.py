"""What a classifier says of images: agreement with the labels asked for, confidence, class balance; each with its error."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENT = 0.9
REPLICATES = 200  # of the multinomial bootstrap


def accuracy(labels: ArrayLike, probabilities: ArrayLike) -> tuple[float, float]:
    """Share of images whose likeliest class is their label, and its standard error.

    Args:
        labels: (N,) integers.
        probabilities: (N, K).
    """
    return _share(np.asarray(probabilities).argmax(axis=1) == np.asarray(labels))


def confident(probabilities: ArrayLike) -> tuple[float, float]:
    """Share of images, (N, K) class probabilities, whose likeliest class has at least 0.9; and its standard error."""
    return _share(np.asarray(probabilities).max(axis=1) >= CONFIDENT)


def class_histogram(probabilities: ArrayLike) -> NDArray[np.int64]:
    """Number of images, (K,), by likeliest class of (N, K) probabilities."""
    p = np.asarray(probabilities)
    return np.bincount(p.argmax(axis=1), minlength=p.shape[1])


def class_tv(real_frequencies: ArrayLike, fake_counts: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Total variation distance, in [0, 1], from class frequencies (K,) to counts (K,), and its bootstrap standard error."""
    real, counts = np.asarray(real_frequencies, dtype=np.float64), np.asarray(fake_counts)
    n = counts.sum()
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=REPLICATES)
    value, spread = (np.abs(f / n - real).sum(axis=-1) / 2 for f in (counts, draws))
    return float(value), float(spread.std(ddof=1))


def _share(hits: NDArray[np.bool_]) -> tuple[float, float]:
    p = float(hits.mean())
    return p, (p * (1 - p) / len(hits)) ** 0.5
