"""A folder or a zip archive of images as people have them: what lies where says what the classes are.

The rules, on what is left without hidden files and what systems leave about (zips.is_hidden):

1. One folder around all images is gone through, also several within each other.
2. Names tell labels where nine in ten images are called LABEL.anything.png, by labels that have SEVERAL images each, at least
   two such labels in one folder; unless most of them begin with a date. So `IMG_001.png`, `a.png`, `2024.05.01.png` and
   `alef/1.scan.png` tell none.
3. Images in folders, none beside these: each folder is a class, with all that lies deeper in it.
4. Images in no folder: labelled by their names where these tell it; else one class, without labels.
5. Images in folders and beside these: labelled by their names where these tell it; else refused.

What could be meant in two ways is refused, with how to say it: images in folders whose names tell labels too, others than the
folders; names of which half, but not nine in ten, tell labels; folders called train and test; a folder without an image beside
those of classes. A label of digits, of any script, is a number: 5, 05 and ۵ are one class.
"""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stages.datasets import archive, pictures, zips
from stages.datasets.archive import labelled
from stages.datasets.folder import UNLABELLED
from stages.datasets.splits import Dataset
from stages.errors import UserError

FOLDERS, NAMES, FLAT = "a folder for each class", "files named LABEL.anything", "one flat folder, without labels"
UNNAMED = "no label before the first of two dots"
SEVERAL = 3  # images that a label must have to be taken for one: one for each split
MOST = 9 / 10  # of the images; so many must tell the same
LOOKED_AT = 500  # images whose size and paper are looked at
SIZES = (16, 28, 32, 48, 64)  # of which the nearest to the pictures is chosen
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # folders so called are no classes

_DATE = re.compile(r"[^.]*?((19|20)\d\d[-_.]\d{1,2}[-_.]\d{1,2}|\d{1,2}[-_.]\d{1,2}[-_.](19|20)\d\d)")  # in a label


class Layout(NamedTuple):
    """What an archive was taken for."""

    kind: str
    """FOLDERS, NAMES or FLAT."""
    inside: str
    """The folders around all images, ending in a slash; empty where there are none."""
    members: zips.Members
    """The images that have a label."""
    labels: list[int]
    """Of each, its place in class_names."""
    class_names: list[str]
    """Numbers in rising order, then names."""
    refused: list[tuple[str, str]]
    """The other images by name, each with the reason."""

    def __str__(self) -> str:
        return self.kind + f", all inside {self.inside}" * bool(self.inside)


def fetch(folder: Path, *, path: str, **_: object) -> None:
    """Fill an empty folder with one archive: that at `path`, or the images of the folder there.

    Raises:
        UserError: there is neither, or no image in it; it is damaged or unsafe; it is not clear what its classes are.
    """
    archive.fetch(folder, path=path, url=None, drive=None, sha256=None)
    layout(folder / archive.FILE, f"path = {path}")


def read(folder: Path, *, size: int | None, **options: Any) -> Dataset:
    """The images of the archive that `fetch` made. The report says what `layout` it was taken for, and the size.

    Args:
        size: None: one of SIZES by the pictures, see `fitting_size`.
        options: those of archive.labelled.

    Raises:
        UserError: what `layout` and archive.labelled raise.
    """
    file = folder / archive.FILE
    found = layout(file)
    size = size or fitting_size(looks(file, found.members))
    data = labelled(file, found.members, found.labels, found.class_names, found.refused, size=size, **options)
    return data._replace(report=data.report | {"layout": str(found), "size": size})


def layout(path: Path, label: str | None = None) -> Layout:
    """What an archive is taken for, by the rules above; `label` is what errors call it, a file of ours without it.

    Raises:
        UserError: it is damaged or unsafe, or what it is cannot be told.
    """
    name = label or str(path)
    with zips.opened(path, label) as opened:
        members = zips.members(opened, name)
        empty = _empty_folders([zips.plain_name(info, name) for info in opened.infolist()], members.names)
    if not members.names:
        raise UserError(f"{name} holds no image ({' '.join(zips.SUFFIXES)})")
    inside = _around(members.names)
    names = [member[len(inside) :] for member in members.names]
    labels = [_label_of(member) for member in names]
    told = _told(names, labels)
    other = next((member for member, y in zip(names, labels, strict=True) if y not in told), "")
    share = sum(y in told for y in labels) / len(labels)
    in_folder, beside = (next((member for member in names if ("/" in member) == deeper), None) for deeper in (True, False))
    if beside is None:
        folders = sorted({member.partition("/")[0] for member in names})
        _refuse_other_folders(name, folders, inside, empty)
        if share >= MOST:
            raise UserError(
                f"{name}: the classes could be folders, such as {folders[0]!r}, or what names begin with, such as {min(told)!r}; "
                "say `reader: folder`, of an unpacked folder, or `reader: archive`"
            )
        return _layout(FOLDERS, inside, members, [_as_label(member.partition("/")[0]) for member in names])
    if share >= MOST:
        return _layout(NAMES, inside, members, labels)
    if in_folder:
        raise UserError(
            f"{name}: {beside!r} lies in no folder but others do, such as {in_folder!r}; put it into the folder of its class, or "
            "take it out"
        )
    if share >= 1 / 2:
        raise UserError(
            f"{name}: the names of {share:.0%} tell labels, LABEL.anything.png, of others not, such as {other!r}; rename these, or "
            "say `reader: folder`, of an unpacked folder, which takes all without labels"
        )
    return _layout(FLAT, inside, members, [UNLABELLED] * len(names))


