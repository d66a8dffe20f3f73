"""Heun's method, as EDM."""

from itertools import pairwise

from torch import Tensor

from stages.diffusion.samplers import Denoiser, Noise, Steps, eps_of


def sample(denoise: Denoiser, path: Tensor, noise: Noise) -> Steps:
    """Heun's method in sigma = sqrt(1 / SNR), as in EDM without its churn: two evaluations a step, one where it ends without noise.

    A step is DDIM's, then corrected by how eps_hat changed across it.

    Args: those of every sampler, see samplers/__init__.py; no noise is asked for but x_T.

    Raises:
        ValueError: the path starts at alpha_bar = 0, where sigma is infinite.

    Source: Karras et al. 2022 (EDM), algorithm 1.
    """
    if path[0] == 0:
        raise ValueError("'heun' cannot start at a zero SNR, where sigma is infinite; use another sampler")
    x = noise(0, 0)
    for a, a_next in pairwise(path):
        x0_hat = denoise(x, a)
        eps_hat = eps_of(x, x0_hat, a)
        x = float(a_next.sqrt()) * x0_hat + float((1 - a_next).sqrt()) * eps_hat
        if a_next < 1:
            change = eps_of(x, denoise(x, a_next), a_next) - eps_hat
            x = x + float((1 - a_next).sqrt() - (a_next * (1 - a) / a).sqrt()) / 2 * change
        yield x, x0_hat
