"""The sigmoid schedule, of which alpha_bar is a piece."""

import numpy as np

from stages.diffusion.schedules import Alphas, check, expit, of_signal


def alpha_bar(T: int) -> Alphas:
    """alpha_bar, (T,) float64, following a sigmoid from -3 to 3 at temperature 1, betas clipped at 0.999.

    Source: Jabri et al. 2022, algorithm 1 ("sigmoid_schedule"). The schedule of this name in other code may be another one,
    whose betas follow a sigmoid.
    """
    check(T)
    start, end = -3.0, 3.0
    s = expit(start + np.arange(T + 1) / T * (end - start))
    return of_signal(s[-1] - s)
