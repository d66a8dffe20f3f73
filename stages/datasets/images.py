"""uint8 <-> [-1, 1]: the only place where pixels change their meaning."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8 images of any shape: 0 -> -1, 255 -> 1."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """uint8 of float images, rounded to nearest, clipped to [-1, 1]; inverts to_float exactly."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
