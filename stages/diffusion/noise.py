"""Standard normal noise that belongs to the sample: one function of (seed, index, draw), on any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed integer
_IN_CACHE = 2**15  # pairs at a time, on a CPU, for its cache to hold them: twice as fast as many at once


def gaussian(seed: int, index: Tensor, draws: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(K, N, *shape) float32 standard normal noise, for each of K draws one image for each of N entries of `index`.

    Image i of a draw depends only on seed, index[i] and the draw: not on the other indices and draws, how many there are, or who
    else draws. Each pair of pixels hashes its own counter, so all of them are drawn at once. The hashed integers are the same on
    every device; logarithm, root, sine and cosine, in float32, may differ in the last bit.

    Args:
        seed: any non-negative integer.
        index: (N,) int64 sample indices; its device is where the noise is made.
        draws: which of the sample's draws these are, non-negative integers.

    Source: the hash is SplitMix64 (Steele, Lea & Flood 2014); the pairs are Box & Muller 1958.
    """
    pixels = math.prod(shape)
    pairs = (pixels + 1) // 2
    which = torch.tensor(draws, device=index.device)
    key = _mix(_mix(_mix(torch.full_like(index, seed)) + index) + which[:, None]).reshape(-1, 1)  # (K N, 1)
    normal = torch.empty(len(key), 2, pairs, device=index.device)
    rows = len(key) if index.is_cuda else max(1, _IN_CACHE // pairs)
    for some_keys, some in zip(key.split(rows), normal.split(rows), strict=True):
        _fill(some, some_keys)
    return normal.flatten(1)[:, :pixels].reshape(len(which), len(index), *shape)


def _fill(normal: Tensor, key: Tensor) -> None:
    """Write the normals of keys, (n, 1) int64, into (n, 2, pairs)."""
    pairs = normal.shape[-1]
    words = _mix(key + torch.arange(1, pairs + 1, device=key.device) * _GOLDEN).view(torch.int32)  # (n, 2 pairs)
    uniform = (words[:, :pairs] | 1).float().abs_().mul_(2.0**-31)  # of an odd number, so in (0, 1]: its logarithm is finite
    radius = uniform.log_().mul_(-2).sqrt_()
    angle = words[:, pairs:].float().mul_(math.pi * 2.0**-31)  # in [-pi, pi]
    torch.mul(radius, angle.cos(), out=normal[:, 0])
    torch.mul(radius, angle.sin(), out=normal[:, 1])


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors, whose products wrap."""
    z = z + _GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(factor - (1 << 64))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Unsigned right shift: torch's own keeps the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