def looks(path: Path, members: zips.Members) -> list[pictures.Look]:
    """How LOOKED_AT of the images look, or all where there are fewer: evenly taken from all names; without the unreadable ones."""
    found = []
    chosen = np.unique(np.linspace(0, len(members.names) - 1, min(LOOKED_AT, len(members.names))).round().astype(np.int64))
    with path.open("rb") as file:
        for place in members.places[chosen]:
            try:
                found.append(pictures.look(zips.content(file.fileno(), place)))
            except (pictures.Unreadable, zips.Damaged):
                continue
    return found


def fitting_size(found: list[pictures.Look]) -> int:
    """That of SIZES which is nearest to the median of the pictures' longer sides: the largest where none could be read."""
    return min(SIZES, key=lambda size: abs(size - longer_side(found))) if found else SIZES[-1]


def longer_side(found: list[pictures.Look]) -> int:
    """The median of the longer sides, in pixels."""
    return int(np.median([max(look.width, look.height) for look in found]))


def _layout(kind: str, inside: str, members: zips.Members, labels: list[str | None] | list[str]) -> Layout:
    known = [i for i, label in enumerate(labels) if label is not None]
    classes = sorted({label for label in labels if label is not None}, key=_in_order)
    place = {label: y for y, label in enumerate(classes)}
    refused = [(member, UNNAMED) for member, y in zip(members.names, labels, strict=True) if y is None]
    return Layout(kind, inside, members.take(known), [place[str(labels[i])] for i in known], classes, refused)


def _around(names: list[str]) -> str:
    """The folders that all of some names lie in, ending in a slash; empty where there are none."""
    parents = [name.split("/")[:-1] for name in names]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(parents), max(parents), strict=False))
    return "".join(f"{folder}/" for folder, _ in same)


def _label_of(name: str) -> str | None:
    """The label of a name LABEL.anything.png; None where it has another form.

    >>> _label_of("set/05.0001.png"), _label_of("۵.a.png"), _label_of("الف.000.png"), _label_of("5.png")
    ('5', '5', 'الف', None)
    """
    label, _, rest = name.rpartition("/")[2].partition(".")
    return _as_label(label) if label and rest.rpartition(".")[0] else None


def _as_label(text: str) -> str:
    return str(int(text)) if text.isdecimal() and len(text) <= archive.LONGEST else text


def _in_order(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() and len(label) <= archive.LONGEST else (10**archive.LONGEST, label)


def _told(names: list[str], labels: list[str | None]) -> set[str]:
    """The labels that SEVERAL images of one folder have; none where no folder has two such, or most names begin with a date."""
    dated = sum(bool(_DATE.match(name.rpartition("/")[2])) for name in names)
    counts = Counter((name.rpartition("/")[0], y) for name, y in zip(names, labels, strict=True) if y is not None)
    several = [(folder, y) for (folder, y), n in counts.items() if n >= SEVERAL]
    if dated > len(names) / 2 or max(Counter(folder for folder, _ in several).values(), default=0) < 2:
        return set()
    return {y for _, y in several}


def _refuse_other_folders(name: str, folders: list[str], inside: str, empty: set[str]) -> None:
    """Raise UserError where folders are no classes: named as splits, or without an image, among those in `empty`."""
    if len(splits := [folder for folder in folders if folder.lower() in SPLITS]) > 1:
        raise UserError(
            f"{name} has folders called {' and '.join(map(repr, splits))}: are these classes? Put all images of a class into one "
            "folder, for they are divided here; or say `reader: folder`, which takes any folder for a class"
        )
    without = sorted(folder for folder in empty if folder.rpartition("/")[0] + "/" * ("/" in folder) == inside)
    if without:
        raise UserError(f"{name}: the class {without[0]!r} has no image ({' '.join(zips.SUFFIXES)}); remove its folder")


def _empty_folders(entries: list[str], images: list[str]) -> set[str]:
    """The folders among the entries of an archive, and around them, that no image lies in, at any depth; none that is hidden."""
    return _folders(entries) - _folders(images)


def _folders(names: list[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        folder = name.rpartition("/")[0]
        while folder and folder not in found and not any(map(zips.is_hidden, folder.split("/"))):
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return found
