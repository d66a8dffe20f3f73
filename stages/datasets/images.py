"""Images as tensors: uint8 <-> [-1, 1], the only place where pixels change their meaning; an order that mixes classes."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images of any shape: 0 -> -1, 255 -> 1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """uint8 of float images, rounded to nearest, clipped to [-1, 1]; inverts to_float exactly."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def balanced_order(labels: Tensor, rng: torch.Generator) -> Tensor:
    """A random order of images, (n,) int64 indices, in which every stretch holds the classes at their frequencies.

    Samples are drawn so as well; sets with chance class counts would put the floor too high.

    Args:
        labels: (n,) int64.
    """
    order = torch.randperm(len(labels), generator=rng)
    order = order[labels[order].argsort(stable=True)]  # by class, at random within it
    counts = labels.bincount()
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    place = (rank + torch.rand(len(counts), generator=rng).repeat_interleave(counts)) / counts.repeat_interleave(counts)
    return order[place.argsort(stable=True)]
