"""Noise schedules: how much signal is left after each of T steps. A file each, found by its name; here is what they share.

The file NAME.py defines `alpha_bar(T)`, (T,) float64, falling, in (0, 1). No torch, so that params can check a sweep quickly.
A schedule whose noise levels are others at every T, also defines TRAINED_AT, the T whose levels its networks learn.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from stages.diffusion import by_name

Alphas = NDArray[np.float64]

CONTINUOUS = 2**16
"""T of levels so close that those of every T lie among them: as good as continuous, and exact on every machine."""


def names() -> list[str]:
    """The names of all schedules, sorted."""
    return by_name.names("schedules")


def find(name: str) -> Callable[[int], Alphas]:
    """The function `alpha_bar` of a schedule. Raises ValueError, with the names that there are, for an unknown one."""
    function: Callable[[int], Alphas] = by_name.find("schedules", name, "alpha_bar")
    return function


def noise_levels(name: str, T: int, *, size: int, reference_size: int | None, zero_terminal_snr: bool = False) -> Alphas:
    """alpha_bar, (T,) float64, of a schedule for images of `size` pixels a side, in [0, 1)."""
    return _of_size(find(name)(T), size, reference_size, zero_terminal_snr)


def shared_levels(*, size: int, reference_size: int | None, zero_terminal_snr: bool = False) -> Alphas:
    """The continuous levels of a squared cosine, which a network learns that all schedules share, whatever schedules there are."""
    return _of_size(of_signal(squared_cosine(CONTINUOUS)), size, reference_size, zero_terminal_snr)


def trained_at(name: str, timesteps: int | None) -> int:
    """T of the noise levels that a network of a schedule learns: `timesteps` where it is given, else as good as continuous.

    A network that learnt continuous levels serves every T: those of T = 200 and of T = 1000 differ in how often they visit a
    log-SNR by a total variation of 0.02.
    """
    return timesteps or by_name.constant("schedules", name, "TRAINED_AT") or CONTINUOUS


def _of_size(alpha_bar: Alphas, size: int, reference_size: int | None, zero_terminal_snr: bool) -> Alphas:
    if zero_terminal_snr:
        alpha_bar = without_signal_at_the_end(alpha_bar)
    return expit(logit(alpha_bar) + logsnr_shift(size, reference_size))


def expit(x: Alphas) -> Alphas:
    """1 / (1 + exp(-x)), float64, value by value as the C library has it, so on every processor the same; scipy's to the bit."""
    return np.array([1 / (1 + math.exp(-v)) if v > -700 else math.exp(v) for v in x.tolist()])


def logit(p: Alphas) -> Alphas:
    """log(p / (1 - p)), float64, for p in [0, 1), -inf at 0: the inverse of `expit`, likewise."""

    def one(v: float) -> float:
        if 0.3 <= v <= 0.65:  # where the quotient is near 1
            return math.log1p(2 * (v - 0.5)) - math.log1p(-2 * (v - 0.5))
        return math.log(v / (1 - v)) if v else -math.inf

    return np.array([one(v) for v in p.tolist()])


def without_signal_at_the_end(alpha_bar: Alphas) -> Alphas:
    """alpha_bar, (T,) float64, moved and stretched so that its last value is exactly 0 and its first one stays.

    Then training sees what sampling starts from. There x_t says nothing of x0, so a prediction of eps says nothing either.

    Raises:
        ValueError: T = 1, whose only value cannot do both.

    Source: Lin et al. 2023, algorithm 1.
    """
    if len(alpha_bar) < 2:
        raise ValueError("a zero terminal SNR needs T of at least 2")
    root = np.sqrt(alpha_bar)
    return np.asarray(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)


def logsnr_shift(size: int, reference_size: int | None) -> float:
    """What turns a log-SNR meant for images of `reference_size` pixels a side into one for `size`: log(reference_size / size).

    Without a reference size it is 0.

    In a larger image neighbouring pixels say the same and average the noise away, so the same SNR hides less; the shift makes
    up for it, and training spends its time where structure is decided. Photographs ask for 2 log, as many times the pixels as the
    image has; strokes widen less than the image, so that half of that was chosen for handwriting, by trial.

    Source: Hoogeboom et al. 2023 (simple diffusion), section 3.1, but for the factor.
    """
    return math.log(reference_size / size) if reference_size else 0.0


def squared_cosine(T: int) -> Alphas:
    """(T + 1,) float64, falling to 0: a squared cosine with offset s = 0.008, which alpha_bar follows up to a factor.

    Source: Nichol & Dhariwal 2021, eq. (17).
    """
    check(T)
    s = 0.008
    return np.asarray(np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2)


def of_signal(signal: Alphas) -> Alphas:
    """alpha_bar, (T,) float64, of the betas that lead from each of T + 1 falling values to the next, none above 0.999."""
    return of_betas(np.minimum(1 - signal[1:] / signal[:-1], 0.999))


def of_betas(beta: Alphas) -> Alphas:
    """alpha_bar, (T,) float64, of the betas of T steps."""
    return np.asarray(np.cumprod(1 - beta), dtype=np.float64)


def check(T: int) -> None:
    """Raise ValueError where there is no step."""
    if T < 1:
        raise ValueError(f"T = {T} must be at least 1")
