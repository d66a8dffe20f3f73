"""The linear schedule of DDPM, rescaled with T."""

import numpy as np

from stages.diffusion.schedules import Alphas, check, of_betas


def alpha_bar(T: int) -> Alphas:
    """alpha_bar, (T,) float64, of betas rising linearly from 1e-4 to 0.02 at T = 1000, rescaled by 1000 / T.

    The rescaling keeps the amount of noise at the end about the same at every T, so that T changes only the discretisation.

    Raises:
        ValueError: T <= 20, where the last beta would reach 1.

    Source: Ho et al. 2020, section 4; the rescaling is that of Nichol & Dhariwal 2021's code.
    """
    check(T)
    if T <= 20:
        raise ValueError(
            f"schedule 'linear' needs T > 20, not T = {T}: its last beta, 0.02 * 1000 / T, must stay below 1; use 'cosine'"
        )
    return of_betas(np.linspace(1e-4, 0.02, T) * (1000 / T))
