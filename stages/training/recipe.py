"""How a network is trained, in plain values."""

from dataclasses import dataclass
from typing import Literal

from stages.diffusion.process import Prediction, Weighting


@dataclass(frozen=True)
class Recipe:
    """The settings that a step needs, under the names they have in params.yaml; lengths are counted in images."""

    prediction: Prediction
    weighting: Weighting | Literal["balanced"]
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["muon", "adam"]
    batch: int
    lr: float
    halve_lr_every: int | None
    warmup_images: int
    grad_clip: float
    label_dropout: float
    ema_halflife: float


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate of a step, 1..steps: linear warm-up times the square root of what is left of the phase, or halvings."""
    warmup = min(1.0, step * recipe.batch / max(recipe.warmup_images, 1))
    if recipe.halve_lr_every:
        return recipe.lr * warmup * 0.5 ** ((step - 1) * recipe.batch // recipe.halve_lr_every)
    return recipe.lr * warmup * (1 - (step - 1) / steps) ** 0.5
