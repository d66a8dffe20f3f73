"""The Frechet distance between Gaussians fitted to real and to generated features. numpy and scipy only, float64."""

import functools
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D), float64, of n features."""

    mean: Floats
    cov: Floats
    n: int

    @functools.cached_property
    def root(self) -> Floats:
        """The symmetric root of the covariance, (D, D); eigenvalues that rounding made negative count as zero."""
        eigenvalues, vectors = scipy.linalg.eigh(self.cov)
        root: Floats = (vectors * np.sqrt(np.maximum(eigenvalues, 0))) @ vectors.T
        return root


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
    eigenvalues = scipy.linalg.eigvalsh(real.root @ fake.cov @ real.root)
    shift = real.mean - fake.mean
    overlap = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    return float(shift @ shift + np.trace(real.cov) + np.trace(fake.cov) - 2 * overlap)
