"""The Frechet distance between Gaussians fitted to real and to generated features. numpy and scipy only, float64."""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

REPLICATES = 20  # of the bootstrap: its sd is then known to about 16 %


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D), float64, of n features."""

    mean: Floats
    cov: Floats
    n: int


def fit_gaussian(features: ArrayLike) -> Gaussian:
    """The Gaussian of features (N, D).

    Raises:
        ValueError: N < 2, where there is no covariance.
    """
    f = np.asarray(features, dtype=np.float64)
    if f.ndim != 2 or len(f) < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, (N, D); got shape {f.shape}")
    mean = f.mean(axis=0)
    centred = f - mean
    return Gaussian(mean, centred.T @ centred / (len(f) - 1), len(f))


def frechet_distance(real: Gaussian, fake: Gaussian) -> float:
    """|mean difference|^2 + tr(C_real + C_fake - 2 (C_real C_fake)^(1/2)), in squared feature units.

    The root is taken in its symmetric form, (R C_fake R)^(1/2) with R = C_real^(1/2), whose trace is the same;
    eigenvalues that rounding made negative count as zero.

    Source: Heusel et al. 2017, eq. (6).
    """
    return _distance(real, _root(real.cov), fake)


def fid(real: Gaussian, fake_features: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """The Frechet distance of generated features, (N, D), and its standard error.

    The error is the sd over 20 seeded bootstrap resamples of the generated features: it speaks of which N images were
    drawn, not of the finite real set nor of the bias that falls with N; for that, read the floor at the same N.
    Resamples do not keep class counts. For sets drawn at fixed class frequencies it is therefore about twice too wide, and
    2.8 times near the floor (measured over 12 noise seeds of one network, N = 1,000).
    """
    fake = np.asarray(fake_features, dtype=np.float64)
    root = _root(real.cov)
    rng = np.random.default_rng(seed)
    draws = (fake[rng.integers(len(fake), size=len(fake))] for _ in range(REPLICATES))
    value = _distance(real, root, fit_gaussian(fake))
    return value, float(np.std([_distance(real, root, fit_gaussian(draw)) for draw in draws], ddof=1))


def _distance(real: Gaussian, real_root: Floats, fake: Gaussian) -> float:
    eigenvalues = scipy.linalg.eigvalsh(real_root @ fake.cov @ real_root)
    shift = real.mean - fake.mean
    overlap = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return float(shift @ shift + np.trace(real.cov) + np.trace(fake.cov) - 2 * overlap)


def _root(cov: Floats) -> Floats:
    eigenvalues, vectors = scipy.linalg.eigh(cov)
    root: Floats = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
    return root
