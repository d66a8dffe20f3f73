"""A folder of images, one sub-folder per class; or images without classes."""

from pathlib import Path
from typing import Any

from stages.datasets import zips
from stages.datasets.archive import labelled
from stages.datasets.splits import Dataset
from stages.errors import UserError

FILE = "images.zip"
UNLABELLED = "unlabelled"  # the one class of images that lie in no sub-folder


def fetch(folder: Path, *, path: str, **_: object) -> None:
    """Pack the images below `path` into images.zip in an empty folder; the same images give the same bytes.

    Raises:
        UserError: there is no such folder, an image or file name in it cannot be packed, or its classes are not clear.
    """
    label = f"path = {path}"
    zips.pack(Path(path).expanduser(), folder / FILE, label)
    _load(folder / FILE, label)


def read(folder: Path, **options: Any) -> Dataset:
    """The images of images.zip; the classes are the sub-folders, sorted.

    What lies in deeper sub-folders belongs to the class of the first level. Images that lie in no sub-folder are one class.

    Args:
        options: those of archive.labelled.

    Raises:
        UserError: images.zip is missing or damaged; and what archive.labelled raises.
    """
    members, classes = _load(folder / FILE)
    place = {name: y for y, name in enumerate(classes)}
    return labelled(folder / FILE, members, [place[_class_of(name)] for name in members.names], classes, [], **options)


def _load(path: Path, label: str | None = None) -> tuple[zips.Members, list[str]]:
    """The images of an archive and its classes, sorted. Raises UserError when it is not clear which these are."""
    with zips.opened(path, label) as archive:
        members = zips.members(archive, label or str(path))
        entries = [zips.plain_name(info, label or str(path)) for info in archive.infolist() if info.is_dir()]
    used = {name.partition("/")[0] for name in members.names if "/" in name}
    empty = {entry.partition("/")[0] for entry in entries} - used
    flat = [name for name in members.names if "/" not in name]
    if flat and (used or empty):
        folder = min(used | empty)
        raise UserError(
            f"{label or path}: {flat[0]!r} lies in no sub-folder but others are in classes, such as {folder!r}; choose one"
        )
    if empty:
        raise UserError(f"{label or path}: the class {min(empty)!r} has no image ({' '.join(zips.SUFFIXES)}); remove its folder")
    return members, [UNLABELLED] if flat else sorted(used)


def _class_of(name: str) -> str:
    return name.partition("/")[0] if "/" in name else UNLABELLED
