"""A zip archive of images that are labelled by their names: `<label>.<anything>.png`, anywhere in it."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from stages.datasets import pictures, zips
from stages.datasets.download import download
from stages.datasets.splits import Dataset, split
from stages.errors import UserError

FILE = "archive.zip"
UNLABELLED = "no integer label before the first dot"
LONGEST = 18  # digits of a label


def fetch(folder: Path, *, path: str | None, url: str | None, drive: str | None, sha256: str | None, **_: object) -> None:
    """Fill an empty folder with archive.zip, the same bytes by whatever way they came; what is in it is checked, not unpacked.

    Args:
        path: a zip archive, or a folder of images, which is packed.
        url: the address of a zip archive. drive: that of one on Google Drive, or its id there.
        sha256: of the archive, in hexadecimal; None: whatever it is. Of a folder: of the archive packed from it.

    Raises:
        UserError: not exactly one of path, url and drive is given; the archive cannot be had, is none, is unsafe, is another one
            than `sha256` says, or has no image in it.
    """
    given = {option: value for option, value in (("path", path), ("url", url), ("drive", drive)) if value is not None}
    if len(given) != 1:
        raise UserError(f"{', '.join(given) or 'none'} of path, url, drive is given; one of them must say where the images are")
    ((option, value),) = given.items()
    label = f"{option} = {value}"
    if path is None:
        download(folder / FILE, url=url, drive=drive, sha256=sha256)
        _check(folder / FILE, label)
    elif Path(path).expanduser().is_dir():
        zips.pack(Path(path).expanduser(), folder / FILE, label)
        _check_sha256(folder / FILE, sha256, label)
    else:
        _check(Path(path).expanduser(), label)
        _copy(Path(path).expanduser(), folder / FILE, label)
        _check_sha256(folder / FILE, sha256, label)


def read(folder: Path, **options: Any) -> Dataset:
    """The images of archive.zip; the classes are the labels, in rising order.

    A label is what stands before the first dot of a file's name: digits of any script, so that 5, 05 and ۵ are one class.

    Args:
        options: those of `labelled`.

    Raises:
        UserError: archive.zip is missing, damaged, unsafe or empty; and what `labelled` raises.
    """
    with zips.opened(folder / FILE) as archive:
        members = zips.members(archive, str(folder / FILE))
    labels = [label_of(name) for name in members.names]
    refused = [(name, UNLABELLED) for name, label in zip(members.names, labels, strict=True) if label is None]
    known = [label for label in labels if label is not None]
    classes = sorted(set(known))
    place = {label: y for y, label in enumerate(classes)}
    return labelled(
        folder / FILE,
        members.take([i for i, label in enumerate(labels) if label is not None]),
        [place[label] for label in known],
        [str(label) for label in classes],
        refused,
        **options,
    )


def labelled(
    archive: Path,
    members: zips.Members,
    labels: list[int],
    class_names: list[str],
    refused: list[tuple[str, str]],
    *,
    size: int,
    invert: bool,
    pad: bool,
    strict: bool,
    group: str | None,
    validation_share: float,
    test_share: float,
    seed: int,
    **_: object,
) -> Dataset:
    """The dataset of an archive's images, divided by what they show or by group.

    Args:
        labels: of each image, its place in `class_names`.
        refused: names of other images, each with the reason.
        size, invert, pad: see pictures.Shape.
        strict: True: an image that cannot be read, or is refused, is an error; False: it is dropped, unless many are.
        group: a regular expression; the one group in it tells from an image's path, as it is in the archive, to which group the
            image belongs, such as its writer; None: each image is its own.
        validation_share, test_share, seed: see splits.split.

    Raises:
        UserError: an image is unreadable and `strict`, or too many are; a class has too few; `group` tells no group of an image.
    """
    groups = None if group is None else [_group_of(name, group) for name in members.names]
    images, kept, dropped = pictures.read_all(archive, members, size=size, invert=invert, pad=pad, strict=strict, refused=refused)
    data = split(
        images,
        torch.tensor(labels, dtype=torch.int64)[kept],
        class_names,
        groups=groups and [groups[i] for i in kept],
        validation_share=validation_share,
        test_share=test_share,
        seed=seed,
    )
    return data._replace(report=data.report | dropped | {"dropped": dropped["dropped"] | data.report["dropped"]})


def label_of(name: str) -> int | None:
    """The label that a member's name begins with, None when it has none.

    >>> label_of("train/12.0001.png"), label_of("۵.a.png"), label_of("-1.png"), label_of("a.1.png")
    (12, 5, None, None)
    """
    start = name.rpartition("/")[2].partition(".")[0]
    return int(start) if start.isdecimal() and len(start) <= LONGEST else None


def _group_of(name: str, group: str) -> str:
    found = re.search(group, name)
    if found is None or found[1] is None:
        raise UserError(f"group = {group!r} says nothing of {name!r}; it must match the path of every image")
    return found[1]


def _check(path: Path, label: str) -> None:
    with zips.opened(path, label) as archive:
        if not zips.members(archive, label).names:
            raise UserError(f"{label} holds no image ({' '.join(zips.SUFFIXES)})")


def _copy(path: Path, target: Path, label: str) -> None:
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise UserError(f"{label}: copying it to {target}: {error.strerror or error}") from None


def _check_sha256(path: Path, sha256: str | None, label: str) -> None:
    if sha256 is None:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256.lower():
        raise UserError(f"{label} has SHA-256 {digest}, not {sha256}")
