import numpy as np
import pytest

from stages.fidelity.rounding import rounded, significant


def test_six_digits_are_significant_wherever_the_point_is() -> None:
    assert [significant(x) for x in (0.3536621169791886, 1234567.0, 1.23456789e-12, 2.0)] == [
        "0.353662",
        "1.23457e+06",
        "1.23457e-12",
        "2",
    ]


@pytest.mark.parametrize("x", [0.3536621169791886, np.float64(0.35366211698286065)])
def test_floats_are_rounded_however_deep(x: float) -> None:
    value = {"a": x, "b": [x, {"c": (x,)}], "n": 2**53 + 1, "text": "0.12345678", "none": None, "true": True}
    kept = {"n": 2**53 + 1, "text": "0.12345678", "none": None, "true": True}
    assert rounded(value) == {"a": 0.353662, "b": [0.353662, {"c": [0.353662]}], **kept}
    assert rounded(value)["true"] is True
    assert type(rounded(x)) is float


def test_rounding_again_changes_nothing() -> None:
    values = np.random.default_rng(0).lognormal(0, 10, 1000).tolist()
    assert rounded(rounded(values)) == rounded(values)
    assert rounded(values) == pytest.approx(values, rel=5.01e-6)
    assert rounded(values) != values
