"""What the metrics see of the images of a dataset and of a set of samples."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.fidelity.frechet import Gaussian


@dataclass(frozen=True, eq=False)
class Real:
    """The real images that sets are compared with: the test split, in the features of the classifier."""

    gaussian: Gaussian
    """Fitted to the features of the whole split."""
    features: Tensor
    """(N, D) float32, of as many test images as the largest set has, or of all if fewer; classes at their frequencies."""
    class_frequencies: NDArray[np.float64]
    """(K,), sum 1, of the labels of the whole split."""
    shares: Mapping[str, float]
    """Value, on the whole split, of each metric that does not depend on N; empty while these are measured."""


@dataclass(frozen=True, eq=False)
class Fake:
    """A set of N images to score: samples, or real images where a floor is measured."""

    features: Tensor
    """(N, D) float32."""
    probabilities: Tensor
    """(N, K) float64, of the classes."""
    labels: Tensor
    """(N,) int64, the labels asked for; -1 where none was."""

    @property
    def n(self) -> int:
        """N, the number of images."""
        return len(self.labels)

    def part(self, begin: int, end: int) -> "Fake":
        """The images begin .. end - 1."""
        return self.take(torch.arange(begin, end))

    def take(self, rows: Tensor) -> "Fake":
        """The images of these indices, (n,) int64."""
        return Fake(self.features[rows], self.probabilities[rows], self.labels[rows])
