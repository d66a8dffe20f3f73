"""DDIM."""

from torch import Tensor

from stages.diffusion.samplers import Denoiser, Noise, Steps, each_step, eps_of


def sample(denoise: Denoiser, x: Tensor, path: Tensor, noise: Noise, *, eta: float = 0.0) -> Steps:
    """DDIM: the same marginals with as much fresh noise as `eta` says: 0 is deterministic, 1 that of the posterior.

    eps_hat is derived from x0_hat, so that a clipped x0_hat and its eps_hat still add up to x_t.

    Args: those of every sampler, see samplers/__init__.py; and eta, in 0..1.

    Source: Song et al. 2021, eq. (12) and (16).
    """
    for after, a, a_next in each_step(path):
        x0_hat = denoise(x, a)
        sigma2 = eta**2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        x = float(a_next.sqrt()) * x0_hat + float((1 - a_next - sigma2).sqrt()) * eps_of(x, x0_hat, a)
        if sigma2 > 0:
            x = x + float(sigma2.sqrt()) * noise(after)
        yield x, x0_hat
