from dataclasses import replace

import pytest
from made_up import fake_of, real_of

from stages.fidelity.confident import confident
from stages.fidelity.confident_ratio import confident_ratio

SEEN = fake_of(probabilities=[[0.9, 0.1], [0.89, 0.11], [0.0, 1.0]])
REAL = real_of(fake_of([[0.0], [2.0], [4.0]]))


def test_three_images_by_hand() -> None:
    # 0.9 counts, 0.89 does not: 2 of 3, with an error of sqrt(2/3 * 1/3 / 3).
    assert confident(REAL, SEEN) == pytest.approx((2 / 3, (2 / 27) ** 0.5))


def test_the_ratio_is_to_real_images_by_hand() -> None:
    # Of the real images 0.8 are: value and error are divided by it.
    real = replace(REAL, shares={"confident": 0.8})
    assert confident_ratio(real, SEEN) == pytest.approx((2 / 3 / 0.8, (2 / 27) ** 0.5 / 0.8))


def test_there_is_no_ratio_to_nothing() -> None:
    assert confident_ratio(replace(REAL, shares={"confident": 0.0}), SEEN) is None
