"""What a reader gives, and how images without a published split are divided: by what they show, so that nothing leaks."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.errors import UserError

Split = tuple[Tensor, Tensor]  # images (N, 1, H, W) uint8, labels (N,) int64

CHUNK = 4096  # images moved at a time


class Dataset(NamedTuple):
    """The content of a dataset, as its reader found it."""

    train: Split
    test: Split
    class_names: list[str]
    report: dict[str, Any]
    """For dataset.json: `split`, how it was made; `dropped`, how many images for which reason; `duplicates`, how many images
    equal another one; and whatever else JSON can hold, the same at every reading."""
    sources: tuple[Tensor, Tensor] | None = None
    """Of a mix: from which of its datasets each train and each test image comes, (N,) int64."""


def split(images: Tensor, labels: Tensor, class_names: list[str], *, test_share: float, seed: int) -> Dataset:
    """Divide images into train and test by a hash of their pixels and the seed.

    Where an image goes depends on nothing but itself: it stays there when others are added, and equal images go together, also
    under different labels. Each class is divided by itself, in the shares asked for up to chance; one that is so small that
    chance left it nothing to train on, or to test on, gives up the image nearest to the threshold.

    Args:
        images: (N, 1, H, W) uint8; reordered in place, so that they are never held twice.
        labels: (N,) int64 in 0..len(class_names)-1.
        test_share: in (0, 1).

    Raises:
        UserError: a class has no image, or shows fewer than two different ones.
    """
    digests = _digests(images)
    place = _uniform(digests, seed)
    is_test = torch.from_numpy(place < test_share)
    for y, name in enumerate(class_names):
        of_class = (labels == y).nonzero()[:, 0]
        different = torch.from_numpy(np.unique(place[of_class]))
        if len(different) < 2:
            what = f"{len(of_class)} images that are all equal" if len(of_class) > 1 else f"{len(of_class)} images"
            raise UserError(f"class {name!r} has {what}; a class needs two different ones or more, to train on and to test on")
        for missing, extreme in ((True, different[0]), (False, different[-1])):
            if not (is_test[of_class] == missing).any():
                is_test[torch.from_numpy(place == extreme.item())] = missing
    test, rows = images[is_test], (~is_test).nonzero()[:, 0]
    train, rest = to_front(images, rows), images[len(rows) :]
    rest[:] = test
    report = {"split": {"test_share": test_share, "seed": seed}, "dropped": {}, "duplicates": _duplicates(digests)}
    return Dataset((train, labels[rows]), (rest, labels[is_test]), class_names, report)


def to_front(images: Tensor, rows: Tensor) -> Tensor:
    """Some rows of images, in rising order, moved to the front in place, so that they are never held twice."""
    end = 0
    for chunk in rows.split(CHUNK):  # always forwards: no row is overwritten before it is moved
        images[end : end + len(chunk)] = images[chunk]
        end += len(chunk)
    return images[:end]


def published(train: Split, test: Split, class_names: list[str], *, sources: tuple[Tensor, Tensor] | None = None) -> Dataset:
    """A dataset with a split of its own, less the train images that are among the test images too; they are counted.

    Args:
        sources: see Dataset.
    """
    train_digests, test_digests = _digests(train[0]), _digests(test[0])
    keep = torch.from_numpy(~np.isin(train_digests, test_digests))
    leaked = len(keep) - int(keep.sum())
    if leaked:
        train = (train[0][keep], train[1][keep])
        sources = sources and (sources[0][keep], sources[1])
    duplicates = _duplicates(train_digests[keep.numpy()]) + _duplicates(test_digests)
    report = {"split": "published", "dropped": {"train image that is among the test images": leaked} if leaked else {}}
    return Dataset(train, test, class_names, report | {"duplicates": duplicates}, sources)


def _digests(images: Tensor) -> NDArray[np.uint64]:
    """(N,) hashes of the pixels of each image."""
    rows = images.contiguous().numpy()
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, np.uint64)


def _uniform(digests: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """(N,) in [0, 1): a function of digest and seed; the hash is SplitMix64's finaliser."""
    z = digests ^ np.uint64(int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _duplicates(digests: NDArray[np.uint64]) -> int:
    """How many images equal another one, less one of each kind."""
    return len(digests) - len(np.unique(digests))
