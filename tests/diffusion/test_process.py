import math

import pytest
import torch

from stages.diffusion import schedules
from stages.diffusion.process import alpha_bar_of, logsnr, loss_weights, q_posterior, q_sample, target, x0_and_eps

PREDICTIONS = ("eps", "x0", "v")


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_and_x0_and_eps_are_inverse(prediction):
    x0, eps, a = normal(5, 1, 4, 4), normal(5, 1, 4, 4, seed=1), torch.tensor([0.999, 0.7, 0.5, 0.1, 1e-4]).double()
    x0_hat, eps_hat = x0_and_eps(prediction, target(prediction, x0, eps, a), q_sample(x0, a, eps), a)
    # float64 rounding, 2e-16, is magnified at most by 1 / sqrt(alpha_bar) = 100 or 1 / sqrt(1 - alpha_bar) = 32.
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(eps_hat, eps, rtol=0, atol=1e-12)


def test_v_at_the_ends_is_eps_and_minus_x0():
    x0, eps = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    torch.testing.assert_close(target("v", x0, eps, torch.ones(2).double()), eps)
    torch.testing.assert_close(target("v", x0, eps, torch.zeros(2).double()), -x0)


def test_q_sample_equals_the_chain_of_single_steps():
    """Adding noise t + 1 times by x <- sqrt(1 - beta) x + sqrt(beta) eps gives the mean and variance of q_sample.

    The often-copied step without its sqrt(1 - beta) does not: it is kept here to show that the test can fail.
    """
    alpha_bar = schedules.find("linear")(100)
    alphas = [alpha_bar[0], *(alpha_bar[1:] / alpha_bar[:-1])]
    mean, variance = 1.0, 0.0
    forgetful_mean, forgetful_variance = 1.0, 0.0
    for alpha in alphas[:60]:
        mean, variance = math.sqrt(alpha) * mean, alpha * variance + 1 - alpha
        forgetful_variance += 1 - alpha
    x_t = q_sample(torch.ones(1, 1, 1, 1).double(), torch.tensor([alpha_bar[59]]), torch.zeros(1, 1, 1, 1).double())
    assert x_t.item() == pytest.approx(mean, rel=1e-12)
    assert variance == pytest.approx(1 - alpha_bar[59], rel=1e-12)
    assert forgetful_mean != pytest.approx(mean, rel=0.1)
    assert forgetful_variance != pytest.approx(1 - alpha_bar[59], rel=0.1)


@pytest.mark.parametrize("name", schedules.names())
@pytest.mark.parametrize("step", [(1, 0), (99, 98), (99, 40), (50, 10)])
def test_posterior_is_the_product_of_two_gaussians(name, step):
    """q(x_prev | x_t, x0) is proportional to q(x_prev | x0) q(x_t | x_prev): precisions add, means are weighted by them."""
    t, prev = step
    a, a_prev = (torch.tensor([schedules.find(name)(100)[i]]) for i in (t, prev))
    x0, x_t = normal(1, 1, 3, 3), normal(1, 1, 3, 3, seed=1)
    alpha = a / a_prev
    prior = 1 / (1 - a_prev)
    likelihood = alpha / (1 - alpha)
    variance = 1 / (prior + likelihood)
    mean = variance * (prior * a_prev.sqrt() * x0 + likelihood * x_t / alpha.sqrt())
    got_mean, got_variance = q_posterior(x0, x_t, a, a_prev)
    torch.testing.assert_close(got_mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got_variance, variance, rtol=1e-9, atol=0)
    swapped = q_posterior(x_t, x0, a, a_prev)[0]  # a known-bad call: arguments the wrong way round
    assert not torch.allclose(swapped, mean)


def test_logsnr_there_and_back():
    levels = torch.linspace(-12, 12, 25, dtype=torch.float64)
    torch.testing.assert_close(logsnr(alpha_bar_of(levels)), levels, rtol=1e-9, atol=1e-9)
    assert logsnr(torch.tensor([0.5])).item() == 0


@pytest.mark.parametrize("weighting", ["min_snr", "variational"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weighted_errors_agree_across_predictions(weighting, prediction):
    """A wrong x0_hat is a wrong eps_hat and a wrong v_hat: weighted, the three errors are one number."""
    alpha_bar = torch.from_numpy(schedules.find("cosine")(50))
    x0, eps, wrong = normal(50, 1, 4, 4), normal(50, 1, 4, 4, seed=1), normal(50, 1, 4, 4, seed=2)
    a = alpha_bar.reshape(-1, 1, 1, 1)
    x_t = q_sample(x0, alpha_bar, eps)
    eps_of_wrong = (x_t - a.sqrt() * wrong) / (1 - a).sqrt()
    outputs = {"x0": wrong, "eps": eps_of_wrong, "v": a.sqrt() * eps_of_wrong - (1 - a).sqrt() * wrong}

    def weighted(prediction, weights):
        return weights * (outputs[prediction] - target(prediction, x0, eps, alpha_bar)).square().mean(dim=(1, 2, 3))

    expected = loss_weights(weighting, "x0", alpha_bar) * (wrong - x0).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted(prediction, loss_weights(weighting, prediction, alpha_bar)), expected, rtol=1e-7, atol=0)
    # Known-bad: the weights of another prediction.
    other = {"eps": "v", "v": "x0", "x0": "eps"}[prediction]
    assert not torch.allclose(weighted(prediction, loss_weights(weighting, other, alpha_bar)), expected, rtol=0.01)


def test_min_snr_weights_are_the_published_ones():
    snr = torch.tensor([50.0, 5.0, 0.2], dtype=torch.float64)
    published = {"eps": [0.1, 1, 1], "x0": [5, 5, 0.2], "v": [5 / 51, 5 / 6, 0.2 / 1.2]}
    for prediction, weights in published.items():
        assert loss_weights("min_snr", prediction, snr / (1 + snr)).tolist() == pytest.approx(weights, rel=1e-12)


def test_simple_is_the_error_as_it_is():
    assert loss_weights("simple", "eps", torch.tensor([0.9, 0.1], dtype=torch.float64)).tolist() == [1, 1]
