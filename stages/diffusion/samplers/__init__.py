"""Samplers: from noise to images along a path of noise levels. A file each, found by its name; here is what they share.

The file NAME.py defines `sample(denoise, path, noise, **options)`. It yields (x, x0_hat) after each step: x is where the chain
now stands, x0_hat what it believed on the way; the last x is the sample. It knows the network only as a denoiser.

Args:
    denoise: see Denoiser.
    path: (S + 1,) float64 of rising alpha_bar: where the chain starts, and where each of its S steps ends; 1, no noise, for images.
        A step may span several of those that the schedule has.
    noise: see Noise.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from stages.diffusion import by_name
from stages.diffusion.process import logsnr

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, alpha_bar): x_t (B, C, H, W) and its noise level, 0-d float64, to x0_hat shaped like x_t."""

Level = Tensor | float
"""alpha_bar: 0-d float64, or a number."""

Noise = Callable[[Level, Level], Tensor]
"""Standard normal noise, (B, C, H, W), for the step between two levels of rising alpha_bar, both below 1.

Steps side by side have independent noise. From 0 to a level it is the x_T that belongs to this noise, of a chain that starts there
and has noise in every step; from 0 to 0, one x_T for all chains without.
"""

Steps = Iterator[tuple[Tensor, Tensor]]

Before = tuple[Tensor, Tensor]
"""x0_hat of the step before, and half of how far that step went in log-SNR."""


def names() -> list[str]:
    """The names of all samplers, sorted."""
    return by_name.names("samplers")


def find(name: str) -> Callable[..., Steps]:
    """The function `sample` of a sampler. Raises ValueError, with the names that there are, for an unknown one."""
    function: Callable[..., Steps] = by_name.find("samplers", name, "sample")
    return function


def eps_of(x: Tensor, x0_hat: Tensor, alpha_bar: Tensor) -> Tensor:
    """eps_hat, shaped like x: the noise that x holds at alpha_bar, 0-d float64, if x0_hat is its image."""
    return (x - float(alpha_bar.sqrt()) * x0_hat) / float((1 - alpha_bar).sqrt())


def look_ahead(x0_hat: Tensor, a: Tensor, a_next: Tensor, before: Before | None) -> tuple[Tensor, Before]:
    """x0_hat extrapolated to the middle of the step, in log-SNR, from the step before; and what the next step needs of this one.

    The denoiser clips x0_hat; what is extrapolated from it is not clipped again and may lie outside [-1, 1].

    Args:
        x0_hat: what the denoiser says at the start of the step.
        a, a_next: alpha_bar where the step starts and ends, 0-d float64.
        before: what this function said of the step before; None in the first step.
    """
    h = (logsnr(a_next) - logsnr(a)) / 2
    ahead = x0_hat
    if before is not None and a_next < 1:
        x0_before, h_before = before
        ahead = x0_hat + float(h / (2 * h_before)) * (x0_hat - x0_before)
    return ahead, (x0_hat, h)
