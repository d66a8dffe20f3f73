"""Manifolds of features: the union of the balls around a set's features that reach to the third nearest other one.

How much of one set lies in another's depends on the sizes of both; that of real images in real ones is far below 1.

Source: Kynkäänniemi et al. 2019, section 2, with k = 3.
"""

import functools

import torch
from torch import Tensor

from stages.fidelity.sets import Fake, Real

K = 3
CHUNK = 1000  # rows of a distance matrix at a time


@functools.lru_cache(maxsize=1)  # precision and recall of a set need the same distances
def covered(real: Real, fake: Fake) -> tuple[Tensor, Tensor]:
    """Which of N samples lie in the manifold of the first N real images, (N,) bool, and which of these in that of the samples.

    Raises:
        ValueError: fewer than 4 features on a side.
    """
    centres = real.features[: fake.n]
    if min(len(centres), fake.n) <= K:
        raise ValueError(f"precision and recall need more than {K} features on both sides, not {len(centres)} and {fake.n}")
    return coverage(centres, _radii_of_real(real, fake.n), fake.features, radii(fake.features))


@functools.lru_cache(maxsize=1)  # many sets of one size are compared with the same real images
def _radii_of_real(real: Real, n: int) -> Tensor:
    return radii(real.features[:n])


def radii(features: Tensor) -> Tensor:
    """Distance, (N,), from each of the features (N, D) to the third nearest other one; itself is at 0."""
    return torch.cat([_distances(chunk, features).kthvalue(K + 1).values for chunk in features.split(CHUNK)])


def coverage(real: Tensor, real_radii: Tensor, fake: Tensor, fake_radii: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `fake` lie in a ball around one of `real`, (M,) bool, and which of `real` in one around one of `fake`, (N,) bool.

    Args:
        real: (N, D) float, with radii (N,).
        fake: (M, D) float, with radii (M,).
    """
    fake_inside, real_inside = [], torch.zeros(len(real), dtype=torch.bool)
    for chunk, chunk_radii in zip(fake.split(CHUNK), fake_radii.split(CHUNK), strict=True):
        distances = _distances(chunk, real)
        fake_inside.append((distances <= real_radii).any(1))
        real_inside |= (distances <= chunk_radii[:, None]).any(0)
    return torch.cat(fake_inside), real_inside


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, without the rounding of the expanded square, which would put a feature beside itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
