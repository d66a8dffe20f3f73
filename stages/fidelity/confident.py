"""Confidence: does the classifier see a class at all?"""

from stages.fidelity.agreement import share
from stages.fidelity.sets import Fake, Real

CONFIDENT = 0.9


def confident(real: Real, fake: Fake) -> tuple[float, float]:
    """Share of samples whose likeliest class has a probability of at least 0.9, and its standard error."""
    return share(fake.probabilities.amax(1) >= CONFIDENT)
