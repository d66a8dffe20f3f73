import numpy as np
import pytest
from made_up import fake_of, real_of

from stages.fidelity.class_tv import class_histogram, class_tv, total_variation

PROBABILITIES = np.array([[0.95, 0.05, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]])


def test_three_images_by_hand() -> None:
    # Frequencies (1/3, 1/3, 1/3) against what is seen, (2/3, 1/3, 0): half of 1/3 + 0 + 1/3. What was asked for counts for nothing.
    real = real_of(fake_of([[0.0], [2.0], [4.0]], np.eye(3), [0, 1, 2]))
    value, _ = class_tv(real, fake_of(probabilities=PROBABILITIES[:3], labels=[2, 2, 2]))
    assert value == pytest.approx(1 / 3)


def test_histogram_has_a_bin_for_every_class() -> None:
    assert class_histogram(PROBABILITIES).tolist() == [2, 1, 1]
    assert class_histogram(PROBABILITIES[:2]).tolist() == [2, 0, 0]


def test_total_variation_by_hand() -> None:
    # frequencies (.5, .5, 0) against (.25, .25, .5): half of .25 + .25 + .5.
    assert total_variation([0.5, 0.5, 0.0], [25, 25, 50])[0] == pytest.approx(0.5)
    assert total_variation([0.25, 0.25, 0.5], [25, 25, 50])[0] == 0
    assert total_variation([1.0, 0.0], [0, 7]) == (1.0, 0.0)


def test_error_of_total_variation() -> None:
    # Two classes: TV = |p_hat - 0.5| with p_hat near 0.8, whose sd is sqrt(.8 * .2 / 400) = 0.02.
    _, error = total_variation([0.5, 0.5], [320, 80])
    assert error == pytest.approx(0.02, rel=0.2)  # an sd from 200 replicates is known to 5 %: four of those
