"""Made-up sets of features, probabilities and labels."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from stages.fidelity.frechet import fit_gaussian
from stages.fidelity.metrics import METRICS
from stages.fidelity.sets import Fake, Real


def fake_of(features: Sequence = (), probabilities: Sequence = (), labels: Sequence = ()) -> Fake:
    """A set of which something is given; what is not is zeros, and labels that nobody asked for."""
    n = max(map(len, (features, probabilities, labels)))
    return Fake(
        torch.as_tensor(features, dtype=torch.float32) if len(features) else torch.zeros(n, 1),
        torch.as_tensor(probabilities, dtype=torch.float64) if len(probabilities) else torch.zeros(n, 1).double(),
        torch.as_tensor(labels) if len(labels) else torch.full((n,), -1),
    )


def real_of(split: Fake) -> Real:
    """The real images of a set, all of them."""
    counts = np.bincount(split.labels.clamp(min=0), minlength=split.probabilities.shape[1])
    real = Real(fit_gaussian(split.features), split.features, counts / split.n, {})
    measured = {name: metric.measure(real, split) for name, metric in METRICS.items() if not (metric.depends_on_n or metric.floor)}
    return replace(real, shares={name: found[0] for name, found in measured.items() if found})


def images(n: int, seed: int, *, classes: int = 3, sure: float = 0.95) -> Fake:
    """A set of n images: a class is a cloud of features, each image was asked for as what the classifier sees in it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    probabilities = np.where(labels[:, None] == np.arange(classes), sure, (1 - sure) / (classes - 1))
    return fake_of(rng.normal(size=(n, 6)) + 4 * np.eye(6)[labels], probabilities, labels)
