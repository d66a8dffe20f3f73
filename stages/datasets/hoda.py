"""The Hoda digits: Persian digits that people wrote on forms; .cdb files, and what is in them.

Source: Khosravi & Kabir, Introducing a very large dataset of handwritten Farsi digits and a study on their varieties, Pattern
Recognition Letters 28, 2007.

A .cdb file, little-endian: a header of 1024 bytes (u16 year, u8 month, u8 day, u8 height and u8 width of all images, or 0 and 0,
u32 records, 128 u32 records of each label, u8 kind of image: 0 binary, 1 grey; remarks), then the records: 0xFF, u8 label, u8
width and u8 height where the header has none, u16 bytes of the image, the image. In each row of a binary image runs of paper and
of ink take turns, a byte each, paper first, until the row is full.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stages.datasets.splits import Dataset, Split, dataset, share_out, split
from stages.errors import UserError

LICENCE = "free for research, non-commercial; Khosravi & Kabir 2007"
CLASS_NAMES = list("۰۱۲۳۴۵۶۷۸۹")
PUBLISHED = {"train": 60000, "test": 20000}  # how the names of the two files of the published split start -> their records
LARGEST = 64 * 2**20  # bytes of a file; a larger one is refused; the published ones have up to 7 million
TYPICAL = 33  # pixels; most of the digits are about so high, and that height is to fill HEIGHT of an image
HEIGHT = 0.72
INK, PAPER = 0, 255  # black on white, as the scans are

_HEADER = struct.Struct("<4xBBI128IB")  # height, width, records, records of each label, kind
_RECORDS = 1024  # where they begin
_MARK = 0xFF  # each begins with

Ink = NDArray[np.bool_]  # (H, W), True is ink


class _Header(NamedTuple):
    width: int  # of all images; 0: each record tells its own
    height: int
    records: int
    per_label: list[int]


class _File(NamedTuple):
    path: Path
    content: bytes
    records: int


def fetch(folder: Path, *, path: str | None, **_: object) -> None:
    """Copy .cdb files into an empty folder, each after it has shown to be whole.

    Args:
        path: a .cdb file or a folder of some.

    Raises:
        UserError: there is no `path`, or no .cdb file; one cannot be read, is malformed, or cannot be written.
    """
    if path is None:
        raise UserError(
            "path = null: these digits are not downloaded; get the .cdb files from their authors' site (Khosravi & Kabir 2007) "
            "and name one, or the folder that holds them"
        )
    for source in _cdb_files(Path(path).expanduser(), f"path = {Path(path).expanduser()}"):
        content = _content(source, f"path = {source}")
        for _digit in digits(content, f"path = {source}"):
            pass
        target = folder / source.name
        try:
            target.write_bytes(content)
        except OSError as error:
            raise UserError(f"{target}: {error.strerror or error}") from None


def read(folder: Path, *, size: int, validation_share: float, test_share: float, seed: int, **_: object) -> Dataset:
    """All digits of the .cdb files in a folder. The files do not say who wrote a digit.

    With the published training and test file among them the test split is the published one, and `validation_share` of all other
    images is to validate on; else the split is one of all images, by both shares and the seed.

    Returns:
        images: (N, 1, size, size) uint8, black ink on white, see `place`; labels: (N,) int64 in 0..9.

    Raises:
        UserError: no file is there, or one is malformed; a class is too small to be divided.
    """
    files = [_opened(path) for path in _cdb_files(folder, str(folder))]
    train, test = (_first(files, start, count) for start, count in PUBLISHED.items())
    if train is None or test is None:
        images, labels = _placed(files, size)
        return split(images, labels, CLASS_NAMES, validation_share=validation_share, test_share=test_share, seed=seed)
    rest = _placed([file for file in files if file is not test], size)
    to_train, to_validate = share_out(rest, CLASS_NAMES, share=validation_share, seed=seed)
    how = f"published; {validation_share:.0%} of the other images, by a hash of their pixels and seed {seed}, are to validate on"
    return dataset(to_train, to_validate, _placed([test], size), CLASS_NAMES, how=how)


def digits(content: bytes, name: str) -> Iterator[tuple[int, Ink]]:
    """Label, in 0..9, and ink of each record of a .cdb file, one after the other; `name` is what errors call the file.

    Raises:
        UserError: the file is malformed. Where it goes on, or has other labels than its header says, this comes after the last.
    """
    header = _header(content, name)
    found, at = [0] * len(header.per_label), _RECORDS
    for i in range(header.records):
        try:
            label, ink, at = _record(content, at, header)
        except UserError as error:
            raise UserError(f"{name}: record {i + 1} of {header.records} {error}") from None
        found[label] += 1
        yield label, ink
    if at < len(content):
        raise UserError(f"{name} goes on for {len(content) - at} bytes after the {header.records} records that its header says")
    for label, (said, there) in enumerate(zip(header.per_label, found, strict=True)):
        if said != there:
            raise UserError(f"{name}: the header says {said} records of the label {label}; there are {there}")


def decode(runs: NDArray[np.uint8], width: int, height: int) -> Ink:
    """(height, width) of the run lengths of a binary image, (R,).

    Raises:
        UserError: they do not fill the rows exactly; the message goes on after the name of a record.
    """
    ends = np.cumsum(runs, dtype=np.int64)
    fills = (ends % width == 0) & (runs > 0)  # this run is the last of its row
    rows, total = np.cumsum(fills), int(ends[-1]) if len(ends) else 0
    if len(ends) and rows[-1] != total // width:
        raise UserError("has a run longer than its row")
    if total < width * height:
        raise UserError(f"fills {total} of {width * height} pixels: {width} wide, {height} high")
    if total > width * height or not fills[-1]:
        raise UserError(f"has runs after its last row: {width} pixels wide, {height} high")
    first = np.concatenate([[0], fills.nonzero()[0] + 1])[rows - fills]  # run of the same row
    return np.repeat((np.arange(len(runs)) - first) % 2 == 1, runs).reshape(height, width)


def place(ink: Ink, size: int, *, dark: int = INK, light: int = PAPER) -> NDArray[np.uint8]:
    """(size, size) with the digit in its middle, antialiased, dark on light.

    Proportions are kept, and so is the scale, at which a digit TYPICAL pixels high fills HEIGHT of the image: small ones stay
    small. Only those that are larger are made smaller, to fill as much.
    """
    height, width = ink.shape
    side = max(height, width, TYPICAL) / HEIGHT  # of the square that becomes the image
    margin = max(64, math.ceil(side / 2))  # of paper, so that the square lies within the page
    page = np.full((height + 2 * margin, width + 2 * margin), light, np.uint8)
    page[margin : margin + height, margin : margin + width][ink] = dark
    left, top = margin + (width - side) / 2, margin + (height - side) / 2
    square = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(page).resize((size, size), Image.Resampling.BILINEAR, box=square))


def _cdb_files(source: Path, name: str) -> list[Path]:
    """The .cdb file that a path is, or those in the folder that it is, by name; hidden ones are no such files."""
    try:
        if source.is_dir():
            found = sorted(item for item in source.iterdir() if _is_cdb(item) and item.is_file())
            if not found:
                raise UserError(f"{name} holds no .cdb file")
            return found
        if not source.is_file():
            raise UserError(f"{name}: there is no such file or folder")
        if not _is_cdb(source):
            raise UserError(f"{name} is no .cdb file, nor a folder of some; an archive must be unpacked first")
        return [source]
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None


def _is_cdb(path: Path) -> bool:
    return path.suffix.lower() == ".cdb" and not path.name.startswith(".")


def _content(path: Path, name: str) -> bytes:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{name} is too large: {size} bytes; a .cdb file may have {LARGEST}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None


def _opened(path: Path) -> _File:
    content = _content(path, str(path))
    return _File(path, content, _header(content, str(path)).records)


def _first(files: list[_File], start: str, count: int) -> _File | None:
    """The first file of such a name with so many records."""
    return next((file for file in files if file.records == count and file.path.name.lower().startswith(start)), None)


def _placed(files: list[_File], size: int) -> Split:
    """All digits of some files, in their order."""
    N = sum(file.records for file in files)
    images, labels = np.empty((N, 1, size, size), np.uint8), np.empty(N, np.int64)
    records = (record for file in files for record in digits(file.content, str(file.path)))
    for i, (label, ink) in enumerate(records):
        images[i, 0], labels[i] = place(ink, size), label
    return torch.from_numpy(images), torch.from_numpy(labels)


def _header(content: bytes, name: str) -> _Header:
    """What a .cdb file says of itself; never more records than there are bytes for."""
    if len(content) < _RECORDS:
        raise UserError(f"{name} is no whole .cdb file: it has {len(content)} bytes, its header alone would have {_RECORDS}")
    height, width, count, *per_label, kind = _HEADER.unpack_from(content)
    if kind:
        raise UserError(f"{name} holds images of kind {kind}; only binary ones, kind 0, can be read, and no grey ones")
    if bool(width) != bool(height):
        raise UserError(f"{name} says that all images are {width} wide and {height} high; both must be 0, or neither")
    if not count:
        raise UserError(f"{name} has no records")
    smallest = 5 if width else 7  # bytes of a record
    if count * smallest > len(content) - _RECORDS:
        raise UserError(f"{name} is no whole .cdb file: its header says {count} records, too many for its {len(content)} bytes")
    return _Header(width, height, count, per_label)


def _record(content: bytes, at: int, header: _Header) -> tuple[int, Ink, int]:
    """Label and ink of the record that begins there, and where it ends. What UserError says goes on after its name."""
    start = at + (4 if header.width else 6)  # of the image
    if start > len(content):
        raise UserError("is cut off")
    mark, label, *own = content[at : start - 2]
    width, height = own or (header.width, header.height)
    length = int.from_bytes(content[start - 2 : start], "little")
    if mark != _MARK:
        raise UserError(f"begins with {mark:#04x}, not with {_MARK:#04x}")
    if label >= len(CLASS_NAMES):
        raise UserError(f"has the label {label}; allowed: 0..{len(CLASS_NAMES) - 1}")
    if not width or not height:
        raise UserError(f"is {width} pixels wide and {height} high; both must be at least 1")
    if start + length > len(content):
        raise UserError(f"is cut off: it says that its image has {length} bytes; {len(content) - start} are left")
    return label, decode(np.frombuffer(content, np.uint8, length, start), width, height), start + length
