"""The division into train and test: stable, stratified, seeded, without leaks, and without a second copy of the images."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.datasets.splits import published, split
from stages.errors import UserError

NAMES = ["a", "b", "c"]


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 5, 5), generator=rng, dtype=torch.uint8), torch.arange(n) % 3


def shown(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_every_image_goes_somewhere_with_its_label() -> None:
    images, labels = pictures(999)
    before = dict(zip(shown(images), labels.tolist(), strict=True))
    found = split(images, labels, NAMES, test_share=0.2, seed=0)
    after = dict(zip(shown(found.train[0]) + shown(found.test[0]), found.train[1].tolist() + found.test[1].tolist(), strict=True))
    assert after == before
    assert found.report == {"split": {"test_share": 0.2, "seed": 0}, "dropped": {}, "duplicates": 0}


def test_the_splits_are_views_of_the_images_given() -> None:
    images, labels = pictures(999)
    found = split(images, labels, NAMES, test_share=0.2, seed=0)
    start, size = images.data_ptr(), images[0].numel()
    assert found.train[0].data_ptr() == start
    assert found.test[0].data_ptr() == start + len(found.train[0]) * size


def test_every_class_is_divided_in_the_shares_asked_for() -> None:
    images, labels = pictures(3000)
    _, y_test = split(images, labels, NAMES, test_share=0.2, seed=0).test
    # Binomial of 1000 at 0.2: 200 with a standard deviation of 12.6; four of them.
    assert all(abs(count - 200) < 51 for count in y_test.bincount(minlength=3).tolist())


def test_an_image_stays_where_it_was_when_others_are_added_whatever_the_order() -> None:
    images, labels = pictures(300)
    more, more_labels = pictures(500, seed=1)
    tested = set(shown(split(images.clone(), labels, NAMES, test_share=0.3, seed=0).test[0]))
    order = torch.randperm(800, generator=torch.Generator().manual_seed(2))
    both, y = torch.cat([images, more])[order], torch.cat([labels, more_labels])[order]
    tested_later = set(shown(split(both, y, NAMES, test_share=0.3, seed=0).test[0]))
    assert tested_later & set(shown(images)) == tested
    assert len(tested_later) > len(tested)


def test_another_seed_is_another_split() -> None:
    images, labels = pictures(300)
    first, second = (set(shown(split(images.clone(), labels, NAMES, test_share=0.3, seed=s).test[0])) for s in (0, 1))
    # Independent shares of 0.3: 27 of 300 in both, with a standard deviation of 5.
    assert len(first & second) < 50


def test_equal_images_go_together_under_any_label_and_are_counted() -> None:
    images, labels = pictures(300)
    images, labels = torch.cat([images, images[:150]]), torch.cat([labels, (labels[:150] + 1) % 3])
    found = split(images, labels, NAMES, test_share=0.3, seed=0)
    assert not set(shown(found.train[0])) & set(shown(found.test[0]))
    assert found.report["duplicates"] == 150


@pytest.mark.parametrize("test_share", [0.001, 0.999])
def test_a_small_class_is_on_both_sides(test_share: float) -> None:
    images, labels = pictures(6)
    found = split(images, labels, NAMES, test_share=test_share, seed=0)
    assert found.train[1].bincount(minlength=3).tolist() == found.test[1].bincount(minlength=3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 0, 1], "class 'b' has 1 images; a class needs two different ones"),
        ([0, 0, 0], "class 'b' has 0 images"),
        ([0, 0, 0, 1, 1], "class 'b' has 2 images that are all equal"),
    ],
)
def test_a_class_that_cannot_be_on_both_sides_is_refused(labels: list[int], says: str) -> None:
    images, _ = pictures(len(labels))
    images[-1] = images[-2]
    if says.endswith("0 images"):
        images[-1] = 7
    with pytest.raises(UserError, match=says):
        split(images, torch.tensor(labels), ["a", "b"], test_share=0.5, seed=0)


def test_a_published_split_keeps_its_test_images_and_loses_what_leaks_from_train() -> None:
    images, labels = pictures(10)
    train, test = (images[:7].clone(), labels[:7]), (images[7:], labels[7:])
    assert published(train, test, NAMES).report == {"split": "published", "dropped": {}, "duplicates": 0}
    train[0][2] = test[0][1]
    train[0][4] = train[0][3]
    found = published(train, test, NAMES, sources=(torch.arange(7), torch.arange(3)))
    assert len(found.train[0]) == len(found.train[1]) == 6
    assert torch.equal(found.test[0], test[0])
    assert found.report["dropped"] == {"train image that is among the test images": 1}
    assert found.report["duplicates"] == 1
    assert found.sources is not None
    assert found.sources[0].tolist() == [0, 1, 3, 4, 5, 6]


def test_the_order_of_the_train_images_is_kept() -> None:
    images, labels = pictures(50)
    images[:, 0, 0, 0] = torch.arange(50)
    found = split(images, labels, NAMES, test_share=0.5, seed=0)
    for part, _ in (found.train, found.test):
        assert np.all(np.diff(part[:, 0, 0, 0].int().numpy()) > 0)
