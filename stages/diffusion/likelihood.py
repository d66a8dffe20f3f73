"""The variational bound on the negative log-likelihood of images of 8 bits, in bits per pixel.

Three parts: what the last x_t still tells of x0, the steps from T - 1 down to 0, and the decoder that names one of 256 values.
Every function returns nats per pixel, (B,) float64, one for each image; bits per dimension are their sum over log 2.

Source: Ho et al. 2020, eq. (5) and (13).
"""

import math

import torch
from torch import Tensor

from stages.diffusion.process import per_image

HALF_BIN = 1 / 255  # half the distance between neighbouring values in [-1, 1]


def prior_kl(x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """KL divergence of q(x_T | x0) from a standard normal.

    Args:
        x0: (B, C, H, W) float in [-1, 1].
        alpha_bar: 0-d float64, the last of the schedule.
    """
    nats = 0.5 * (alpha_bar * x0.double().square() - alpha_bar - torch.log1p(-alpha_bar))
    return nats.flatten(1).mean(1)


def step_kl(x0_error: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """KL divergence of the posterior q(x_prev | x_t, x0) from p(x_prev | x_t), which believes x0_hat; t >= 1.

    Both have the variance of the posterior, so it is half the difference of the SNRs times the squared error.

    Args:
        x0_error: (B,) float64, mean over pixels of (x0 - x0_hat)^2.
        alpha_bar, alpha_bar_prev: (B,) float64, in [0, 1), of t and of t - 1.

    Source: Kingma et al. 2021 (VDM), eq. (13).
    """
    gained = alpha_bar_prev / (1 - alpha_bar_prev) - alpha_bar / (1 - alpha_bar)
    return 0.5 * gained * x0_error


def step_chances(alpha_bar: Tensor) -> Tensor:
    """How often to draw each t so that the sum of step_kl over t has a small Monte Carlo error: (T,) float64, sum 1, 0 at t = 0.

    In proportion to the step_kl of a standard normal x0, whose best x0_hat errs by 1 / (1 + SNR) = 1 - alpha_bar.

    Args:
        alpha_bar: (T,) float64, falling.
    """
    gained = torch.log1p(-alpha_bar)
    chance = torch.cat([gained[:1] * 0, gained[1:] - gained[:-1]])
    return chance / chance.sum()


def decoder_nll(x0: Tensor, x0_hat: Tensor, alpha_bar: Tensor) -> Tensor:
    """Minus the log-probability of the true values under a Gaussian around x0_hat of variance 1 - alpha_bar, cut into 256 bins.

    The outermost bins reach to infinity.

    Args:
        x0: (B, C, H, W) float, values of uint8 images in [-1, 1].
        x0_hat: the network's, at t = 0.
        alpha_bar: (B,) float64, the first of the schedule.
    """
    x0, x0_hat, sigma = x0.double(), x0_hat.double(), per_image((1 - alpha_bar).sqrt(), x0)
    above = torch.where(x0 > 1 - HALF_BIN, math.inf, (x0 + HALF_BIN - x0_hat) / sigma)
    below = torch.where(x0 < HALF_BIN - 1, -math.inf, (x0 - HALF_BIN - x0_hat) / sigma)
    # In the upper tail both probabilities are close to 1: there the mirrored difference is the exact one.
    mirrored = (below > 0) & (above > 0)
    high, low = torch.where(mirrored, -below, above), torch.where(mirrored, -above, below)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return -(log_high + torch.log(-torch.expm1(log_low - log_high))).flatten(1).mean(1)
