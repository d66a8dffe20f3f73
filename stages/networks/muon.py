"""Muon: steepest descent in the spectral norm, for the matrices inside a network."""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.9
# Of the polynomial a x + b x^3 + c x^5 that drives every singular value towards 1; five rounds bring them to about 0.7 .. 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Moves each weight along its momentum with all singular values made about equal, as far as AdamW would move it at this lr.

    A convolution's weight (out, in, k, k) is taken as the matrix (out, in k k). torch.optim.Muon does the same for matrices
    alone, one after another and always in bf16, which crawls on processors without bf16 arithmetic; here matrices of one shape
    go together, in float32.

    Args:
        lr: 0-d, on the device of the weights, where every step reads it.

    Source: Jordan et al. 2024; the scale 0.2 sqrt(max(rows, columns)) of Liu et al. 2025 (Moonlight), eq. (4).
    """

    def __init__(self, weights: Iterable[Tensor], lr: Tensor) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight, in place."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = weight.grad.lerp(state["momentum"], MOMENTUM).flatten(1)
                alike.setdefault(update.shape, []).append((weight, update))
            for (rows, columns), pairs in alike.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                scale = (-group["lr"] * 0.2 * max(rows, columns) ** 0.5).to(updates.dtype)
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.addcmul_(update.reshape(weight.shape), scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(N, rows, columns) float32: nearly U V^T of each U S V^T, by Newton-Schulz iteration, without a decomposition."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x
