import pytest
from made_up import fake_of, real_of

from stages.fidelity.accuracy import accuracy

SEEN = [[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.6, 0.4, 0.0]]  # classes 0, 1, 0
REAL = real_of(fake_of([[0.0], [2.0], [4.0]]))


def test_three_images_by_hand() -> None:
    # The first two show their labels: 2 of 3, with an error of sqrt(2/3 * 1/3 / 3).
    assert accuracy(REAL, fake_of(probabilities=SEEN, labels=[0, 1, 2])) == pytest.approx((2 / 3, (2 / 27) ** 0.5))


def test_a_set_with_an_image_that_nobody_asked_for_has_none() -> None:
    assert accuracy(REAL, fake_of(probabilities=SEEN, labels=[0, 1, -1])) is None
