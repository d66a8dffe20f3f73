"""Confidence in samples beside that in real images."""

from stages.fidelity.confident import confident
from stages.fidelity.sets import Fake, Real


def confident_ratio(real: Real, fake: Fake) -> tuple[float, float] | None:
    """`confident` of the samples over that of the test split, and its standard error; None where no test image is confident."""
    share, error = confident(real, fake)
    of_real = real.shares["confident"]
    return (share / of_real, error / of_real) if of_real else None
