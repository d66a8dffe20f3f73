"""Samplers: from noise to images along a chain of noise levels. One signature, one function each.

A sampler yields (t, x, x0_hat) after each step: x is where the chain now stands, x0_hat what it believed on the way; the last
x is the sample. It knows the network only as a denoiser, which returns x0_hat at a noise level.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from stages.diffusion.process import Prediction, logsnr, q_posterior, x0_and_eps

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, alpha_bar): x_t (B, C, H, W) and its noise level, 0-d float64, to x0_hat shaped like x_t."""

Noise = Callable[[int], Tensor]
"""Standard normal noise shaped like x, for the step that leaves t."""

Steps = Iterator[tuple[int, Tensor, Tensor]]


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """`steps` indices out of 0..T-1, falling, evenly spaced, beginning with T - 1 ("trailing").

    Source: Lin et al. 2023, table 2: a chain that skips T - 1 starts from noise that it does not know.

    >>> spaced_timesteps(10, 4)
    [9, 7, 4, 2]
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps = {steps} must lie in 1..{T}, the number of timesteps")
    return [-(-T * k // steps) - 1 for k in range(steps, 0, -1)]


def ddpm(denoise: Denoiser, x: Tensor, alpha_bar: Tensor, timesteps: list[int], noise: Noise, *, eta: float = 1.0) -> Steps:
    """Ancestral sampling: each step draws from the posterior q(x_prev | x_t, x0_hat), the last one without noise.

    Args:
        denoise: see Denoiser.
        x: (B, C, H, W) standard normal.
        alpha_bar: (T,) float64 of the whole schedule.
        timesteps: falling indices into it; the posterior spans the gaps.
        noise: see Noise.
        eta: scales the standard deviation; 1 is the posterior's own.

    Source: Ho et al. 2020, algorithm 2 with the variance of eq. (7) ("fixed small").
    """
    for t, a, a_prev in _transitions(alpha_bar, timesteps):
        x0_hat = denoise(x, a)
        mean, variance = q_posterior(x0_hat, x, a, a_prev)
        x = mean if a_prev == 1 else mean + eta * float(variance.sqrt()) * noise(t)
        yield t, x, x0_hat


def ddim(denoise: Denoiser, x: Tensor, alpha_bar: Tensor, timesteps: list[int], noise: Noise, *, eta: float = 0.0) -> Steps:
    """DDIM: the same marginals with as much fresh noise as `eta` says: 0 is deterministic, 1 that of the posterior.

    eps_hat is derived from x0_hat, so that a clipped x0_hat and its eps_hat still add up to x_t.

    Args: as for ddpm.

    Source: Song et al. 2021, eq. (12) and (16).
    """
    for t, a, a_prev in _transitions(alpha_bar, timesteps):
        x0_hat = denoise(x, a)
        eps_hat = (x - float(a.sqrt()) * x0_hat) / float((1 - a).sqrt())
        sigma2 = eta**2 * (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        x = float(a_prev.sqrt()) * x0_hat + float((1 - a_prev - sigma2).sqrt()) * eps_hat
        if sigma2 > 0:
            x = x + float(sigma2.sqrt()) * noise(t)
        yield t, x, x0_hat


SAMPLERS: dict[str, Callable[..., Steps]] = {"ddpm": ddpm, "ddim": ddim}


def _transitions(alpha_bar: Tensor, timesteps: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(t, alpha_bar at t, alpha_bar where the step ends); the last step ends at 1, without noise."""
    levels = [alpha_bar[t] for t in timesteps]
    yield from zip(timesteps, levels, [*levels[1:], torch.ones_like(alpha_bar[0])], strict=True)


def clipped_denoiser(
    net: Callable[[Tensor, Tensor, Tensor], Tensor],
    prediction: Prediction,
    y: Tensor,
    *,
    unlabelled: int,
    guidance: float,
    guidance_interval: tuple[float, float] = (-math.inf, math.inf),
) -> Denoiser:
    """The denoiser of a network: classifier-free guidance towards the labels y, x0_hat clipped to [-1, 1].

    Args:
        net: (x_t, logsnr, y) -> what it predicts.
        y: (B,) int64 labels.
        unlabelled: the label that means "not told".
        guidance: w in output(y) + w (output(y) - output(unlabelled)); 0 is exactly the conditional model, in one evaluation.
        guidance_interval: log-SNR, lowest and highest, between which guidance acts; outside it w is 0.

    Source: Ho & Salimans 2022, eq. (6); the interval, Kynkäänniemi et al. 2024.
    """

    def denoise(x: Tensor, alpha_bar: Tensor) -> Tensor:
        a = alpha_bar.expand(len(x))
        lowest, highest = guidance_interval
        if guidance == 0 or not lowest <= float(logsnr(alpha_bar)) <= highest:
            output = net(x, logsnr(a), y)
        else:
            both = torch.cat([y, torch.full_like(y, unlabelled)])
            told, untold = net(torch.cat([x, x]), logsnr(torch.cat([a, a])), both).chunk(2)
            output = told + guidance * (told - untold)
        x0_hat, _ = x0_and_eps(prediction, output.to(x.dtype), x, a)
        return x0_hat.clamp(-1, 1)

    return denoise
