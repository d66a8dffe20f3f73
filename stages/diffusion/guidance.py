"""Classifier-free guidance: how a network that may be told a label becomes a denoiser."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stages.diffusion.process import Prediction, logsnr, x0_and_eps
from stages.diffusion.samplers import Denoiser


def denoiser(
    net: Callable[[Tensor, Tensor, Tensor], Tensor],
    prediction: Prediction,
    y: Tensor,
    *,
    unlabelled: int,
    guidance: float = 0.0,
    guidance_interval: tuple[float, float] = (-math.inf, math.inf),
    clip: bool = True,
) -> Denoiser:
    """The denoiser of a network, with classifier-free guidance towards the labels y.

    Args:
        net: (x_t, logsnr, y) -> what it predicts.
        y: (B,) int64 labels.
        unlabelled: the label that means "not told".
        guidance: w in output(y) + w (output(y) - output(unlabelled)); 0 is exactly the conditional model, in one evaluation.
        guidance_interval: log-SNR, lowest and highest, between which guidance acts; outside it w is 0.
        clip: x0_hat to [-1, 1], where images are; a sampler that extrapolates it may leave them.

    Source: Ho & Salimans 2022, eq. (6); the interval, Kynkäänniemi et al. 2024.
    """

    def denoise(x: Tensor, alpha_bar: Tensor) -> Tensor:
        a = alpha_bar.expand(len(x))
        lowest, highest = guidance_interval
        if guidance == 0 or not lowest <= float(logsnr(alpha_bar)) <= highest:
            output = net(x, logsnr(a), y).to(x.dtype)
        else:
            both = torch.cat([y, torch.full_like(y, unlabelled)])
            told, untold = net(torch.cat([x, x]), logsnr(torch.cat([a, a])), both).to(x.dtype).chunk(2)
            output = told + guidance * (told - untold)
        x0_hat, _ = x0_and_eps(prediction, output, x, a)
        return x0_hat.clamp(-1, 1) if clip else x0_hat

    return denoise
