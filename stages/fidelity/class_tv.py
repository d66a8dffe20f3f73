"""Class balance: do the classes appear as often as among real images?"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.fidelity.sets import Fake, Real

REPLICATES = 200  # of the multinomial bootstrap


def class_tv(real: Real, fake: Fake) -> tuple[float, float]:
    """Total variation distance of the classes seen in the samples from those of the test split, and its standard error."""
    return total_variation(real.class_frequencies, class_histogram(fake.probabilities))


def class_histogram(probabilities: ArrayLike) -> NDArray[np.int64]:
    """Number of images, (K,), by likeliest class of (N, K) probabilities."""
    p = np.asarray(probabilities)
    return np.bincount(p.argmax(axis=1), minlength=p.shape[1])


def total_variation(real_frequencies: ArrayLike, fake_counts: ArrayLike) -> tuple[float, float]:
    """Total variation distance, in [0, 1], from frequencies (K,) to counts (K,), and its bootstrap standard error."""
    real, counts = np.asarray(real_frequencies, dtype=np.float64), np.asarray(fake_counts)
    n = counts.sum()
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=REPLICATES)
    value, spread = (np.abs(f / n - real).sum(axis=-1) / 2 for f in (counts, draws))
    return float(value), float(spread.std(ddof=1))
