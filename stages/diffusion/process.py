"""The forward process q, its posterior, and what a network may predict; everything for one noise level per image.

t is an index in 0..T-1 and t = 0 already carries one step of noise; "before the first step" is alpha_bar = 1.
Noise levels are given as alpha_bar, float64, of any shape that broadcasts against x: use `per_image` to get there from (B,).
"""

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "x0", "v"]
Weighting = Literal["simple", "min_snr", "variational"]


def per_image(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values reshaped to (B, 1, 1, ...), on the device of x, to broadcast against it."""
    return values.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def logsnr(alpha_bar: Tensor) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)), float64; +inf without noise."""
    return torch.logit(alpha_bar.double())


def alpha_bar_of(logsnr: Tensor) -> Tensor:
    """alpha_bar, float64, at a log signal-to-noise ratio: the inverse of `logsnr`."""
    return torch.sigmoid(logsnr.double())


def q_sample(x0: Tensor, alpha_bar: Tensor, eps: Tensor) -> Tensor:
    """x_t drawn from q(x_t | x0) with the noise eps: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

    Args:
        x0: (B, C, H, W) float in [-1, 1].
        alpha_bar: (B,) float64 in (0, 1].
        eps: standard normal, shaped like x0.

    Source: Ho et al. 2020, eq. (4).
    """
    a = per_image(alpha_bar, x0)
    return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * eps


def q_posterior(x0: Tensor, x_t: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, shaped like x_t, and variance, (B,) float64, of q(x_prev | x_t, x0).

    The step may span several of the original ones: its beta is 1 - alpha_bar / alpha_bar_prev.

    Source: Ho et al. 2020, eq. (6) and (7).
    """
    beta = 1 - alpha_bar / alpha_bar_prev
    from_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    from_x_t = (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = per_image(from_x0, x_t).to(x_t.dtype) * x0 + per_image(from_x_t, x_t).to(x_t.dtype) * x_t
    return mean, beta * (1 - alpha_bar_prev) / (1 - alpha_bar)


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the network should output at (x0, eps): eps, x0, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.

    Source: Ho et al. 2020, eq. (12) for eps; Salimans & Ho 2022, section 4 and appendix D, for v.
    """
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    a = per_image(alpha_bar, x0)
    return a.sqrt().to(x0.dtype) * eps - (1 - a).sqrt().to(x0.dtype) * x0


def x0_and_eps(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(x0_hat, eps_hat) that a network's output means at x_t; the inverse of `target`.

    Args:
        output: what the network said, shaped like x_t.
        alpha_bar: (B,) float64 in (0, 1).
    """
    a = per_image(alpha_bar, x_t)
    signal, noise = a.sqrt().to(x_t.dtype), (1 - a).sqrt().to(x_t.dtype)
    if prediction == "v":
        return signal * x_t - noise * output, noise * x_t + signal * output
    if prediction == "x0":
        return output, (x_t - signal * output) / noise
    return (x_t - noise * output) / signal, output


def loss_weights(weighting: Weighting, prediction: Prediction, alpha_bar: Tensor) -> Tensor:
    """What the mean squared error of a prediction counts for at each t, (T,) float64.

    simple: 1, on whatever is predicted.
    min_snr: min(SNR, 5) on the error of x0: the nearly clean images, easy and many, do not outweigh the others.
    variational: the mean over t of the weighted errors is the bound on the negative log-likelihood in nats per pixel, but for
        its constants: T / 2 (SNR of the t before - SNR) on the error of x0; at t = 0 the decoder, a Gaussian of variance
        1 - alpha_bar.

    Args:
        alpha_bar: (T,) float64 of the whole schedule, in [0, 1).

    Source: Ho et al. 2020, eq. (12) and (14); Hang et al. 2023 (min-SNR), section 3.3; Kingma et al. 2021 (VDM), eq. (13).
    """
    if weighting == "simple":
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    if weighting == "min_snr":
        of_x0 = snr.clamp(max=5)
    else:
        before = torch.cat([1 / (1 - alpha_bar[:1]) + snr[:1], snr[:-1]])
        of_x0 = len(alpha_bar) / 2 * (before - snr)
    # One error seen three ways: |v - v_hat|^2 = (SNR + 1) |x0 - x0_hat|^2 and |eps - eps_hat|^2 = SNR |x0 - x0_hat|^2.
    return of_x0 / {"x0": torch.ones_like(snr), "v": snr + 1, "eps": snr}[prediction]
