"""Recall: are the real images among the samples?"""

from stages.fidelity.agreement import share
from stages.fidelity.manifold import covered
from stages.fidelity.sets import Fake, Real


def recall(real: Real, fake: Fake) -> tuple[float, float]:
    """Share of as many real images inside the manifold of the samples, and its standard error."""
    _, inside = covered(real, fake)
    return share(inside)
