import dataclasses

import pytest
import torch

from stages.diffusion import process
from stages.diffusion.schedules import find
from stages.training.errors import errors


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("weighting", ["simple", "variational"])
def test_the_error_of_a_network_is_zero_where_it_is_right_and_known_where_it_is_silent(recipe, prediction, weighting):
    alpha_bar = torch.from_numpy(find("cosine")(20))
    errors_of = errors(dataclasses.replace(recipe, prediction=prediction, weighting=weighting), alpha_bar)
    t, y = torch.arange(20), torch.zeros(20, dtype=torch.long)
    x0, eps = torch.full((20, 1, 8, 8), -0.5), torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def informed(x_t, logsnr, y):  # it infers eps from x_t and the level that it is told
        a = logsnr.double().sigmoid().reshape(-1, 1, 1, 1)
        noise = (x_t + 0.5 * a.sqrt()) / (1 - a).sqrt()
        return {"eps": noise, "x0": torch.full_like(noise, -0.5), "v": a.sqrt() * noise + 0.5 * (1 - a).sqrt()}[prediction]

    weights = process.loss_weights(weighting, prediction, alpha_bar)
    assert (errors_of(informed, x0, y, t, eps) / weights.float().clamp_min(1e-6)).max() < 1e-8
    silent = errors_of(lambda x_t, logsnr, y: torch.zeros_like(x_t), x0, y, t, eps)
    target = process.target(prediction, x0, eps, alpha_bar).double().square().flatten(1).mean(1)
    torch.testing.assert_close(silent.double(), weights * target, rtol=1e-5, atol=1e-9)
