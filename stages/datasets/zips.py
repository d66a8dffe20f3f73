"""Zip archives of images: packed from a folder, checked before anything is read, never extracted to disk."""

import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stages.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")  # of images, in lower case
LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # beside what is hidden, such as .DS_Store
LARGEST = 64 * 2**20  # bytes of an image file; a larger one is refused
RATIO = 250  # times as large as the archive may its images be, all together: no picture of ink on paper is packed as tightly

DAMAGED = "damaged in the archive"
SWOLLEN = "larger than the archive says"

_ODD = re.compile(r"^(?:[A-Za-z]:|/)|\\|//|(?:^|/)\.\.?(?:/|$)")  # a name that is no plain relative path


class Damaged(Exception):  # noqa: N818
    """What an archive says of a member is not true; the reason is DAMAGED or SWOLLEN."""


class Members(NamedTuple):
    """The images in an archive, by name."""

    names: list[str]
    """Relative, with slashes, NFC."""
    places: NDArray[np.int64]
    """(N, 5): offset of the local header, bytes in the archive, bytes of the file, CRC-32, 1 if deflated. Names and this are all
    that is kept of each: a million members take 150 MB."""

    def take(self, chosen: list[int]) -> "Members":
        """Some of them, by index."""
        return Members([self.names[i] for i in chosen], self.places[chosen])


def pack(source: Path, target: Path, name: str) -> None:
    """Pack the images below a folder into an archive: the same images under the same names give the same bytes.

    Hidden files and folders, what systems leave and files of any other kind are left out. A folder without an image is an entry
    too, so that whoever reads the archive sees it.

    Args:
        name: what errors call the folder.

    Raises:
        UserError: there is no image; a symbolic link, a name that is no UTF-8, two names that are the same after NFC, a file
            that is too large or cannot be read; or the archive cannot be written.
    """
    images = _collect(source, name)
    if all(entry.endswith("/") for entry in images):
        raise UserError(f"{name} holds no image ({' '.join(SUFFIXES)})")
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            for entry in tqdm(sorted(images), desc="pack", unit="images", unit_scale=True, disable=None, leave=False):
                info = zipfile.ZipInfo(entry, (1980, 1, 1, 0, 0, 0))
                info.create_system = 3  # on every system
                archive.writestr(info, b"" if entry.endswith("/") else _content(images[entry], f"{name}: {entry!r}"))
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}") from None


@contextmanager
def opened(path: Path, name: str | None = None) -> Iterator[zipfile.ZipFile]:
    """An archive to look into.

    Args:
        name: what errors call it; None: by its path, as a file that `dvc repro` makes.

    Raises:
        UserError: it is missing, no zip archive, cut off or damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(
            f"{name}: there is no such file or folder" if name else f"{path} is missing; `dvc repro` makes it"
        ) from None
    except OSError as error:
        raise UserError(f"{name or path}: {error.strerror or error}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        mend = "copy or download it again" if name else "delete it and run `dvc repro`"
        raise UserError(f"{name or path} {_why_no_zip(path, error)}; {mend}") from None
    with archive:
        yield archive


def members(archive: zipfile.ZipFile, name: str) -> Members:
    """The images in an archive, sorted by name; `name` is what errors call the archive.

    Hidden files, what systems leave and files of any other kind are left out. Names without the flag for UTF-8 count as UTF-8 all
    the same if they are (macOS writes such), and backslashes as slashes (old Windows tools do).

    Raises:
        UserError: a member's name leads outside of the archive, or two have one; a symbolic link; an image that is encrypted,
            packed by another method than "stored" or "deflated", larger than LARGEST, or not all within the archive; or all
            together are larger than RATIO times the archive.
    """
    end = os.fstat(archive.fp.fileno()).st_size if archive.fp else 0
    seen: set[str] = set()
    found: list[tuple[str, int, int, int, int, int]] = []
    for info in archive.infolist():
        member = plain_name(info, name)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{name}: {member!r} is a symbolic link; pack the file itself")
        if member.endswith("/"):
            continue
        if member in seen:
            raise UserError(f"{name} has two members of the name {member!r}; each may appear once")
        seen.add(member)
        if not is_image(member):
            continue
        if reason := _refusal(info, end):
            raise UserError(f"{name}: {member!r} {reason}")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        found.append((member, info.header_offset, info.compress_size, info.file_size, info.CRC, int(deflated)))
    total = sum(member[3] for member in found)
    if total > max(RATIO * end, LARGEST):
        raise UserError(f"{name} has {end} bytes but says that its images have {total}: this is a decompression bomb")
    found.sort()
    places = np.array([member[1:] for member in found], np.int64).reshape(-1, 5)
    return Members([member[0] for member in found], places)


def plain_name(info: zipfile.ZipInfo, name: str) -> str:
    """A member's name as a relative path with slashes, NFC; a folder's ends in a slash. Raises UserError if it leads outside."""
    member = info.filename
    if not member.isascii():
        if not info.flag_bits & 0x800:
            with suppress(UnicodeError):
                member = member.encode("cp437").decode()
        member = unicodedata.normalize("NFC", member)
    if not _ODD.search(member):
        return member
    parts = member.replace("\\", "/").split("/")
    if re.match("[A-Za-z]:", member):
        raise UserError(f"{name}: {member!r} begins like a drive of Windows; rename it")
    if parts[0] == "" or ".." in parts:
        raise UserError(f"{name}: {member!r} leads outside of the archive; names must be relative paths without ..")
    return "/".join(part for part in parts if part not in ("", ".")) + "/" * (parts[-1] in ("", "."))


def content(file: int, place: NDArray[np.int64]) -> bytes:
    """The bytes of one image: read in place, and no further than the size that the archive says.

    Args:
        file: descriptor of the archive; its position is neither used nor moved, so that processes can share it.
        place: a row of Members.places.

    Raises:
        Damaged: the bytes are not those that were packed, or more.
    """
    offset, packed, size, crc, deflated = place.tolist()
    header = os.pread(file, 30, offset)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise Damaged(DAMAGED)
    data = os.pread(file, packed, offset + 30 + sum(struct.unpack_from("<HH", header, 26)))
    if deflated:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error:
            raise Damaged(DAMAGED) from None
    if len(data) > size:
        raise Damaged(SWOLLEN)
    if len(data) < size or zlib.crc32(data) != crc:
        raise Damaged(DAMAGED)
    return data


def _refusal(info: zipfile.ZipInfo, end: int) -> str | None:
    """Why an image in an archive of `end` bytes is not read; None when it is."""
    if info.flag_bits & 0x41:
        return "is encrypted; pack it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is packed by method {info.compress_type}; allowed: stored, deflated"
    if max(info.file_size, info.compress_size) > LARGEST:
        return f"is said to have {max(info.file_size, info.compress_size)} bytes; an image may have {LARGEST}"
    if not 0 <= info.header_offset <= end - info.compress_size:
        return "is not all within the archive, which is cut off or damaged"
    return None


def is_image(member: str) -> bool:
    """Whether a path is that of an image that is read."""
    return member.lower().endswith(SUFFIXES) and not any(map(is_hidden, member.split("/")))


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is none of a person's own: hidden, or left by a system (macOS, Windows, Synology)."""
    return part.startswith(".") or part in LEFT_BY_SYSTEMS


