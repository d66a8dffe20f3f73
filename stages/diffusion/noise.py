"""Standard normal noise that belongs to the sample: one function of (seed, index, step), on any device."""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed integer


def gaussian(seed: int, index: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """(N, *shape) float32 standard normal noise, one image for each entry of `index`.

    Image i depends only on seed, index[i] and step: not on the other indices, how many there are, or who else draws. Each pair
    of pixels hashes its own counter, so all of them are drawn at once. The hashed integers are the same on every device; the
    logarithm and the angle may differ in the last bit.

    Args:
        seed: any non-negative integer.
        index: (N,) int64 sample indices; its device is where the noise is made.
        step: which of the sample's draws this is.

    Source: the hash is SplitMix64 (Steele, Lea & Flood 2014); the pairs are Box & Muller 1958.
    """
    pixels = math.prod(shape)
    pairs = torch.arange((pixels + 1) // 2, device=index.device)
    key = _mix(_mix(_mix(torch.full_like(index, seed)) + index) + step)  # (N,)
    bits = _mix(key[:, None] + (pairs + 1) * _GOLDEN)  # (N, pairs)
    radius = (-2 * torch.log(((bits & 0xFFFFFFFF) + 1).double() * 2.0**-32)).sqrt().float()  # of a uniform in (0, 1]
    angle = (_shift(bits, 32).double() * (2 * math.pi * 2.0**-32)).float()
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten(1)
    return normal[:, :pixels].reshape(len(index), *shape)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors, whose products wrap."""
    z = z + _GOLDEN
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Unsigned right shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
