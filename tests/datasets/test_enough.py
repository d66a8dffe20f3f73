"""The least that a dataset must hold: refused once, in one message."""

import pytest
import torch

from stages.datasets.enough import LEAST_OF_CLASS, LEAST_WITHOUT, NAMED, refuse_too_few
from stages.datasets.splits import split
from stages.errors import UserError


def test_enough_of_each_class_or_in_all_is_taken() -> None:
    refuse_too_few(["a", "b"], [LEAST_OF_CLASS, 5000])
    refuse_too_few(["unlabelled"], [LEAST_WITHOUT])


def test_every_class_with_too_few_is_named_once_with_its_count_the_smallest_first() -> None:
    with pytest.raises(UserError, match=r"^2 of 3 classes have too few images: 'c' \(0\), 'a' \(19\); the least that works is 20"):
        refuse_too_few(["a", "b", "c"], [19, 20, 0])


def test_without_classes_more_are_needed() -> None:
    with pytest.raises(UserError, match=r"^99 images without classes are too few; the least that works is 100: add images$"):
        refuse_too_few(["unlabelled"], [99])
    with pytest.raises(UserError, match=r"^1 image without"):
        refuse_too_few(["unlabelled"], [1])


def test_it_is_refused_before_a_split_is_made() -> None:
    """Class c alone could not be divided; both are named."""
    labels = torch.tensor([0] * 19 + [1] * 20 + [2] * 2)
    images = torch.arange(41, dtype=torch.uint8).reshape(41, 1, 1, 1)
    with pytest.raises(UserError, match=r"^2 of 3 classes have too few images: 'c' \(2\), 'a' \(19\);"):
        split(images, labels, ["a", "b", "c"], validation_share=0.1, test_share=0.2, seed=0)


def test_a_long_list_is_cut() -> None:
    names = [f"class {i}" for i in range(300)]
    with pytest.raises(UserError, match=rf"^300 of 300 .*'class {NAMED - 1}' \(5\) and {300 - NAMED} more; ") as error:
        refuse_too_few(names, [5] * 300)
    assert "\n" not in str(error.value)
    assert f"'class {NAMED}'" not in str(error.value)
