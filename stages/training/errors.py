"""What a training makes small: the error of a network's prediction."""

from collections.abc import Callable

import torch
from torch import Tensor

from stages.datasets.images import to_float
from stages.diffusion import process
from stages.networks.unet import UNet
from stages.training.draws import stratified_timesteps
from stages.training.recipe import Recipe

Errors = Callable[[UNet, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(net, x0, y, t, eps) -> (B,) float32 mean squared errors of what the network predicts, by fixed weights where there are such."""


def errors(recipe: Recipe, alpha_bar: Tensor) -> Errors:
    """The errors by a recipe's weighting; by equal weights where the weighting is learnt during the training.

    Args:
        recipe: what is predicted, how it is weighted, and in which precision the network computes.
        alpha_bar: (T,) float64 of the whole schedule.
    """
    fixed: process.Weighting = "simple" if recipe.weighting == "balanced" else recipe.weighting
    weights = process.loss_weights(fixed, recipe.prediction, alpha_bar)

    def errors_of(net: UNet, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a = alpha_bar[t]
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = net(process.q_sample(x0, a, eps), process.logsnr(a), y)
        squared = (output.float() - process.target(recipe.prediction, x0, eps, a)).square().flatten(1).mean(1)
        return weights[t].float() * squared

    return errors_of


@torch.no_grad()
def validate(errors_of: Errors, net: UNet, images: Tensor, labels: Tensor, T: int) -> float:
    """Mean error on held-out images, always with the same noise and timesteps.

    Args:
        images: (N, 1, H, W) uint8.
        labels: (N,) int64.
    """
    rng = torch.Generator(images.device).manual_seed(0)
    t = stratified_timesteps(len(images), T, rng)
    eps = torch.randn(images.shape, device=images.device, generator=rng)
    chunks = zip(to_float(images).split(256), labels.split(256), t.split(256), eps.split(256), strict=True)
    return sum(float(errors_of(net, *chunk).sum()) for chunk in chunks) / len(images)
