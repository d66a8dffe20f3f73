"""Accuracy: do the samples show the labels that were asked for?"""

from stages.fidelity.agreement import agreement
from stages.fidelity.sets import Fake, Real


def accuracy(real: Real, fake: Fake) -> tuple[float, float] | None:
    """Share of samples whose likeliest class is the label asked for, and its standard error; None where a sample has no label."""
    return None if (fake.labels < 0).any() else agreement(fake.labels, fake.probabilities)
