"""The exponential moving average of the weights: what gets sampled."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weight(step: int, halflife: float) -> float:
    """How far the average moves towards the current weights in a step (the first is 1): a share in (0, 1].

    The half-life is a fraction of the steps taken so far (in train, of a phase), so the average forgets its start at any length
    of training; 0 keeps no average: it is the current weights.

    Source: the ramp-up of Karras et al. 2022 (EDM), without its cap; close to the power function of Karras et al. 2024 (EDM2).
    """
    return 1 - 0.5 ** (1 / (halflife * step)) if halflife else 1.0


@torch.no_grad()
def update(average: Sequence[Tensor], current: Sequence[Tensor], weight: Tensor) -> None:
    """Move the average, in place, by a share of its distance from the current weights.

    Args:
        weight: 0-d float32, the share; a tensor, so that no step bakes it into a kernel.
    """
    torch._foreach_lerp_(list(average), list(current), [weight] * len(average))
