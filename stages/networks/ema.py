"""The exponential moving average of the weights: what gets sampled."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update(average: Sequence[Tensor], current: Sequence[Tensor], *, step: int, halflife: float) -> None:
    """Move the average, in place, to where it stands after `step` steps (the first is 1).

    The half-life is a fraction of the steps taken so far (in train, of a phase), so the average forgets its start at any length
    of training; 0 keeps no average: it is the current weights.

    Source: the ramp-up of Karras et al. 2022 (EDM), without its cap; close to the power function of Karras et al. 2024 (EDM2).
    """
    weight = 1 - 0.5 ** (1 / (halflife * step)) if halflife else 1.0
    torch._foreach_lerp_(list(average), list(current), weight)
