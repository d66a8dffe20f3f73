import pytest
import torch

from stages.networks.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8), (1, 5, 5)])
def test_singular_values_become_about_one_and_the_singular_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrices)
    u, s, vh = torch.linalg.svd(result, full_matrices=False)
    assert 0.5 < s.min()
    assert s.max() < 1.3
    # U^T X V is diagonal for the singular vectors of the original matrix.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ result @ vh.mT
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_moves_a_matrix_as_torch_does(shape):
    """torch.optim.Muon computes in bf16, whose relative precision is 2^-8; ten steps of lr 0.1 accumulate it."""
    rng = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(shape, generator=rng), torch.randn(10, *shape, generator=rng)
    moved = []
    for optimizer_of in (
        lambda weight: Muon([weight], lr=torch.tensor(0.1)),
        lambda weight: torch.optim.Muon([weight], lr=0.1, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ):
        weight = torch.nn.Parameter(start.clone())
        optimizer = optimizer_of(weight)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        moved.append(weight.detach() - start)
    ours, theirs = moved
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (ours * 1.05 - theirs).norm() > 0.02 * theirs.norm()  # a wrong scale would be seen


def test_a_convolution_moves_as_its_matrix_whatever_its_company_and_layout():
    rng = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 4, 6, 3, 3, generator=rng), torch.randn(2, 4, 6, 3, 3, generator=rng)
    matrix = torch.nn.Parameter(start[0].flatten(1).clone())
    matrix.grad = gradient[0].flatten(1)
    Muon([matrix], lr=torch.tensor(0.1)).step()
    weights = [torch.nn.Parameter(w.clone(memory_format=torch.channels_last)) for w in start]
    for weight, g in zip(weights, gradient, strict=True):
        weight.grad = g.clone(memory_format=torch.channels_last)
    Muon(weights, lr=torch.tensor(0.1)).step()
    torch.testing.assert_close(weights[0].detach().flatten(1), matrix.detach(), rtol=0, atol=1e-5)
