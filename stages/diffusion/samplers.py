"""Samplers: from noise to images along a path of noise levels. One signature, one function each.

A path is (S + 1,) float64 of rising alpha_bar: where the chain starts, and where each of its S steps ends; 1, no noise, for
images. A sampler yields (x, x0_hat) after each step: x is where the chain now stands, x0_hat what it believed on the way; the
last x is the sample. It knows the network only as a denoiser, which returns x0_hat at any noise level.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from stages.diffusion.process import Prediction, logsnr, q_posterior, x0_and_eps

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, alpha_bar): x_t (B, C, H, W) and its noise level, 0-d float64, to x0_hat shaped like x_t."""

Noise = Callable[[int], Tensor]
"""Standard normal noise shaped like x, for the step that has so many steps after it: in a full chain, the one that leaves t."""

Steps = Iterator[tuple[Tensor, Tensor]]

Before = tuple[Tensor, Tensor]
"""x0_hat of the step before, and half of how far that step went in log-SNR."""


def ddpm(
    denoise: Denoiser, x: Tensor, path: Tensor, noise: Noise, *, variance: Literal["posterior", "beta"] = "posterior"
) -> Steps:
    """Ancestral sampling: each step draws from p(x_prev | x_t) around the mean of q(x_prev | x_t, x0_hat); the last has no noise.

    Args:
        denoise: see Denoiser.
        x: (B, C, H, W) standard normal.
        path: see above; a step may span several of those that the schedule has.
        noise: see Noise.
        variance: of a step: that of the posterior, or beta, which suits long chains alone.

    Source: Ho et al. 2020, algorithm 2; the variances are the two of section 3.2.
    """
    for after, a, a_next in _steps(path):
        x0_hat = denoise(x, a)
        mean, posterior = q_posterior(x0_hat, x, a, a_next)
        drawn = posterior if variance == "posterior" else 1 - a / a_next
        x = mean if a_next == 1 else mean + float(drawn.sqrt()) * noise(after)
        yield x, x0_hat


def ddim(denoise: Denoiser, x: Tensor, path: Tensor, noise: Noise, *, eta: float = 0.0) -> Steps:
    """DDIM: the same marginals with as much fresh noise as `eta` says: 0 is deterministic, 1 that of the posterior.

    eps_hat is derived from x0_hat, so that a clipped x0_hat and its eps_hat still add up to x_t.

    Args: as for ddpm.

    Source: Song et al. 2021, eq. (12) and (16).
    """
    for after, a, a_next in _steps(path):
        x0_hat = denoise(x, a)
        sigma2 = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        x = float(a_next.sqrt()) * x0_hat + float((1 - a_next - sigma2).sqrt()) * _eps(x, x0_hat, a)
        if sigma2 > 0:
            x = x + float(sigma2.sqrt()) * noise(after)
        yield x, x0_hat


def dpm_solver_pp_2m(denoise: Denoiser, x: Tensor, path: Tensor, noise: Noise) -> Steps:
    """DPM-Solver++ (2M): second order in log-SNR from the x0_hat of this step and of the one before, one evaluation a step.

    The first step has none before it, and one that ends without noise is infinitely long: both are of first order, as DDIM.

    Args: as for ddpm; no noise is asked for.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """
    before = None
    for _, a, a_next in _steps(path):
        x0_hat = denoise(x, a)
        ahead, before = _ahead(x0_hat, a, a_next, before)
        ratio = ((1 - a_next) / (1 - a)).sqrt()
        x = float(ratio) * x + float(a_next.sqrt() - ratio * a.sqrt()) * ahead
        yield x, x0_hat


def sde_dpm_solver_pp_2m(denoise: Denoiser, x: Tensor, path: Tensor, noise: Noise) -> Steps:
    """DPM-Solver++ (2M) of the reverse SDE: ancestral sampling around the x0_hat that DPM-Solver++ looks ahead to.

    As ddpm with the variance of the posterior, which it is where there is nothing to look ahead from, but of second order in
    what the network believes. In few wide steps it loses less of the spread than ddpm (tests/diffusion/test_samplers.py).

    Args: as for ddpm.

    Source: Lu et al. 2022 (DPM-Solver++), the multistep second-order solver of the diffusion SDE.
    """
    before = None
    for after, a, a_next in _steps(path):
        x0_hat = denoise(x, a)
        ahead, before = _ahead(x0_hat, a, a_next, before)
        mean, variance = q_posterior(ahead, x, a, a_next)
        x = mean if a_next == 1 else mean + float(variance.sqrt()) * noise(after)
        yield x, x0_hat


def _ahead(x0_hat: Tensor, a: Tensor, a_next: Tensor, before: Before | None) -> tuple[Tensor, Before]:
    """x0_hat extrapolated to the middle of the step, in log-SNR, from the step before; and what the next step needs of this one.

    The denoiser clips x0_hat; what is extrapolated from it is not clipped again and may lie outside [-1, 1].
    """
    h = (logsnr(a_next) - logsnr(a)) / 2
    ahead = x0_hat
    if before is not None and a_next < 1:
        x0_before, h_before = before
        ahead = x0_hat + float(h / (2 * h_before)) * (x0_hat - x0_before)
    return ahead, (x0_hat, h)


