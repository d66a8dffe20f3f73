import numpy as np
import pytest

from stages.fidelity.agreement import accuracy, class_histogram, class_tv, confident

PROBABILITIES = np.array([[0.95, 0.05, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]])


def test_accuracy_counts_agreement_with_the_label() -> None:
    value, error = accuracy([0, 1, 1, 2], PROBABILITIES)
    assert value == 0.75
    assert error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_confident_starts_at_nine_tenths_inclusive() -> None:
    value, error = confident(PROBABILITIES)
    assert value == 0.5
    assert error == pytest.approx(0.25)


def test_histogram_has_a_bin_for_every_class() -> None:
    assert class_histogram(PROBABILITIES).tolist() == [2, 1, 1]
    assert class_histogram(PROBABILITIES[:2]).tolist() == [2, 0, 0]


def test_total_variation_by_hand() -> None:
    # frequencies (.5, .5, 0) against (.25, .25, .5): half of .25 + .25 + .5.
    assert class_tv([0.5, 0.5, 0.0], [25, 25, 50])[0] == pytest.approx(0.5)
    assert class_tv([0.25, 0.25, 0.5], [25, 25, 50])[0] == 0
    assert class_tv([1.0, 0.0], [0, 7]) == (1.0, 0.0)


def test_error_of_total_variation() -> None:
    # Two classes: TV = |p_hat - 0.5| with p_hat near 0.8, whose sd is sqrt(.8 * .2 / 400) = 0.02.
    _, error = class_tv([0.5, 0.5], [320, 80])
    assert error == pytest.approx(0.02, rel=0.2)  # an sd from 200 replicates is known to 5 %: four of those
