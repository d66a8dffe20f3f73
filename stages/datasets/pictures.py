"""From the bytes of image files to uint8 pixels of one size: whatever is in them, and whatever is wrong with them."""

import gc
import io
import math
import mmap
import multiprocessing
import os
import signal
import struct
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from stages.datasets import zips
from stages.datasets.splits import to_front
from stages.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF")
MEGAPIXELS = 50  # of a picture; a larger one is refused before it is decoded
CHUNK = 64  # images that a process decodes at a time
TOLERATED = 10  # one image in so many may be unreadable
NAMED = 20  # unreadable images named in the report

# Why an image is not read
EMPTY = "empty file"
UNKNOWN = "no PNG, JPEG or TIFF image"
CUT_OFF = "cut off"
DAMAGED = "damaged"
TOO_LARGE = f"more than {MEGAPIXELS} megapixels"
NO_PIXELS = "no pixels"
SEVERAL = "several pages or frames"
DEPTH = "32-bit pixels without a known range"
DISK = "the disk cannot read it"
OUTCOMES = ("", "", "", EMPTY, UNKNOWN, CUT_OFF, DAMAGED, TOO_LARGE, NO_PIXELS, SEVERAL, DEPTH, zips.DAMAGED, zips.SWOLLEN, DISK)
WAITING, BUSY, FINE = 0, 1, 2  # places in OUTCOMES
NEVER = (zips.SWOLLEN, DISK)  # no image with such a fault is dropped: the archive or the disk is at fault

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II", b"MM")
_STARTS = (_PNG, b"\xff\xd8\xff", *_TIFF)
_PHOTOMETRIC, _BITS = 262, 258  # tags of TIFF

Pixels = NDArray[np.uint8]


class Unreadable(Exception):  # noqa: N818
    """No picture can be had from these bytes; the reason is one of OUTCOMES."""


class Shape(NamedTuple):
    """What every picture is brought to."""

    size: int
    """Width and height in pixels."""
    invert: bool
    """255 - x: light ink becomes dark."""
    pad: bool
    """True: a square with the picture in its middle, in its proportions, filled up with its paper; False: stretched."""


class Look(NamedTuple):
    """What a picture is before it is brought to a shape."""

    width: int
    height: int
    paper: int
    """The median of the pixels at its border, in 0..255."""


class Read(NamedTuple):
    """The images of an archive that could be read."""

    images: Tensor
    """(N, 1, size, size) uint8, in the order of the names."""
    kept: list[int]
    """Which of the names they are."""
    report: dict[str, Any]
    """Images that were dropped: how many for each reason, and the first of them by name."""


