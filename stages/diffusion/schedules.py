"""Noise schedules: how much signal is left after each of T steps. no torch, so that params can check a sweep quickly."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

Alphas = NDArray[np.float64]


def linear(T: int) -> Alphas:
    """alpha_bar, (T,) float64, of betas rising linearly from 1e-4 to 0.02 at T = 1000, rescaled by 1000 / T.

    The rescaling keeps the amount of noise at the end about the same at every T, so that T changes only the discretisation.

    Raises:
        ValueError: T <= 20, where the last beta would reach 1.

    Source: Ho et al. 2020, section 4; the rescaling is that of Nichol & Dhariwal 2021's code.
    """
    _check(T)
    if T <= 20:
        raise ValueError(
            f"schedule 'linear' needs T > 20, not T = {T}: its last beta, 0.02 * 1000 / T, must stay below 1; use 'cosine'"
        )
    return _alpha_bar(np.linspace(1e-4, 0.02, T) * (1000 / T))


def linear_unscaled(T: int) -> Alphas:
    """alpha_bar, (T,) float64, of betas from 1e-4 to 0.02 whatever T: the negative control.

    Below T = 1000 the last image still holds much of x0, and sampling starts from noise that training never saw.

    Source: Ho et al. 2020, section 4, read literally.
    """
    _check(T)
    return _alpha_bar(np.linspace(1e-4, 0.02, T))


def cosine(T: int) -> Alphas:
    """alpha_bar, (T,) float64, following a squared cosine with offset s = 0.008, betas clipped at 0.999.

    Source: Nichol & Dhariwal 2021, eq. (17).
    """
    _check(T)
    s = 0.008
    return _following(np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2)


def sigmoid(T: int) -> Alphas:
    """alpha_bar, (T,) float64, following a sigmoid from -3 to 3 at temperature 1, betas clipped at 0.999.

    Source: Jabri et al. 2022, algorithm 1 ("sigmoid_schedule"). The schedule of this name in other code may be another one,
    whose betas follow a sigmoid.
    """
    _check(T)
    start, end = -3.0, 3.0
    falling = expit(end) - expit(start + np.arange(T + 1) / T * (end - start))
    return _following(falling)


SCHEDULES: dict[str, Callable[[int], Alphas]] = {
    "linear": linear,
    "linear_unscaled": linear_unscaled,
    "cosine": cosine,
    "sigmoid": sigmoid,
}


def noise_levels(name: str, T: int, *, size: int, reference_size: int | None, zero_terminal_snr: bool = False) -> Alphas:
    """alpha_bar, (T,) float64, of a schedule for images of `size` pixels a side, in [0, 1)."""
    alpha_bar = SCHEDULES[name](T)
    if zero_terminal_snr:
        alpha_bar = without_signal_at_the_end(alpha_bar)
    with np.errstate(divide="ignore"):  # the log-SNR of nothing is -inf, which the shift leaves there
        return np.asarray(expit(logit(alpha_bar) + logsnr_shift(size, reference_size)))


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


def _following(signal: Alphas) -> Alphas:
    """alpha_bar of the betas that lead from each of T + 1 falling values to the next, none above 0.999."""
    return _alpha_bar(np.minimum(1 - signal[1:] / signal[:-1], 0.999))


def _alpha_bar(beta: Alphas) -> Alphas:
    return np.asarray(np.cumprod(1 - beta), dtype=np.float64)


def _check(T: int) -> None:
    if T < 1:
        raise ValueError(f"T = {T} must be at least 1")
