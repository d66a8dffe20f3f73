"""Spacings: which noise levels a chain of few steps visits. Functions of a schedule's alpha_bar, found by name."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stages.diffusion.process import logsnr


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
