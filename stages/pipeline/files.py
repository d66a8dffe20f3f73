"""Files that appear whole or not at all, JSON that is checked when read, hashes, locks."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.errors import Held, UserError, damaged
from stages.fidelity.rounding import rounded


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock file; wait, and say so, while another process does: never two writers. A killed process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"another process makes the same ({path.stem}); waiting for it to end", file=sys.stderr, flush=True)
        held = lock.acquire()
    with held:
        yield


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file now."""
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path`, on disk, only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.stem}.partial{path.suffix}"  # one name, so that what a kill leaves is overwritten
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file it is about
        raise
    finally:
        with contextlib.suppress(OSError):  # what is wrong with the folder is told already
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it becomes `path`, replacing it, only when the block ends without an error."""
    temporary = path.parent / f".{path.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; each file in it moves to `folder` when the block ends without an error. Others there stay."""
    filled = folder.parent / f".{folder.name}.files"
    try:
        with whole_folder(filled) as filling:
            yield filling
        folder.mkdir(parents=True, exist_ok=True)
        for file in filled.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(filled, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file, whole, ending in a newline. Raises UserError for NaN and infinity: they are not JSON.

    Fractions keep the digits of stages/fidelity/rounding.py.
    """
    try:
        text = json.dumps(rounded(value), allow_nan=False, indent=2, ensure_ascii=False)
    except ValueError as error:
        raise UserError(f"{path} is not written: {error}") from None
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_archive(path: Path, folder: Path) -> None:
    """Write the files below a folder to one zip archive, whole, uncompressed; the same files give the same bytes."""
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(found for found in folder.rglob("*") if found.is_file()):
            info = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
            info.create_system, info.file_size = 3, file.stat().st_size
            with file.open("rb") as source, archive.open(info, "w") as target:
                shutil.copyfileobj(source, target, 2**20)


def read_json(path: Path) -> Any:
    """The mapping that a JSON file holds. Raises UserError when it is missing or damaged, and when a name in it is missed."""
    try:
        text = path.read_text(encoding="utf-8")
        if re.search(r"^(<<<<<<<|>>>>>>>) ", text, re.MULTILINE):
            raise ValueError("it has conflict markers of git")
        value = json.loads(text, object_hook=lambda found: Held(path, found), parse_constant=_refuse)
        if not isinstance(value, dict):
            raise ValueError("it holds no mapping")
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except (OSError, ValueError, RecursionError) as error:  # what is no UTF-8 is a ValueError too
        raise damaged(path, error) from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def content_hash(value: Any) -> str:
    """SHA-256, in hexadecimal, of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def md5(path: Path) -> str:
    """MD5 of a file, as DVC takes it; empty when there is no such file."""
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""


def sha256(path: Path) -> str:
    """SHA-256 of a file; empty when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
