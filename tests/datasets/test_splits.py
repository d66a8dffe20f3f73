"""The division into train, validation and test: stable, stratified, seeded, without leaks or a second copy of the images."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.datasets.splits import Dataset, Split, count_out, dataset, share_out, split
from stages.errors import UserError

NAMES = ["a", "b", "c"]
SHARES: dict[str, Any] = {"validation_share": 0.2, "test_share": 0.3, "seed": 0}


def pictures(n: int, seed: int = 0) -> Split:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 5, 5), generator=rng, dtype=torch.uint8), torch.arange(n) % 3


def shown(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def divided(images: Tensor, labels: Tensor, names: list[str] = NAMES, **options: Any) -> Dataset:
    return split(images.clone(), labels, names, **(SHARES | options))


def sides(found: Dataset) -> dict[bytes, str]:
    """The split of each image by its pixels; no image has two."""
    pairs = [(image, name) for name, (images, _) in found.splits.items() for image in set(shown(images))]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def counts(found: Dataset) -> list[int]:
    return [len(y) for _, y in found.splits.values()]


def test_every_image_goes_somewhere_with_its_label() -> None:
    images, labels = pictures(999)
    found = divided(images, labels)
    after = [pair for x, y in found.splits.values() for pair in zip(shown(x), y.tolist(), strict=True)]
    assert sorted(after) == sorted(zip(shown(images), labels.tolist(), strict=True))
    assert found.report == {
        "split": {"by": "pixels", **SHARES},
        "dropped": {},
        "duplicates": 0,
        "nearly_equal": {"validation": 0, "test": 0},
    }


def test_the_splits_are_views_of_the_images_given() -> None:
    images, labels = pictures(999)
    found = split(images, labels, NAMES, **SHARES)
    start, size = images.data_ptr(), images[0].numel()
    for part, _ in found.splits.values():
        assert part.data_ptr() == start
        start += len(part) * size


def test_every_class_is_divided_in_the_shares_asked_for() -> None:
    found = divided(*pictures(3000))
    # Binomial of 1000 at 0.2 and 0.3: standard deviations of 12.6 and 14.5; four of them.
    for (_, y), share, room in ((found.validation, 0.2, 51), (found.test, 0.3, 58)):
        assert all(abs(count - 1000 * share) < room for count in y.bincount(minlength=3).tolist())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("writers", [None, 40])
def test_no_image_moves_when_others_are_added_whatever_their_number_and_order(seed: int, writers: int | None) -> None:
    """Random sets, of images or of writers with several images each, that grow by a random number of others."""
    rng = np.random.default_rng(seed)
    images, labels = pictures(3000, seed)
    groups = [str(writer) for writer in rng.integers(0, writers, len(images))] if writers else None
    order, n = rng.permutation(len(images)), int(rng.integers(1000, 2000))
    few, many = (
        sides(divided(images[rows], labels[rows], groups=groups and [groups[i] for i in rows], seed=seed))
        for rows in (order[:n], rng.permutation(order))
    )
    assert few.items() <= many.items()
    assert len(many) == 3000


def test_a_small_class_gives_up_its_nearest_and_nothing_else_moves() -> None:
    images, labels = pictures(303)
    labels[:] = (torch.arange(303) >= 300).long()  # three images of class b
    for seed in range(20):
        found = divided(images, labels, ["a", "b"], seed=seed)
        assert [int((y == 1).sum()) for _, y in found.splits.values()] == [1, 1, 1]
        alone = sides(divided(images[:300], labels[:300], ["a"], seed=seed))
        assert alone.items() <= sides(found).items()


def test_another_seed_is_another_split() -> None:
    images, labels = pictures(300)
    first, second = (set(shown(divided(images, labels, seed=seed).test[0])) for seed in (0, 1))
    # Independent shares of 0.3: 27 of 300 in both, with a standard deviation of 5.
    assert len(first & second) < 50


def test_equal_images_go_together_under_any_label_and_are_counted() -> None:
    images, labels = pictures(300)
    images, labels = torch.cat([images, images[:150]]), torch.cat([labels, (labels[:150] + 1) % 3])
    found = divided(images, labels)
    assert len(sides(found)) == 300
    assert sum(counts(found)) == 450
    assert found.report["duplicates"] == 150


def test_images_of_a_group_go_together() -> None:
    images, labels = pictures(600)
    groups = [f"writer {i // 3 % 50}" for i in range(600)]
    found = divided(images, labels, groups=groups)
    assert found.report["split"] == {"by": "group", **SHARES}
    assert found.report["dropped"] == {}
    side = sides(found)
    home = {(group, side[image]) for image, group in zip(shown(images), groups, strict=True)}
    assert len(home) == 50
    assert len({place for _, place in home}) == 3


def test_of_equal_images_of_groups_in_different_splits_only_those_of_one_split_are_kept() -> None:
    images, labels = pictures(600)
    groups = [f"writer {i // 3 % 50}" for i in range(600)]
    home = sides(divided(images, labels, groups=groups))
    first, second = shown(images[:300]), shown(images[300:])  # the second half is drawn anew as the first
    images[300:] = images[:300]
    found = divided(images, labels, groups=groups)
    best = {
        one: max((home[one], home[two]), key=("train", "validation", "test").index) for one, two in zip(first, second, strict=True)
    }
    assert sides(found) == best
    assert sum(counts(found)) == 600 - sum(found.report["dropped"].values())


@pytest.mark.parametrize("shares", [(0.001, 0.001), (0.001, 0.998), (0.998, 0.001)])
def test_a_small_class_is_in_every_split(shares: tuple[float, float]) -> None:
    found = divided(*pictures(9), validation_share=shares[0], test_share=shares[1])
    assert [y.bincount(minlength=3).tolist() for _, y in found.splits.values()] == [[1, 1, 1]] * 3


@pytest.mark.parametrize(
    ("labels", "groups", "says"),
    [
        ([0, 0, 0, 1, 1], None, "class 'b' has 2 images, but only 1 different images; it needs 3, for each split needs one"),
        ([0, 0, 0], None, "class 'b' has 0 images"),
        ([0, 0, 0, 1, 1, 1], None, "class 'b' has 3 images, but only 2 different images"),
        ([0, 0, 0, 1, 1, 1], list("abcddd"), "class 'b' has 3 images, but only 1 different groups"),
        ([0, 0, 0, 1, 1, 1], list("abcabd"), "class '[ab]' has no image for train; try another seed"),  # all images of b are equal
    ],
)
def test_a_class_that_cannot_be_in_every_split_is_refused(labels: list[int], groups: list[str] | None, says: str) -> None:
    images, _ = pictures(len(labels))
    if "has no image" in says:
        images[-3:] = images[-1]
    elif len(labels) > 3:
        images[-1] = images[-2]
    with pytest.raises(UserError, match=says):
        split(images, torch.tensor(labels), ["a", "b"], groups=groups, **SHARES)


def test_given_splits_keep_their_test_images_and_what_leaks_from_the_others_is_dropped() -> None:
    images, labels = pictures(12)
    train, validation, test = ((images[rows].clone(), labels[rows]) for rows in (slice(6), slice(6, 9), slice(9, 12)))
    report = {"split": "published", "dropped": {}, "duplicates": 0, "nearly_equal": {"validation": 0, "test": 0}}
    assert dataset(train, validation, test, NAMES, how="published").report == report
    train[0][2] = validation[0][0] = test[0][1]
    train[0][5] = validation[0][1]
    train[0][4] = train[0][3]
    sources = (torch.arange(6), torch.arange(3), torch.arange(3))
    found = dataset(train, validation, test, NAMES, how="published", sources=sources)
    assert counts(found) == [4, 2, 3]
    sides(found)
    assert torch.equal(found.test[0], test[0])
    assert found.report["dropped"] == {
        "validation image that another split has too": 1,
        "train image that another split has too": 2,
    }
    assert found.report["duplicates"] == 1
    assert found.sources is not None
    assert [origin.tolist() for origin in found.sources] == [[0, 1, 3, 4], [1, 2], [0, 1, 2]]


def test_nearly_equal_images_of_other_splits_are_counted() -> None:
    images = torch.randint(0, 256, (60, 1, 28, 28), generator=torch.Generator().manual_seed(0)).float()
    noise = torch.randn((60, 1, 28, 28), generator=torch.Generator().manual_seed(1))
    copies = (images + 2 * noise).round().clamp(0, 255)
    others = images.roll(1, 3)  # a pixel aside: not nearly equal here
    labels = torch.zeros(60, dtype=torch.int64)
    given = [
        torch.cat(parts).to(torch.uint8)
        for parts in ((images[:50],), (copies[:5], others[5:20]), (copies[5:12], copies[:3], others[20:50]))
    ]
    train, validation, test = ((x, labels[: len(x)]) for x in given)
    found = dataset(train, validation, test, ["a"], how="by hand")
    assert counts(found) == [50, 17, 40]  # three of validation were in test too: equal, not nearly
    assert found.report["nearly_equal"] == {"validation": 2, "test": 10}


def test_seventy_thousand_images_are_divided_in_seconds() -> None:
    rng = torch.Generator().manual_seed(0)
    strokes = torch.randint(0, 256, (70_000, 1, 7, 7), generator=rng, dtype=torch.uint8)
    images = strokes.repeat_interleave(4, 2).repeat_interleave(4, 3)
    start = time.process_time()
    divided(images, torch.arange(len(images)) % 3)
    assert time.process_time() - start < 20


def test_a_published_train_split_is_divided_by_a_share_or_to_given_counts() -> None:
    train = pictures(600)
    rest, validation = share_out(train, NAMES, share=0.25, seed=0)
    # Binomial of 200 at 0.25: 50 with a standard deviation of 6.1; four of them.
    assert all(abs(count - 50) < 25 for count in validation[1].bincount().tolist())
    more, more_validated = share_out(
        tuple(torch.cat(both) for both in zip(train, pictures(300, 1), strict=True)), NAMES, share=0.25, seed=0
    )
    assert set(shown(validation[0])) <= set(shown(more_validated[0]))
    assert set(shown(rest[0])) <= set(shown(more[0]))

    wanted = torch.tensor([10, 0, 200])
    rest, validation = count_out(train, wanted, seed=0)
    assert validation[1].bincount(minlength=3).tolist() == [10, 0, 200]
    assert sorted(shown(rest[0]) + shown(validation[0])) == sorted(shown(train[0]))
    assert not torch.equal(validation[0][validation[1] == 0], train[0][train[1] == 0][:10])
    assert set(shown(count_out(train, wanted + torch.tensor([1, 1, 0]), seed=0)[1][0])) > set(shown(validation[0]))


def test_the_order_of_the_images_is_kept() -> None:
    images, labels = pictures(50)
    images[:, 0, 0, 0] = torch.arange(50)
    for part, _ in divided(images, labels).splits.values():
        assert np.all(np.diff(part[:, 0, 0, 0].int().numpy()) > 0)
