"""Weights under which every noise level counts alike, whatever it costs to predict there."""

import torch
from torch import Tensor, nn

PARTS = 32  # of 0..T-1, at most
RATE = 0.05  # share of a step's errors in the running mean


class Balance(nn.Module):
    """Divides the errors of a batch by the running mean of those at their noise levels; in the mean over t a weight is 1.

    The error of v, the default prediction, is large and says little at almost pure noise and at almost none; undivided it drowns
    what the levels between teach, where the shapes form. That of x0 is large at the noisy end alone, that of eps at the clean one.

    Source: the weights that the learned uncertainties of Kendall et al. 2018, and of Karras et al. 2024 (EDM2) over noise levels,
    tend to; here a running mean takes their place.
    """

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T, self.parts = T, min(PARTS, T)
        self.sums: Tensor
        self.counts: Tensor
        self.register_buffer("sums", torch.ones(self.parts))  # an error of 1, until there is a better guess
        self.register_buffer("counts", torch.ones(self.parts))

    def forward(self, errors: Tensor, t: Tensor) -> Tensor:
        """The weighted errors, (B,); then these errors enter the running mean.

        Args:
            errors: (B,) float32, positive.
            t: (B,) int64 in 0..T-1.
        """
        part = t * self.parts // self.T
        weights = self.counts / self.sums
        weighted = errors * (weights / weights.mean())[part]
        with torch.no_grad():
            # Not F.one_hot, which looks at the values, and so waits for them.
            where = (part[:, None] == torch.arange(self.parts, device=part.device)).to(errors.dtype)  # (B, parts)
            self.sums.lerp_(errors @ where, RATE)
            self.counts.lerp_(where.sum(0), RATE)
        return weighted
