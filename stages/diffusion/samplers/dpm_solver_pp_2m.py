"""DPM-Solver++ (2M) of the probability flow."""

from itertools import pairwise

from torch import Tensor

from stages.diffusion.samplers import Denoiser, Noise, Steps, look_ahead


def sample(denoise: Denoiser, path: Tensor, noise: Noise) -> Steps:
    """DPM-Solver++ (2M): second order in log-SNR from the x0_hat of this step and of the one before, one evaluation a step.

    The first step has none before it, and one that ends without noise is infinitely long: both are of first order, as DDIM.

    Args: those of every sampler, see samplers/__init__.py; no noise is asked for but x_T.

    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """
    x, before = noise(0, 0), None
    for a, a_next in pairwise(path):
        x0_hat = denoise(x, a)
        ahead, before = look_ahead(x0_hat, a, a_next, before)
        ratio = ((1 - a_next) / (1 - a)).sqrt()
        x = float(ratio) * x + float(a_next.sqrt() - ratio * a.sqrt()) * ahead
        yield x, x0_hat
