"""The frame around every stage: arguments, checked sections of params.yaml, whole outputs, timing, one-line errors."""

import argparse
import contextlib
import errno
import inspect
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from stages import ChangedError, UserError, masked
from stages.fidelity.rounding import rounded
from stages.pipeline import inputs, params, paths, warm

OF_THE_MACHINE = (  # what is wrong with it, not with the code: full, read-only, not allowed, too much open, broken, in the way
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.ENOLCK, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip


@contextlib.contextmanager
def in_one_line(who: str) -> Iterator[None]:
    """End the program with one line and exit code 1 where a mistake of the user or trouble of the machine ends the block."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{who}: {error}")
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{who}: {where}{error.strerror}. When that is mended, run the same command again: it goes on from here")


def run(main: Callable[..., dict[str, Any] | None]) -> None:
    """Run a stage from the command line: `python -m stages.NAME [DATASET | CELL] [--dry-run]`.

    The signature of `main` says what the stage reads. A first parameter `dataset` or `cell` comes from the command line, or from
    DVC, which tells it in DVC_STAGE, where no shell has a part. `data` is that dataset's section of params.yaml; every other
    parameter is the section of its name, and `a__b` is the key `a.b`. What `main` returns was measured with a clock and goes to
    metrics/timing, beside seconds, memory and device.
    """
    stage = Path(sys.argv[0]).stem
    wanted = inspect.signature(main).parameters
    subject = next((kind for kind in ("dataset", "cell") if kind in wanted), None)
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}", description=inspect.getdoc(inspect.getmodule(main)))
    if subject:
        known = told_by_dvc(stage)
        parser.add_argument("name", metavar=subject.upper(), nargs="?" if known else None, default=known)
    parser.add_argument("--dry-run", action="store_true", help="print the checked parameters and stop")
    args = parser.parse_args()
    with in_one_line(stage), _ended_by_ctrl_c():
        arguments = _arguments(params.load(), wanted, subject, getattr(args, "name", None))
        if args.dry_run:
            print(masked(json.dumps(arguments, default=_plain, indent=2)))
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in good order
        if "DVC_STAGE" in os.environ:
            warm.end_with_parents()
        inputs.STARTED.look()
        with _told_to_mlflow(arguments.get("cell"), stage), alone(Path(f".state/locks/{stage}-{getattr(args, 'name', '')}.lock")):
            start = time.perf_counter()
            measured = main(**arguments)
            seconds = time.perf_counter() - start
            if subject:
                write_json(paths.timing(stage, args.name), {**_machine(seconds), **(measured or {})})
            check_unchanged()


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def told_by_dvc(stage: str) -> str | None:
    """The dataset or cell that DVC runs a stage for; None where DVC does not run it."""
    name, _, item = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")
    return item if name == stage and item else None


def check_unchanged() -> None:
    """Refuse to end well where an input of this stage is no longer what it started with. Raises ChangedError, naming each."""
    if changed := inputs.STARTED.changed():
        raise ChangedError(
            f"while this ran, {', '.join(changed)} changed: nothing is recorded; `make repro` runs it with what is there now"
        )


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


@contextlib.contextmanager
def _told_to_mlflow(cell: params.Cell | None, stage: str) -> Iterator[None]:
    """Mark the run of a cell as failed when its stage fails."""
    try:
        yield
    except Exception as error:
        if cell and not inputs.STARTED.changed():  # else the run would be that of what is there now
            from stages.pipeline import tracking  # it imports this module

            reason = str(error) if isinstance(error, UserError) else traceback.format_exc()
            tracking.fail(cell, masked(f"{stage}: {reason}"))
        raise


def _arguments(loaded: params.Params, wanted: Iterable[str], subject: str | None, name: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for key in wanted:
        if key == "dataset":
            if name not in loaded.data:
                raise UserError(f"params.yaml: data has no section {name!r}; it has: {', '.join(loaded.data)}")
            arguments[key] = name
        elif key == "cell":
            arguments[key] = params.find_cell(loaded, str(name))
        elif key == "data":
            arguments[key] = loaded.data[arguments["dataset"] if subject == "dataset" else arguments["cell"].dataset]
        else:
            value: Any = loaded
            for part in key.split("__"):
                value = getattr(value, part)
            arguments[key] = value
    return arguments


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, params.Section) else str(value)


def peak_memory() -> dict[str, int]:
    """The most memory that this process has held so far, in MiB, under the name that the records give it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {"peak_memory_mib": round(peak)}


def _machine(seconds: float) -> dict[str, Any]:
    machine: dict[str, Any] = {"seconds": round(seconds, 2), **peak_memory()}
    if "torch" in sys.modules:
        import torch

        cuda = torch.cuda.is_available()
        machine["device"] = torch.cuda.get_device_name() if cuda else "cpu"
        machine["threads"] = torch.get_num_threads()
        machine["torch"] = torch.__version__
    return machine


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


class Held(dict[str, Any]):
    """What a file holds by name; a name that is missing is told as damage to the file, in one line."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise damaged(self._path, f"it has no {name!r}")


def damaged(path: Path, why: Exception | str) -> UserError:
    """The error that tells of a damaged file, in one line."""
    reason = " ".join(f"{type(why).__name__}: {why}".split() if isinstance(why, KeyError) else str(why).split())
    restore = (
        f"`git checkout {path}`, or delete it and run `dvc repro`"
        if path.parts[:1] in (("metrics",), ("dvc.lock",))
        else "delete it and run `dvc repro`"
    )
    return UserError(f"{path} is damaged ({reason[:200]}); {restore}")


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


@contextlib.contextmanager
def sound(path: Path) -> Iterator[None]:
    """Tell, in one line, that the content of a file is not of the form that the block takes it for."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(path, error) from None


def progress(items: Iterable[Any] = (), *, total: int, unit: str, label: str, initial: int = 0) -> "tqdm[Any]":
    """A bar with a rate and a time left, around the items or updated by hand; silent when stderr is no terminal."""
    return tqdm(items, total=total, initial=initial, unit=unit, desc=label, disable=None, unit_scale=True, leave=False)
