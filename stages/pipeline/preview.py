"""A glance at a network in training: a small grid of samples. It cannot change a weight, so train does not depend on it."""

import torch
from torch import Tensor

from stages.datasets.images import to_uint8
from stages.diffusion.guidance import denoiser
from stages.diffusion.noise import gaussian
from stages.diffusion.process import Prediction
from stages.diffusion.samplers import ddim
from stages.diffusion.spacings import spaced
from stages.networks.unet import UNet
from stages.pipeline.grids import Pixels, grid

SIDE = 5  # images in a row, and rows


@torch.no_grad()
def preview(net: UNet, size: int, prediction: Prediction, alpha_bar: Tensor) -> Pixels:
    """Grid of samples, always from the same noise: DDIM in at most 12 steps, the labels spread over the classes."""
    index = torch.arange(SIDE * SIDE, device=alpha_bar.device)
    y = index * net.num_classes // len(index)
    denoise = denoiser(net, prediction, y, unlabelled=net.num_classes)
    (x_T,) = gaussian(0, index, [0], (1, size, size))
    *_, (x, _) = ddim.sample(denoise, spaced(alpha_bar, min(12, len(alpha_bar)), "trailing"), lambda *_: x_T)  # eta is 0
    return grid(to_uint8(x).cpu().numpy(), SIDE, scale=2)
