"""What a reader gives, and how images are divided into train, validation and test: by a hash, so that nothing leaks or moves."""

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.spatial import KDTree
from torch import Tensor

from stages.datasets import enough
from stages.errors import UserError

Split = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64

CHUNK = 4096  # images moved at a time
REDUCED = 8  # pixels a side of the pictures by which nearly equal images are found
NEAR = 3.0  # grey levels, root mean square, by which these differ at most


class Dataset(NamedTuple):
    """The content of a dataset, as its reader found it. No image of one split is in another."""

    train: Split
    validation: Split
    test: Split
    class_names: list[str]
    report: dict[str, Any]
    """For dataset.json: `split`, how it was made; `dropped`, how many images for which reason; `duplicates`, how many images
    equal another one; `nearly_equal`, see `dataset`; and whatever else JSON can hold, the same at every reading."""
    sources: tuple[Tensor, Tensor, Tensor] | None = None
    """Of a mix: from which of its datasets each image of the three splits comes, (N,) int64."""

    @property
    def splits(self) -> dict[str, Split]:
        """The three by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def split(
    images: Tensor,
    labels: Tensor,
    class_names: list[str],
    *,
    groups: list[str] | None = None,
    validation_share: float,
    test_share: float,
    seed: int,
) -> Dataset:
    """Divide images by a hash of the seed and of their pixels, or of their group.

    Where an image goes depends on nothing but itself, or its group, and the seed. So it never moves when others are added, images
    of one group stay together, and so do equal images, also under different labels; equal images of different groups are
    dropped as `dataset` says. Each class is divided in the shares asked for, up to chance.

    The exception: a class so small that chance left a split without it gives up the image, or the group, nearest to the
    threshold. It goes back to its own side once enough others of the class have come.

    Args:
        images: (N, C, H, W) uint8; reordered in place, so that they are never held twice.
        labels: (N,) int64 in 0..len(class_names)-1.
        groups: of each image, such as its writer; None: each image is its own.
        validation_share, test_share: in (0, 1), and less than 1 together.

    Raises:
        UserError: classes are too small (enough.py), or one has fewer than three different images, or groups, or cannot be in
            all splits.
    """
    enough.refuse_too_few(class_names, labels.bincount(minlength=len(class_names)).tolist())
    hashed = _digests(_rows(images)) if groups is None else _digests(group.encode() for group in groups)
    part = _parts(hashed, labels, class_names, [test_share, validation_share], seed, "images" if groups is None else "groups")
    test, validation, train = (torch.from_numpy(np.flatnonzero(part == k)) for k in range(3))
    held_out = torch.cat([validation, test])
    copy = images[held_out]
    trained, rest = to_front(images, train), images[len(train) :]
    rest[:] = copy
    found = dataset(
        (trained, labels[train]),
        (rest[: len(validation)], labels[validation]),
        (rest[len(validation) :], labels[test]),
        class_names,
        how={
            "by": "pixels" if groups is None else "group",
            "validation_share": validation_share,
            "test_share": test_share,
            "seed": seed,
        },
    )
    for name, (_, y) in found.splits.items():
        if (counts := y.bincount(minlength=len(class_names))).min() == 0:
            raise UserError(f"class {class_names[counts.argmin()]!r} has no image for {name}; try another seed, or other shares")
    return found


def share_out(train: Split, class_names: list[str], *, share: float, seed: int) -> tuple[Split, Split]:
    """What to train and to validate on, of a published train split: by a hash of the pixels and the seed, as `split` divides.

    Raises:
        UserError: a class has fewer than two different images.
    """
    is_train = _parts(_digests(_rows(train[0])), train[1], class_names, [share], seed, "images") == 1
    return _cut(train, is_train)


def count_out(train: Split, counts: Tensor, *, seed: int) -> tuple[Split, Split]:
    """The same with so many images of each class to validate on, (K,): those with the smallest hashes.

    For a train split that never changes: here an image may move when others are added.
    """
    labels = train[1].numpy()
    order = np.lexsort((_uniform(_digests(_rows(train[0])), seed), labels))
    rank = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])  # within the class
    is_train = np.empty(len(order), np.bool_)
    is_train[order] = rank >= counts.numpy()[labels[order]]
    return _cut(train, is_train)


def dataset(
    train: Split,
    validation: Split,
    test: Split,
    class_names: list[str],
    *,
    how: str | dict[str, Any],
    sources: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Dataset:
    """A dataset of given splits, less the images that one has and another too: test keeps them, else validation.

    The report counts them, and those that are left but nearly equal: the images of validation to one of train, and of test to one
    of both. These are pairs that differ by less than NEAR grey levels, root mean square, when shrunk to REDUCED x REDUCED
    means; a k-d tree finds them.

    Args:
        how: the splits were made, for the report.
        sources: see Dataset.
    """
    whole: dict[str, tuple[Tensor, ...]] = {"train": train, "validation": validation, "test": test}
    if sources:
        whole = {name: (*whole[name], source) for name, source in zip(whole, sources, strict=True)}
    dropped, duplicates, taken = {}, 0, np.empty(0, np.uint64)
    for name in ("test", "validation", "train"):
        digests = _digests(_rows(whole[name][0]))
        keep = ~np.isin(digests, taken)
        if leaked := len(keep) - int(keep.sum()):
            dropped[f"{name} image that another split has too"] = leaked
            whole[name] = tuple(part[torch.from_numpy(keep)] for part in whole[name])
        different = np.unique(digests[keep])
        duplicates += len(keep) - leaked - len(different)
        taken = np.concatenate([taken, different])
    splits = {name: (images, labels) for name, (images, labels, *_) in whole.items()}
    report = {"split": how, "dropped": dropped, "duplicates": duplicates, "nearly_equal": _nearly_equal(splits)}
    train_source, validation_source, test_source = (source for *_, source in whole.values())
    origin = (train_source, validation_source, test_source) if sources else None
    return Dataset(splits["train"], splits["validation"], splits["test"], class_names, report, origin)


def to_front(images: Tensor, rows: Tensor) -> Tensor:
    """Some rows of images, in rising order, moved to the front in place, so that they are never held twice."""
    end = 0
    for chunk in rows.split(CHUNK):  # always forwards: no row is overwritten before it is moved
        images[end : end + len(chunk)] = images[chunk]
        end += len(chunk)
    return images[:end]


def _cut(train: Split, is_train: NDArray[np.bool_]) -> tuple[Split, Split]:
    images, labels = train
    rows, others = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (is_train, ~is_train))
    return (images[rows], labels[rows]), (images[others], labels[others])


def _parts(
    hashed: NDArray[np.uint64], labels: Tensor, class_names: list[str], shares: list[float], seed: int, what: str
) -> NDArray[np.int64]:
    """In which part each image is, (N,): 0, 1, ... in the shares asked for, and the last in what is left of 1.

    Args:
        hashed: (N,), equal for what must stay together.
        what: is hashed, for errors.
    """
    place, bounds = _uniform(hashed, seed), np.cumsum(shares)
    part = np.searchsorted(bounds, place, side="right")
    for y, name in enumerate(class_names):
        of_class = place[labels.numpy() == y]
        rising = np.unique(of_class)
        n, needed = len(rising), len(shares) + 1
        if n < needed:
            raise UserError(
                f"class {name!r} has {len(of_class)} images, but only {n} different {what}; it needs {needed}, "
                "for each split needs one"
            )
        ends = np.searchsorted(rising, bounds)  # of the parts: so many lie below
        for k in range(len(ends)):  # none may be empty
            ends[k] = min(max(ends[k], ends[k - 1] + 1 if k else 1), n - len(ends) + k)
        wanted = np.searchsorted(ends, np.arange(n), side="right")
        for i in np.flatnonzero(wanted != np.searchsorted(bounds, rising, side="right")):
            part[place == rising[i]] = wanted[i]
    return part


def _rows(images: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = images.contiguous().numpy()
    return pixels


def _digests(rows: Iterable[Any]) -> NDArray[np.uint64]:
    """(N,) hashes of bytes, or of arrays of them."""
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(digests, np.uint64)


def _uniform(digests: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """(N,) in [0, 1): a function of digest and seed; the hash is SplitMix64's finaliser."""
    z = digests ^ np.uint64(int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _nearly_equal(splits: dict[str, Split]) -> dict[str, int]:
    """How many images of validation, and of test, are nearly equal to one of the splits before: see `dataset`."""
    reduced = {name: _reduced(images) for name, (images, _) in splits.items()}
    seen, counts = reduced["train"], {}
    for name in ("validation", "test"):
        distance, _ = KDTree(seen).query(reduced[name], distance_upper_bound=NEAR * seen.shape[1] ** 0.5)
        counts[name] = int(np.isfinite(distance).sum())
        seen = np.concatenate([seen, reduced[name]])
    return counts


def _reduced(images: Tensor) -> NDArray[np.float32]:
    """(N, C * REDUCED * REDUCED), the means of blocks of pixels."""
    chunks = [F.adaptive_avg_pool2d(chunk.float(), REDUCED).flatten(1) for chunk in images.split(CHUNK)]
    means: NDArray[np.float32] = torch.cat(chunks).numpy()
    return means
