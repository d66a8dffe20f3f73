import numpy as np
import pytest
import torch

from stages.fidelity.agreement import agreement, share

PROBABILITIES = np.array([[0.95, 0.05, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]])


def test_agreement_counts_the_labels_that_are_likeliest() -> None:
    value, error = agreement([0, 1, 1, 2], PROBABILITIES)
    assert value == 0.75
    assert error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


@pytest.mark.parametrize("hits", [[True, False, False, False], np.array([0, 1, 0, 0], bool), torch.tensor([0, 0, 1, 0]).bool()])
def test_a_share_has_a_binomial_error(hits) -> None:
    assert share(hits) == pytest.approx((0.25, (0.25 * 0.75 / 4) ** 0.5))
