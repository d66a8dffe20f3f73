"""One Brownian path for each image: what drives every stochastic sampler, at every T and under every schedule.

With w = snr x / sqrt(alpha_bar) the ancestral step with the variance of the posterior is w' = w + x0_hat (snr' - snr) + B(snr') -
B(snr), B a Brownian motion. So B, a function of (seed, index) alone, is all the noise of an image, x_T included, and the chains of
one image at T = 20 and T = 1000 are two discretisations of one and the same path: they compare image by image.

B can be read at any SNR s. It is expanded in the Haar basis over a binary tree of cells, whose bounds are even in log-SNR: at
level l cell k, number n = 2^l + k, is [exp(-128 + 256 k / 2^l), exp(-128 + 256 (k + 1) / 2^l)], and the lowest bound of all is
s = 0. B(s) is the sum of H_n(s) xi_n over the cells above s, xi_n the standard normal noise number n; the last level, the
leaves, has an arch for H, which makes B exact in law at any set of s with at most one in a leaf.

Source: the expansion is Lévy's construction (Lévy 1948), in SNR the coordinates of stochastic localization (Montanari 2023).
Noise alike at any number of steps is the purpose of k-diffusion's BrownianTreeNoiseSampler too; equal noise on two sides of a
comparison is known as common random numbers, and between step sizes from multilevel Monte Carlo (Giles 2008).
"""

import math

import torch
from torch import Tensor

from stages.diffusion.noise import gaussian
from stages.errors import UserError

LOGSNR = 128.0  # the expansion is over log-SNRs of -128..128
LEVELS, MOST_LEVELS = 18, 40  # 18 hold a cosine chain of 3,200 steps; a chain that needs more has more


class Brownian:
    """The noise of a chain's images, as samplers ask for it: see `samplers.Noise`.

    Args:
        seed: any non-negative integer.
        index: (N,) int64 sample indices; image i depends on index[i], not on the other indices.
        shape: of an image.
        path: of alpha_bar, see samplers/__init__.py; it decides how many levels the tree has, and nothing else.

    Raises:
        UserError: two levels of the path are too close to each other, or too noisy, to be told apart.
    """

    def __init__(self, seed: int, index: Tensor, shape: tuple[int, ...], path: Tensor) -> None:
        self._seed, self._index, self._shape, self._levels = seed, index, shape, levels_for(path)
        self._xi = torch.empty(self._levels + 1, len(index), *shape, device=index.device)
        self._cells: list[int] = []  # whose xi these are
        self._stood, self._b = -1.0, self._xi[0]  # the SNR that was read last, and what was found there

    def __call__(self, alpha_bar: Tensor | float, alpha_bar_next: Tensor | float) -> Tensor:
        """(N, *shape) float32 standard normal: the increment of B between two noise levels, in units of its standard deviation.

        Args:
            alpha_bar: in [0, 1). From 0, no signal, the increment is the x_T of a chain that starts at the other level.
            alpha_bar_next: in [0, 1), larger; from 0 to 0 it is xi_0, which B shows nothing of below an SNR of e^64.

        Raises:
            ValueError: both levels lie in one leaf, where B is not exact.
        """
        s, s_next = snr(float(alpha_bar)), snr(float(alpha_bar_next))
        if s == 0:
            return self._at(s_next)
        if leaf(s, self._levels) == leaf(s_next, self._levels):
            raise ValueError(f"SNRs {s} and {s_next} share a leaf of the {self._levels} levels of a Brownian path")
        before, after = self._at(s), self._at(s_next)
        return after * math.sqrt(s_next / (s_next - s)) - before * math.sqrt(s / (s_next - s))

    def _at(self, s: float) -> Tensor:
        """B(s) / sqrt(s), standard normal; at 0 xi_0."""
        if s != self._stood:
            cells, heights = expansion(s, self._levels)
            kept = sum(cell == known for cell, known in zip(cells, self._cells, strict=False))  # the uppermost: cells are nested
            if cells[kept:]:
                self._xi[kept : len(cells)] = gaussian(self._seed, self._index, cells[kept:], self._shape)
            b = self._xi[0] * heights[0]
            for xi, height in zip(self._xi[1:], heights[1:], strict=False):
                b.add_(xi, alpha=height)
            self._cells, self._stood, self._b = cells, s, b
        return self._b


def snr(alpha_bar: float) -> float:
    """alpha_bar / (1 - alpha_bar), for alpha_bar in [0, 1)."""
    return alpha_bar / (1 - alpha_bar)


def leaf(s: float, levels: int) -> int:
    """Which of the 2^(levels - 1) leaves an SNR lies in; what lies below the tree, in the lowest."""
    place = (math.log(s) + LOGSNR) / (2 * LOGSNR) if s else 0.0
    return max(0, math.floor(place * 2 ** (levels - 1)))


def levels_for(path: Tensor) -> int:
    """The levels that a chain's tree has: LEVELS, or as many more as leave no two of its noise levels in one leaf."""
    levels = [snr(a) for a in path.tolist() if a < 1]
    for count in range(LEVELS, MOST_LEVELS + 1):
        if len({leaf(s, count) for s in levels}) == len(levels):
            return count
    raise UserError(
        f"a chain of {len(levels)} steps has two noise levels that one Brownian path cannot tell apart: they are closer than "
        f"{2 * LOGSNR / 2 ** (MOST_LEVELS - 1):.1g} in log-SNR, or both below {-LOGSNR:g}; use a smaller T, or another schedule"
    )


def expansion(s: float, levels: int) -> tuple[list[int], list[float]]:
    """B(s) / sqrt(s) as a sum of standard normals: their numbers, 0 and those of the cells above s, and their factors.

    The squares of the factors add up to 1. At 0 it is number 0 alone, by convention: there is no limit.
    """
    if s == 0:
        return [0], [1.0]
    at = leaf(s, levels)
    cells, heights = [0], [s * math.exp(-LOGSNR / 2)]
    for level in range(levels):
        k = at >> (levels - 1 - level)
        left, middle, right = (_bound(2 * k + half, level + 1) for half in range(3))
        cells.append(2**level + k)
        heights.append(_arch(s, left, right) if level == levels - 1 else _tent(s, left, middle, right))
    return cells, [height / math.sqrt(s) for height in heights]


def _bound(k: int, level: int) -> float:
    """The lower bound of cell k of a level."""
    return math.exp(LOGSNR * (k / 2 ** (level - 1) - 1)) if k else 0.0


def _tent(s: float, left: float, middle: float, right: float) -> float:
    """The integral, up to s, of the Haar function of a cell whose halves meet at `middle`."""
    if s < middle:
        return (s - left) * math.sqrt((right - middle) / ((middle - left) * (right - left)))
    return (right - s) * math.sqrt((middle - left) / ((right - middle) * (right - left)))


def _arch(s: float, left: float, right: float) -> float:
    """The standard deviation, at s, of a Brownian bridge over a leaf."""
    return math.sqrt(max(0.0, (s - left) * (right - s) / (right - left)))  # s may lie outside by a rounding
