import math

import numpy as np
import pytest
import scipy.stats
import torch

from stages.diffusion import schedules
from stages.diffusion.likelihood import HALF_BIN, decoder_nll, prior_kl, step_chances, step_kl
from stages.diffusion.process import loss_weights, q_posterior, q_sample

S = 0.6  # standard deviation of a Gaussian x0 of mean 0
N = 20_000


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kl(mean, variance, other_mean, other_variance):
    """Of two Gaussians, from the textbook."""
    return 0.5 * (math.log(other_variance / variance) + (variance + (mean - other_mean) ** 2) / other_variance - 1)


def test_prior_is_the_divergence_of_two_gaussians():
    a = torch.tensor(0.2, dtype=torch.float64)
    x0 = torch.tensor([-1.0, 0.5]).reshape(2, 1, 1, 1)
    expected = [kl(math.sqrt(0.2) * value, 0.8, 0, 1) for value in (-1.0, 0.5)]
    assert prior_kl(x0, a).tolist() == pytest.approx(expected, rel=1e-12)
    assert prior_kl(x0, a * 0).tolist() == [0, 0]


@pytest.mark.parametrize("schedule", schedules.names())
@pytest.mark.parametrize("t", [1, 17, 99])
def test_a_step_is_the_divergence_of_two_posteriors(schedule, t):
    table = torch.from_numpy(schedules.find(schedule)(100))
    x0, x0_hat, x_t = normal(1, 1, 1, 1), normal(1, 1, 1, 1, seed=1), normal(1, 1, 1, 1, seed=2)
    a, before = table[t : t + 1], table[t - 1 : t]
    (mean, variance), (other, _) = q_posterior(x0, x_t, a, before), q_posterior(x0_hat, x_t, a, before)
    expected = kl(mean.item(), variance.item(), other.item(), variance.item())
    assert step_kl((x0 - x0_hat).square().flatten(), a, before).item() == pytest.approx(expected, rel=1e-9)
    # Known-bad: the levels the wrong way round.
    assert step_kl((x0 - x0_hat).square().flatten(), before, a).item() != pytest.approx(expected, rel=0.5)


def test_bound_of_a_gaussian_with_its_exact_denoiser_is_its_closed_form():
    """For x0 ~ N(0, S^2) the error of the exact x0_hat is S^2 (1 - a) / (a S^2 + 1 - a) at every level, so the sum is known.

    N draws of it know each term to sqrt(2 / N) = 1 %, and their sum far better.
    """
    table = torch.from_numpy(schedules.find("cosine")(100))
    x0, eps = S * normal(N, 1, 1, 1), normal(N, 1, 1, 1, seed=1)
    got = expected = 0.0
    for t in range(1, 100):
        a, before = table[t].expand(N), table[t - 1].expand(N)
        x_t = q_sample(x0, a, eps)
        x0_hat = a[:, None, None, None].sqrt() * S**2 / (a * S**2 + 1 - a)[:, None, None, None] * x_t
        got += step_kl((x0 - x0_hat).square().flatten(), a, before).mean().item()
        error = S**2 * (1 - table[t]) / (table[t] * S**2 + 1 - table[t])
        expected += 0.5 * (table[t - 1] / (1 - table[t - 1]) - table[t] / (1 - table[t])).item() * error.item()
    assert got == pytest.approx(expected, rel=0.01)
    prior = 0.5 * (table[-1] * S**2 - table[-1] - torch.log(1 - table[-1])).item()
    assert prior_kl(x0, table[-1]).mean().item() == pytest.approx(prior, rel=0.05, abs=1e-9)


def test_bound_of_a_gaussian_falls_to_its_information_as_steps_grow_shorter():
    """The exact denoiser's bound is what x at t = 0 tells of x0, log(1 + SNR S^2) / 2, plus what the discretisation wastes."""
    wasted = []
    for T in (100, 1000, 10_000):
        a = torch.linspace(8, -12, T, dtype=torch.float64).sigmoid()
        error = S**2 * (1 - a) / (a * S**2 + 1 - a)
        steps = step_kl(error[1:], a[1:], a[:-1]).sum()
        prior = 0.5 * (a[-1] * S**2 - a[-1] - torch.log1p(-a[-1]))
        wasted.append((steps + prior - 0.5 * torch.log1p(a[0] / (1 - a[0]) * S**2)).item())
    assert wasted[0] > wasted[1] > wasted[2] > 0
    assert wasted[2] < 0.01


@pytest.mark.parametrize("schedule", schedules.names())
def test_steps_are_drawn_as_often_as_they_count_for_a_standard_normal(schedule):
    """Short steps, or a step's KL is not proportional to the logarithm's derivative: within 10 % at T = 1000, but for the ends."""
    table = torch.from_numpy(schedules.find(schedule)(1000))
    chance = step_chances(table)
    assert chance.sum().item() == pytest.approx(1)
    assert chance[0] == 0
    assert (chance[1:] > 0).all()
    counts = step_kl(1 - table[1:], table[1:], table[:-1])
    ratio = (chance[1:] / counts)[20:-20]
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=0.1, atol=0)


def test_mean_of_the_variational_loss_is_the_bound_but_for_constants():
    table = torch.from_numpy(schedules.find("linear")(50))
    errors = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = step_kl(errors[1:], table[1:], table[:-1]).sum()
    gaussian_decoder = 0.5 * errors[0] / (1 - table[0])
    mean = (loss_weights("variational", "x0", table) * errors).mean()
    torch.testing.assert_close(mean, steps + gaussian_decoder, rtol=1e-9, atol=0)


def test_probabilities_of_the_256_values_add_up_to_1():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(256, 1, 1, 1)
    for x0_hat in (-1.4, -1.0, 0.003, 0.99, 1.2):
        for alpha_bar in (0.9999, 0.99, 0.9):
            nll = decoder_nll(values, torch.full_like(values, x0_hat), torch.full((256,), alpha_bar).double())
            assert nll.isfinite().all()
            assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-9)


def test_decoder_is_the_mass_of_a_gaussian_in_a_bin():
    x0 = torch.tensor([-1.0, -1 + 2 / 255, 1 / 255, 1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    x0_hat, sigma = np.array([-0.98, -0.97, 0.01, 0.97]), 0.02
    high = np.append(x0.flatten()[:-1].numpy() + HALF_BIN, np.inf)
    low = np.append(-np.inf, x0.flatten()[1:].numpy() - HALF_BIN)
    expected = -np.log(scipy.stats.norm.cdf(high, x0_hat, sigma) - scipy.stats.norm.cdf(low, x0_hat, sigma))
    levels = torch.full((4,), 1 - sigma**2, dtype=torch.float64)
    got = decoder_nll(x0, torch.from_numpy(x0_hat).reshape(4, 1, 1, 1), levels)
    assert got.tolist() == pytest.approx(expected.tolist(), rel=1e-7)


def test_a_value_far_in_either_tail_has_a_finite_price():
    """Where both ends of the bin have a probability of 1 to rounding: the price is that of the distance, some (d / sigma)^2 / 2."""
    for x0, x0_hat in ((-0.5, 0.5), (0.5, -0.5)):
        nll = decoder_nll(torch.full((1, 1, 1, 1), x0), torch.full((1, 1, 1, 1), x0_hat), torch.tensor([0.9996]).double())
        assert nll.item() == pytest.approx(0.5 * (1 / 0.02) ** 2, rel=0.05)
