"""Ancestral sampling, as DDPM."""

from itertools import pairwise
from typing import Literal

from torch import Tensor

from stages.diffusion.process import q_posterior
from stages.diffusion.samplers import Denoiser, Noise, Steps


def sample(denoise: Denoiser, path: Tensor, noise: Noise, *, variance: Literal["posterior", "beta"] = "posterior") -> Steps:
    """Ancestral sampling: each step draws from p(x_prev | x_t) around the mean of q(x_prev | x_t, x0_hat); the last has no noise.

    Args:
        denoise, path, noise: those of every sampler, see samplers/__init__.py.
        variance: of a step: that of the posterior, or beta, which suits long chains alone.

    Source: Ho et al. 2020, algorithm 2; the variances are the two of section 3.2.
    """
    x = noise(0, path[0])
    for a, a_next in pairwise(path):
        x0_hat = denoise(x, a)
        mean, posterior = q_posterior(x0_hat, x, a, a_next)
        drawn = posterior if variance == "posterior" else 1 - a / a_next
        x = mean if a_next == 1 else mean + float(drawn.sqrt()) * noise(a, a_next)
        yield x, x0_hat