def decode(content: bytes, *, size: int, invert: bool, pad: bool) -> Pixels:
    """(size, size) uint8 of a PNG, JPEG or TIFF file: grey, upright, on white paper.

    16 bits are scaled to 8. Resized by a triangle as wide as the step between pixels, old or new, whichever is larger: it
    averages where it shrinks, and never rings, so that no pixel is lighter or darker than all of the picture.

    Args:
        invert, pad: see Shape; the paper is the median of the pixels at the picture's border.

    Raises:
        Unreadable: these bytes are no whole picture, or one of more than MEGAPIXELS.
    """
    if content.startswith(_PNG):
        _check_png(content)
    grey = _grey(content)
    if not pad:
        pixels = _resized(grey, size, size)
    else:
        scale = size / max(grey.size)
        inner = _resized(grey, max(1, round(grey.width * scale)), max(1, round(grey.height * scale)))
        pixels = np.full((size, size), _paper(np.asarray(grey)), np.uint8)
        top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
        pixels[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return 255 - pixels if invert else pixels


def look(content: bytes) -> Look:
    """How a PNG, JPEG or TIFF file looks. Raises Unreadable as `decode` does."""
    if content.startswith(_PNG):
        _check_png(content)
    grey = _grey(content)
    return Look(grey.width, grey.height, _paper(np.asarray(grey)))


def read_all(
    archive: Path,
    members: zips.Members,
    *,
    size: int,
    invert: bool,
    pad: bool,
    strict: bool,
    refused: list[tuple[str, str]] | None = None,
) -> Read:
    """The pictures of an archive, decoded by as many processes as there are cores; how many there are changes no bit.

    Args:
        members: at least one, or some in `refused`.
        strict: True: an unreadable image is an error; False: it is dropped, unless more than one in TOLERATED are.
        refused: (name, reason) of images that the caller cannot use; they count as unreadable.

    Raises:
        UserError: there is no image; one is unreadable and `strict`; too many are; one is larger than the archive says; the
            archive cannot be read, or the images do not fit into memory.
    """
    refused = refused or []
    if not members.names and not refused:
        raise UserError(f"{archive} holds no image ({' '.join(zips.SUFFIXES)})")
    if strict and refused:
        raise _unreadable(archive, *min(refused))
    images, outcome = _decode_all(archive, members, Shape(size, invert, pad), strict)
    bad = [(members.names[i], OUTCOMES[outcome[i]]) for i in (outcome > FINE).nonzero()[0]]
    for name, reason in bad:
        if strict or reason in NEVER:
            raise _unreadable(archive, name, reason)
    bad = sorted(bad + refused)
    reasons = dict(sorted(Counter(reason for _, reason in bad).items()))
    if len(bad) * TOLERATED > len(members.names) + len(refused):
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise UserError(
            f"{archive}: {len(bad)} of {len(members.names) + len(refused)} images are unreadable ({counts}), the first is "
            f"{bad[0][0]!r}; up to one in {TOLERATED} would be dropped: are these the right files?"
        )
    kept = (outcome == FINE).nonzero()[0]
    report = {"dropped": reasons, "dropped_files": [f"{name}: {reason}" for name, reason in bad[:NAMED]]}
    return Read(to_front(images, torch.from_numpy(kept)), kept.tolist(), report)


def _unreadable(archive: Path, name: str, reason: str) -> UserError:
    return UserError(f"{archive}: {name!r}: {reason}" + ("" if reason in NEVER else "; with strict: false it would be dropped"))


# One picture


def _check_png(content: bytes) -> None:
    """Raise Unreadable unless the chunks are whole, as their checksums say, and end with IEND: Pillow overlooks some of it."""
    view, at, kind = memoryview(content), len(_PNG), b""
    while kind != b"IEND":
        if at + 12 > len(content):
            raise Unreadable(CUT_OFF)
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            raise Unreadable(CUT_OFF)
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise Unreadable(DAMAGED)
        at = end + 4
    if content[12:16] == b"IHDR" and bytes(4) in (content[16:20], content[20:24]):
        raise Unreadable(NO_PIXELS)


def _grey(content: bytes) -> Image.Image:
    """A picture in mode L."""
    quiet = _libtiff_silenced() if content.startswith(_TIFF) else nullcontext()
    with quiet, warnings.catch_warnings(action="ignore"):  # of odd metadata, and of sizes, which are checked here
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_header(image)
                if image.format != "PNG" or "exif" in image.info:
                    ImageOps.exif_transpose(image, in_place=True)
                return _converted(image)
        except Unreadable:
            raise
        except Exception as error:  # Pillow says nowhere what it raises on garbage, and it is nearly everything
            raise Unreadable(_reason(content, error)) from None


@contextmanager
def _libtiff_silenced() -> Iterator[None]:
    """Without standard error: libtiff writes there by itself, and in C, what is wrong with a file."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_header(image: Image.Image) -> None:
    """Raise Unreadable for what is not worth decoding."""
    if not image.width * image.height:
        raise Unreadable(NO_PIXELS)
    if image.width * image.height > MEGAPIXELS * 10**6:
        raise Unreadable(TOO_LARGE)
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with a preview, as cameras write it
        raise Unreadable(SEVERAL)
    if image.mode in ("I", "F"):
        raise Unreadable(DEPTH)


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(image))
    if image.mode == "LAB":
        return image.getchannel("L")
    if image.mode in ("La", "RGBa"):  # colours multiplied by their alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L")


def _scaled(image: Image.Image) -> Pixels:
    """(H, W) uint8 of a picture of 16-bit grey, or of 12-bit in TIFF; white is the largest value."""
    tags: Any = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(_BITS, (16,))[0] - 1
    values: NDArray[np.uint32] = np.asarray(image).astype(np.uint32)
    if (clear := image.info.get("transparency")) is not None:
        values[values == clear] = white
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        values = white - values
    pixels: Pixels = ((values * 255 + white // 2) // white).astype(np.uint8)
    return pixels


def _reason(content: bytes, error: Exception) -> str:
    if not content:
        return EMPTY
    if isinstance(error, Image.DecompressionBombError):
        return TOO_LARGE
    if isinstance(error, UnidentifiedImageError) and not content.startswith(_STARTS):
        return UNKNOWN
    return CUT_OFF if "truncated" in str(error) else DAMAGED


def _resized(grey: Image.Image, width: int, height: int) -> Pixels:
    return np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR))


def _paper(grey: Pixels) -> int:
    """The median of the pixels at the border; the upper one of two."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return int(np.partition(border, len(border) // 2)[len(border) // 2])


# Many pictures


def _decode_all(archive: Path, members: zips.Members, shape: Shape, strict: bool) -> tuple[Tensor, NDArray[np.uint8]]:
    """(N, 1, size, size) uint8, and for each image its place in OUTCOMES; with `strict` it may end at the first bad one.

    By processes, which write into memory that they share: threads would wait for the GIL most of the time, and a decoder that
    crashes would take the stage with it.
    """
    N, workers = len(members.names), max(1, min(_cores(), -(-len(members.names) // CHUNK)))
    try:
        file = os.open(archive, os.O_RDONLY)
        # No file in /dev/shm, which containers often have little of.
        images = _shared((N, 1, shape.size, shape.size))
        outcome = _shared((N,))
    except OSError as error:
        raise UserError(f"{archive}: {N} images of {shape.size} x {shape.size} pixels: {error.strerror or error}") from None

    def work(worker: int) -> Iterator[int]:
        """Every so manieth chunk, after each of which it says how many images that were."""
        for start in range(worker * CHUNK, N, workers * CHUNK):
            if strict and (outcome[:start] > FINE).any():
                return
            chunk = range(start, min(start + CHUNK, N))
            for i in chunk:
                outcome[i] = BUSY
                outcome[i] = _outcome(file, members.places[i], images[i, 0], shape)
            yield len(chunk)

    bar = partial(tqdm, total=N, desc="decode", unit="images", unit_scale=True, disable=None, leave=False)
    try:
        if workers > 1:
            _in_processes(work, workers, archive, members.names, outcome, bar)
        else:
            with bar() as shown:
                for done in work(0):
                    shown.update(done)
    finally:
        os.close(file)
    return torch.from_numpy(images), outcome


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere a forked process may not go on


def _shared(shape: tuple[int, ...]) -> Pixels:
    """Zeros in memory that is shared with the processes forked from this one."""
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8, size).reshape(shape)


def _outcome(file: int, place: NDArray[np.int64], target: Pixels, shape: Shape) -> int:
    """Decode one image into `target`; its place in OUTCOMES."""
    try:
        target[:] = decode(zips.content(file, place), **shape._asdict())
    except (Unreadable, zips.Damaged) as error:
        return OUTCOMES.index(str(error))
    except OSError:
        return OUTCOMES.index(DISK)
    return FINE


def _in_processes(
    work: Callable[[int], Iterator[int]],
    workers: int,
    archive: Path,
    names: list[str],
    outcome: NDArray[np.uint8],
    bar: Callable[[], "tqdm[Any]"],
) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_worker, args=(work, worker, os.getpid()), daemon=True) for worker in range(workers)]
    started = []
    try:
        for process in processes:
            process.start()
            started.append(process)
        with bar() as shown:
            while running := [process.sentinel for process in processes if process.exitcode is None]:
                wait(running, timeout=0.2)
                shown.update(int(np.count_nonzero(outcome)) - shown.n)
                for worker, process in enumerate(processes):
                    if process.exitcode:
                        raise _died(process.exitcode, archive, [names[i] for i in _busy(outcome, worker, workers)])
    finally:
        for process in started:
            process.kill()
            process.join()


def _worker(work: Callable[[int], Iterator[int]], worker: int, parent: int) -> None:
    gc.freeze()  # a collection would write to all pages of the parent, and so copy them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for _ in work(worker):
        if os.getppid() != parent:  # killed
            return


def _busy(outcome: NDArray[np.uint8], worker: int, workers: int) -> list[int]:
    """The image that a worker is at."""
    return [i for i in (outcome == BUSY).nonzero()[0].tolist() if i // CHUNK % workers == worker]


def _died(exitcode: int, archive: Path, names: list[str]) -> Exception:
    at = f"{archive}: {' '.join(map(repr, names))}"
    if exitcode < 0:
        return UserError(f"{at}: the process that decoded it was killed by signal {-exitcode}")
    return RuntimeError(f"{at}: the process that decoded it ended with exit code {exitcode}")