def heun(denoise: Denoiser, x: Tensor, path: Tensor, noise: Noise) -> Steps:
    """Heun's method in sigma = sqrt(1 / SNR), as in EDM without its churn: two evaluations a step, one where it ends without noise.

    A step is DDIM's, then corrected by how eps_hat changed across it.

    Args: as for ddpm; no noise is asked for.

    Raises:
        ValueError: the path starts at alpha_bar = 0, where sigma is infinite.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """
    if path[0] == 0:
        raise ValueError("'heun' cannot start at a zero SNR, where sigma is infinite; use another sampler")
    for _, a, a_next in _steps(path):
        x0_hat = denoise(x, a)
        eps_hat = _eps(x, x0_hat, a)
        x = float(a_next.sqrt()) * x0_hat + float((1 - a_next).sqrt()) * eps_hat
        if a_next < 1:
            change = _eps(x, denoise(x, a_next), a_next) - eps_hat
            x = x + float((1 - a_next).sqrt() - (a_next * (1 - a) / a).sqrt()) / 2 * change
        yield x, x0_hat


SAMPLERS: dict[str, Callable[..., Steps]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "sde_dpm_solver_pp_2m": sde_dpm_solver_pp_2m,
    "heun": heun,
}


def trailing(alpha_bar: Tensor, steps: int) -> Tensor:
    """Every T / steps-th level, counted from T - 1, which is the first: 9, 7, 4, 2 for 4 of 10.

    Source: Lin et al. 2023, table 2: a chain that skips T - 1 starts from noise that it does not know.
    """
    T = len(alpha_bar)
    return alpha_bar[[-(-T * k // steps) - 1 for k in range(steps, 0, -1)]]


def leading(alpha_bar: Tensor, steps: int) -> Tensor:
    """Every (T // steps)-th level, counted from 0, which is the last; T - 1 is left out: 6, 4, 2, 0 for 4 of 10.

    Source: the spacing of Song et al. 2021's code.
    """
    return alpha_bar[[len(alpha_bar) // steps * k for k in range(steps - 1, -1, -1)]]


def linspace(alpha_bar: Tensor, steps: int) -> Tensor:
    """Evenly spaced levels from T - 1 to 0, both included: 9, 6, 3, 0 for 4 of 10.

    Source: the spacing of Nichol & Dhariwal 2021's code.
    """
    return alpha_bar[torch.linspace(len(alpha_bar) - 1, 0, steps, dtype=torch.float64).round().long()]


def even_logsnr(alpha_bar: Tensor, steps: int) -> Tensor:
    """Levels between those of the schedule, from its noisiest to its cleanest, evenly spaced in log-SNR.

    Source: Lu et al. 2022 (DPM-Solver), section 3.4.
    """
    first, last = _ends(alpha_bar)
    return torch.sigmoid(torch.linspace(first, last, steps, dtype=torch.float64, device=alpha_bar.device))


def karras(alpha_bar: Tensor, steps: int) -> Tensor:
    """Levels between those of the schedule, from its noisiest to its cleanest, evenly spaced in sigma^(1/7), sigma^2 = 1 / SNR.

    Source: Karras et al. 2022 (EDM), eq. (5) with rho = 7.
    """
    first, last = (math.exp(-level / 14) for level in _ends(alpha_bar))
    root = torch.linspace(first, last, steps, dtype=torch.float64, device=alpha_bar.device)
    return 1 / (1 + root**14)


def shifted_cosine(alpha_bar: Tensor, steps: int) -> Tensor:
    """Levels between those of the schedule, the noisiest first, evenly spaced in the angle of a cosine schedule with more noise.

    The angle of a log-SNR is that whose tangent is exp((log-SNR + 2) / 2). Under a schedule that ends in noise a third of the
    steps then lies below a log-SNR of -3, where the proportions and slants of a sample are settled: few large steps there make
    sets of samples less varied than real ones. The same for images of every size: what is in question at the clean end are
    single pixels, of large images too.

    Source: the shifted cosine schedule of Hoogeboom et al. 2023 (simple diffusion), section 3.1; the 2 was chosen by trial.
    """
    first, last = torch.exp(logsnr(alpha_bar[[-1, 0]]) / 2 + 1).atan().tolist()
    angles = torch.linspace(first, last, steps + 1, dtype=torch.float64, device=alpha_bar.device)[:-1]
    return torch.sigmoid(2 * angles.tan().log() - 2)


SPACINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "even_logsnr": even_logsnr,
    "karras": karras,
    "shifted_cosine": shifted_cosine,
}


def spaced(alpha_bar: Tensor, steps: int, spacing: str) -> Tensor:
    """The path of a chain of so many steps to an image.

    Args:
        alpha_bar: (T,) float64 of the whole schedule.
        steps: 1..T.
        spacing: of SPACINGS.

    Raises:
        ValueError: more steps than T, or none; a spacing in log-SNR or sigma on a schedule that ends at a zero SNR.
    """
    if not 1 <= steps <= len(alpha_bar):
        raise ValueError(f"steps = {steps} must lie in 1..{len(alpha_bar)}, the number of timesteps")
    return torch.cat([SPACINGS[spacing](alpha_bar, steps), torch.ones_like(alpha_bar[:1])])


def _ends(alpha_bar: Tensor) -> tuple[float, float]:
    first, last = logsnr(alpha_bar[[-1, 0]]).tolist()
    if first == -math.inf:
        raise ValueError("spacings in log-SNR or sigma need a schedule that ends above a zero SNR; use 'trailing'")
    return first, last


def _steps(path: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(steps after it, alpha_bar where it starts, alpha_bar where it ends) of each step."""
    for i, (a, a_next) in enumerate(itertools.pairwise(path)):
        yield len(path) - 2 - i, a, a_next


def _eps(x: Tensor, x0_hat: Tensor, alpha_bar: Tensor) -> Tensor:
    return (x - float(alpha_bar.sqrt()) * x0_hat) / float((1 - alpha_bar).sqrt())


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
