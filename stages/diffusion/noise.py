"""Standard normal noise that belongs to the sample: one function of (seed, index, draw), on any device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed integer
_IN_CACHE = 50_000  # pairs at a time, on a CPU, for its cache to hold them: twice as fast as many at once


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
    """Write the normals of keys, (n, 1) int64, into (n, 2, pairs); in place wherever it goes, which is faster."""
    pairs = normal.shape[-1]
    bits = _mix(key + torch.arange(1, pairs + 1, device=key.device) * _GOLDEN)
    words = bits.view(torch.int32)  # (n, 2 pairs)
    words[:, :pairs].bitwise_or_(1)  # an odd number is not 0: its logarithm is finite
    uniform, angle = words.float().split(pairs, dim=1)
    radius = uniform.abs_().mul_(2.0**-31).log_().mul_(-2).sqrt_()  # of a uniform in (0, 1]
    angle.mul_(math.pi * 2.0**-31)  # in [-pi, pi]
    torch.cos(angle, out=normal[:, 0]).mul_(radius)
    torch.sin(angle, out=normal[:, 1]).mul_(radius)


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64 tensors, whose products wrap."""
    z = z + _GOLDEN
    spare = torch.empty_like(z)
    _xor_shift(z, 30, spare).mul_(0xBF58476D1CE4E5B9 - (1 << 64))
    _xor_shift(z, 27, spare).mul_(0x94D049BB133111EB - (1 << 64))
    return _xor_shift(z, 31, spare)


def _xor_shift(z: Tensor, bits: int, spare: Tensor) -> Tensor:
    """z ^ (z >> bits) without a sign, in place; torch's own shift keeps the sign."""
    torch.bitwise_right_shift(z, bits, out=spare)
    return z.bitwise_xor_(spare.bitwise_and_((1 << (64 - bits)) - 1))
