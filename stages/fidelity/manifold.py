"""Precision and recall: are the samples among the real images, and are the real images among the samples?"""

import torch
from torch import Tensor

K = 3
CHUNK = 1000  # rows of a distance matrix at a time


def precision_recall(real: Tensor, fake: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Share of generated features inside the manifold of the real ones, and the other way round; each with its standard error.

    A set's manifold is the union of the balls around its features that reach to the third nearest other one. Both shares
    depend on the sizes of both sets; those of real images against real ones are far below 1.

    Args:
        real: (N, D) float.
        fake: (M, D) float.

    Raises:
        ValueError: fewer than 4 features on a side.

    Source: Kynkäänniemi et al. 2019, section 2, with k = 3.
    """
    if min(len(real), len(fake)) <= K:
        raise ValueError(f"precision and recall need more than {K} features on both sides, not {len(real)} and {len(fake)}")
    return _covered(real, fake), _covered(fake, real)


def _covered(centres: Tensor, points: Tensor) -> tuple[float, float]:
    """Share of `points` that lie in a ball around a centre, and its binomial standard error."""
    radii = torch.cat([_distances(chunk, centres).kthvalue(K + 1).values for chunk in centres.split(CHUNK)])  # itself is at 0
    inside = torch.cat([(_distances(chunk, centres) <= radii).any(1) for chunk in points.split(CHUNK)])
    share = inside.double().mean().item()
    return share, (share * (1 - share) / len(points)) ** 0.5


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, without the rounding of the expanded square, which would put a feature beside itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
