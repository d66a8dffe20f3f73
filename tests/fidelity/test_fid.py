from dataclasses import replace

import numpy as np
import pytest
from made_up import fake_of, real_of

from stages.fidelity.fid import fid
from stages.fidelity.frechet import Gaussian, fit_gaussian, frechet_distance


def features(n: int = 200, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)).astype(np.float32)


def test_three_images_by_hand() -> None:
    # Mean 2 and variance 4 against mean 5 and variance 1: (2 - 5)^2 + (sqrt 4 - sqrt 1)^2 = 10.
    value, _ = fid(real_of(fake_of([[0.0], [2.0], [4.0]])), fake_of([[4.0], [5.0], [6.0]]))
    assert value == pytest.approx(10.0, abs=1e-12)


def test_it_is_the_distance_with_a_repeatable_error() -> None:
    real, fake = real_of(fake_of(features(seed=0))), fake_of(features(seed=1))
    value, error = fid(real, fake)
    assert value == frechet_distance(real.gaussian, fit_gaussian(fake.features))
    assert (value, error) == fid(real, fake)


def test_error_is_the_spread_over_sets() -> None:
    # 1-D, real N(0, 1), sets from N(3, 1): FID is about m^2 with m ~ N(3, 1/n), so its sd is about 6 / sqrt(n) = 0.3.
    fake = fake_of(np.random.default_rng(3).normal(3, 1, size=(400, 1)))
    real = replace(real_of(fake), gaussian=Gaussian(np.zeros(1), np.eye(1), 10_000))
    _, error = fid(real, fake)
    assert error == pytest.approx(0.3, rel=0.5)  # an sd from 20 replicates is known to 16 %: three of those
