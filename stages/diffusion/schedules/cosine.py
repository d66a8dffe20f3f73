"""The cosine schedule of improved DDPM."""

from stages.diffusion.schedules import Alphas, of_signal, squared_cosine


def alpha_bar(T: int) -> Alphas:
    """alpha_bar, (T,) float64, following a squared cosine with offset s = 0.008, betas clipped at 0.999.

    Source: Nichol & Dhariwal 2021, eq. (17).
    """
    return of_signal(squared_cosine(T))
