"""The linear schedule of DDPM as it is printed: the negative control."""

import numpy as np

from stages.diffusion.schedules import Alphas, check, of_betas

TRAINED_AT = 1000  # as in the paper


def alpha_bar(T: int) -> Alphas:
    """alpha_bar, (T,) float64, of betas from 1e-4 to 0.02 whatever T: the negative control.

    Below T = 1000 the last image still holds much of x0, and sampling starts from noise that training never saw.

    Source: Ho et al. 2020, section 4, read literally.
    """
    check(T)
    return of_betas(np.linspace(1e-4, 0.02, T))
