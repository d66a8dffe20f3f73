"""What a classifier says of labels, and the error of a share; both of the extractor itself and of samples."""

import numpy as np
from numpy.typing import ArrayLike


def share(hits: ArrayLike) -> tuple[float, float]:
    """Share of the images, (N,) bool, that are hits, and its binomial standard error."""
    hits = np.asarray(hits)
    p = float(hits.mean())
    return p, (p * (1 - p) / len(hits)) ** 0.5


def agreement(labels: ArrayLike, probabilities: ArrayLike) -> tuple[float, float]:
    """Share of images whose likeliest class is their label, and its standard error.

    Args:
        labels: (N,) integers.
        probabilities: (N, K).
    """
    return share(np.asarray(probabilities).argmax(axis=1) == np.asarray(labels))