def _why_no_zip(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if not start.startswith(b"PK"):
        return f"is no zip archive: it starts with {start!r}" if start else "is no zip archive: it is empty"
    if "not a zip file" in str(error):
        return "is cut off: what a zip archive ends with is missing"
    return f"is a damaged zip archive ({error})"


def _collect(source: Path, name: str) -> dict[str, Path]:
    """The images below a folder, entry -> path, and the folders without any, entry/ -> path."""
    images: dict[str, Path] = {}
    folders: dict[str, Path] = {}
    waiting = [("", source)]
    while waiting:
        prefix, folder = waiting.pop()
        seen: dict[str, str] = {}
        for item in _items(folder, f"{name}: {prefix!r}" if prefix else name):
            if not (is_folder := _is_folder(item)) and not item.name.lower().endswith(SUFFIXES):
                continue
            entry = prefix + _entry_name(item, f"{name}: {prefix + item.name!a}")
            if (other := seen.setdefault(entry, item.name)) != item.name:
                twins = " and ".join(ascii(prefix + twin) for twin in sorted((other, item.name)))
                raise UserError(f"{name}: {twins} are one name in Unicode (NFC); rename one")
            if is_folder:
                folders[entry + "/"] = Path(item.path)
                waiting.append((entry + "/", Path(item.path)))
            else:
                images[entry] = Path(item.path)
    used: set[str] = set()
    for entry in images:
        while (entry := entry.rstrip("/").rpartition("/")[0] + "/") != "/" and entry not in used:
            used.add(entry)
    return images | {entry: path for entry, path in folders.items() if entry not in used}


def _items(folder: Path, label: str) -> list["os.DirEntry[str]"]:
    try:
        return [item for item in os.scandir(folder) if not is_hidden(item.name)]
    except NotADirectoryError:
        raise UserError(f"{label} is no folder") from None
    except FileNotFoundError:
        raise UserError(f"{label}: there is no such folder") from None
    except OSError as error:
        raise UserError(f"{label}: {error.strerror}") from None


def _is_folder(item: "os.DirEntry[str]") -> bool:
    return Path(item.path).is_dir() if item.is_symlink() else item.is_dir()


def _entry_name(item: "os.DirEntry[str]", label: str) -> str:
    """What the archive calls a file or folder: NFC. Raises UserError when it is not to be packed; `label` is what to call it."""
    try:
        item.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{label}: the name is no UTF-8; rename it") from None
    if "\\" in item.name:
        raise UserError(f"{label}: the name has a backslash; rename it")
    if item.is_symlink():
        raise UserError(f"{label} is a symbolic link; put the file or folder itself there")
    if not item.is_dir() and not item.is_file():
        raise UserError(f"{label} is no regular file")
    return unicodedata.normalize("NFC", item.name)


def _content(path: Path, label: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{label}: {error.strerror}") from None
    if len(data) > LARGEST:
        raise UserError(f"{label} is too large; an image may have {LARGEST} bytes")
    return data
