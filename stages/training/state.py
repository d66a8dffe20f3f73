"""What a training consists of between two steps."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from stages.networks.balance import Balance
from stages.networks.muon import Muon
from stages.networks.unet import UNet
from stages.training.errors import Errors, errors
from stages.training.recipe import Recipe
from stages.training.timetable import Timetable


@dataclass
class State:
    """All that a step reads and changes. Its tensors are changed in place, so their addresses stay.

    A number that changes from step to step is a tensor too: a kernel that is recorded once and played again reads it anew.

    Attributes:
        alpha_bar: (T,) float64, the noise levels to train at.
        net, average: the network, and the moving average of its weights.
        optimizers: their learning rates are 0-d tensors in `param_groups`, beside the `initial_lr` that each began with.
        errors_of: the errors of a batch.
        ema_weight: 0-d float32, how far the average moves towards the network in this step.
        losses: (longest interval,) float32. The first `count` are the losses of the steps since the last report.
        count: (1,) int64.
        step: how many steps are taken.
    """

    seed: int
    recipe: Recipe
    timetable: Timetable
    alpha_bar: Tensor
    net: UNet
    average: UNet
    balance: Balance
    optimizers: list[torch.optim.Optimizer]
    errors_of: Errors
    ema_weight: Tensor
    losses: Tensor
    count: Tensor
    step: int = 0

    @classmethod
    def begin(cls, net: UNet, recipe: Recipe, timetable: Timetable, alpha_bar: Tensor, seed: int) -> "State":
        """The state before the first step, on the device of `alpha_bar`. `net` is moved there."""
        device = alpha_bar.device
        net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(
            seed=seed,
            recipe=recipe,
            timetable=timetable,
            alpha_bar=alpha_bar,
            net=net,
            average=copy.deepcopy(net).eval().requires_grad_(False),
            balance=Balance(len(alpha_bar)).to(device),
            optimizers=_optimizers(net, recipe, device),
            errors_of=errors(recipe, alpha_bar),
            ema_weight=torch.ones((), device=device),
            losses=torch.zeros(timetable.longest_interval, device=device),
            count=torch.zeros(1, dtype=torch.long, device=device),
        )

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What has weights or buffers to be kept, by the names that a checkpoint gives them."""
        return {"net": self.net, "ema": self.average, "balance": self.balance}

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The weights of the network."""
        return list(self.net.parameters())

    @cached_property
    def averages(self) -> list[nn.Parameter]:
        """The averages of `weights`, in the same order."""
        return list(self.average.parameters())

    def forget_momenta(self) -> None:
        """Set the optimisers back to where they were before their first step."""
        for optimizer in self.optimizers:
            for tensors in optimizer.state.values():
                for tensor in tensors.values():
                    tensor.zero_()

    def read_losses(self) -> Tensor:
        """(n,) float32 on the CPU: the losses of the steps since the last report. Waits for the device."""
        return self.losses[: int(self.count)].cpu()

    def set_losses(self, losses: Tensor) -> None:
        """Put the losses of the steps since the last report in place of those that are there.

        Args:
            losses: (n,) float32; empty after a report.
        """
        self.losses[: len(losses)] = losses
        self.count.fill_(len(losses))


def _optimizers(net: UNet, recipe: Recipe, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between stem and head, AdamW at twice its rate for all else: ends, embeddings, biases, norms.

    Or Adam for all.
    """

    def rate(lr: float) -> Tensor:
        # torch's fused Adam computes with a float64 rate on a CPU, and reads a float32 one on CUDA.
        return torch.tensor(lr, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)

    inner = [weight for part in (net.down, net.middle, net.up) for weight in part.parameters() if weight.ndim == 4]
    taken = {id(weight) for weight in inner}
    rest = [weight for weight in net.parameters() if id(weight) not in taken]
    lr = recipe.lr
    optimizers: dict[torch.optim.Optimizer, float]
    if recipe.optimizer == "adam":
        optimizers = {torch.optim.Adam(net.parameters(), lr=rate(lr), fused=True): lr}
    else:
        adamw = torch.optim.AdamW(rest, lr=rate(lr), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        optimizers = {Muon(inner, lr=rate(lr / 2)): lr / 2, adamw: lr}
    for optimizer, initial in optimizers.items():
        optimizer.param_groups[0]["initial_lr"] = initial
    return list(optimizers)
