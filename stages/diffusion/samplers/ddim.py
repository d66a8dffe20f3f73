"""DDIM."""

from itertools import pairwise

from torch import Tensor

from stages.diffusion.samplers import Denoiser, Noise, Steps, eps_of


def sample(denoise: Denoiser, path: Tensor, noise: Noise, *, eta: float = 0.0) -> Steps:
    """DDIM: the same marginals with as much fresh noise as `eta` says: 0 is deterministic, 1 that of the posterior.

    eps_hat is derived from x0_hat, so that a clipped x0_hat and its eps_hat still add up to x_t.

    Chains of one noise and different numbers of steps end in images that are alike, for eta = 0 and for eta = 1. Between them there
    is no such x_T.

    Args: those of every sampler, see samplers/__init__.py; and eta, in 0..1.

    Source: Song et al. 2021, eq. (12) and (16).
    """
    x = noise(0, path[0] if eta > 0 else 0)
    for a, a_next in pairwise(path):
        x0_hat = denoise(x, a)
        sigma2 = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        x = float(a_next.sqrt()) * x0_hat + float((1 - a_next - sigma2).sqrt()) * eps_of(x, x0_hat, a)
        if sigma2 > 0:
            x = x + float(sigma2.sqrt()) * noise(a, a_next)
        yield x, x0_hat
