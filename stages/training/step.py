"""One step of training. Nothing in it waits for the device."""

import torch
from torch import Tensor

from stages.datasets.images import to_float
from stages.networks import ema
from stages.training.draws import NOISE, generator, stratified_timesteps
from stages.training.recipe import learning_rate
from stages.training.state import State


def train_step(state: State, batch: tuple[Tensor, Tensor], step: int) -> None:
    """Take a step: `state` changes in place. Its randomness is a function of (state.seed, step).

    Args:
        state: where the step before this one left it.
        batch: (B, 1, H, W) uint8 images and (B,) int64 labels, on the device of the state.
        step: the first is 1.
    """
    if step == state.timetable.phase_of(step).begin + 1:
        state.forget_momenta()
    _set_rates(state, step)
    _descend(state, *_noised(state, *batch, step))
    state.step = step


def rate_of_step(state: State, step: int) -> float:
    """The learning rate of a step."""
    begin, end = state.timetable.phase_of(step)
    return learning_rate(step - begin, end - begin, state.recipe)


def _set_rates(state: State, step: int) -> None:
    """Write the numbers that depend on the step into the tensors of the state."""
    lr = rate_of_step(state, step)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"].fill_(lr * group["initial_lr"] / state.recipe.lr)
    state.ema_weight.fill_(ema.weight(step - state.timetable.phase_of(step).begin, state.recipe.ema_halflife))


def _noised(state: State, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, y, t, eps) of a step: images as float32, labels of which some are withheld, timesteps, noise."""
    rng = generator(state.seed, NOISE, step, images.device)
    withheld = torch.rand(labels.shape, device=images.device, generator=rng) < state.recipe.label_dropout
    y = torch.where(withheld, state.net.num_classes, labels)
    t = stratified_timesteps(len(y), len(state.alpha_bar), rng)
    eps = torch.randn(images.shape, device=images.device, generator=rng)
    return to_float(images), y, t, eps


def _descend(state: State, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> None:
    """Move the weights against the gradient of the mean error, their average after them, and note the loss."""
    errors = state.errors_of(state.net, x0, y, t, eps)
    (state.balance(errors, t) if state.recipe.weighting == "balanced" else errors).mean().backward()
    torch.nn.utils.clip_grad_norm_(state.weights, state.recipe.grad_clip)
    for optimizer in state.optimizers:
        optimizer.step()
    state.net.zero_grad()
    ema.update(state.averages, state.weights, state.ema_weight)
    state.losses.index_copy_(0, state.count, errors.detach().mean()[None])
    state.count += 1
