import numpy as np
import pytest

from stages.fidelity.frechet import Gaussian, fit_gaussian, frechet_distance

# Rounding: an eigenvalue that should be 0 comes out near 1e-16, its root near 1e-8; a dozen of them stay below 1e-6.
ROUNDING = 1e-6


def features(n: int = 200, d: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def test_three_images_by_hand() -> None:
    # mean 2, variance ((-2)^2 + 0 + 2^2) / (3 - 1) = 4; with 1/n it would be 8/3.
    real = fit_gaussian([[0.0], [2.0], [4.0]])
    assert real.mean == pytest.approx([2.0])
    assert real.cov == pytest.approx(np.array([[4.0]]))
    assert real.n == 3
    # mean 5, variance 1: (2 - 5)^2 + (sqrt 4 - sqrt 1)^2 = 10.
    assert frechet_distance(real, fit_gaussian([[4.0], [5.0], [6.0]])) == pytest.approx(10.0, abs=1e-12)


def test_biased_covariance_would_be_noticed() -> None:
    biased = Gaussian(np.array([2.0]), np.array([[8 / 3]]), 3)
    assert abs(frechet_distance(biased, fit_gaussian([[4.0], [5.0], [6.0]])) - 10.0) > 0.5


def test_identical_sets_are_at_zero() -> None:
    real = fit_gaussian(features())
    assert frechet_distance(real, real) == pytest.approx(0, abs=ROUNDING)


def test_shift_alone_is_its_squared_length() -> None:
    f, shift = features(), np.array([3.0, 0, 0, -4.0, 0, 0])
    assert frechet_distance(fit_gaussian(f), fit_gaussian(f + shift)) == pytest.approx(25.0, abs=ROUNDING)


def test_diagonal_gaussians_in_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 0.25])
    real, fake = Gaussian(np.zeros(3), np.diag(a), 10), Gaussian(np.ones(3), np.diag(b), 10)
    expected = 3 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(real, fake) == pytest.approx(expected, abs=1e-10)


def test_commuting_with_a_rotation_of_the_features() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
    a, b = features(seed=0), features(seed=1)
    turned = frechet_distance(fit_gaussian(a @ rotation), fit_gaussian(b @ rotation))
    assert turned == pytest.approx(frechet_distance(fit_gaussian(a), fit_gaussian(b)), rel=1e-9)


def test_symmetric() -> None:
    a, b = fit_gaussian(features(seed=0)), fit_gaussian(features(seed=1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1  # the covariances do not commute, so a distance by entrywise roots would differ


def test_rank_deficient_sets_give_a_number() -> None:
    few, many = fit_gaussian(features(n=3)), fit_gaussian(features(n=200))
    assert np.isfinite(frechet_distance(few, many))
    assert frechet_distance(few, few) == pytest.approx(0, abs=ROUNDING)


def test_float32_features_are_measured_in_float64() -> None:
    f = (features() + 1000).astype(np.float32)  # a float32 covariance of these loses about three digits
    assert fit_gaussian(f).cov == pytest.approx(np.cov(f.astype(np.float64), rowvar=False), rel=1e-9)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros((0, 4)), np.zeros(4)])
def test_too_few_features_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at least 2 feature vectors.*got shape"):
        fit_gaussian(bad)


def test_root_squared_is_the_covariance() -> None:
    real = fit_gaussian(features())
    assert real.root @ real.root == pytest.approx(real.cov, abs=ROUNDING)
    assert real.root == pytest.approx(real.root.T, abs=ROUNDING)
