"""Precision: are the samples among the real images?"""

from stages.fidelity.agreement import share
from stages.fidelity.manifold import covered
from stages.fidelity.sets import Fake, Real


def precision(real: Real, fake: Fake) -> tuple[float, float]:
    """Share of samples inside the manifold of as many real images, and its standard error."""
    inside, _ = covered(real, fake)
    return share(inside)
