"""The files on a person's disk that datasets are made from: where they are, what was fetched of them, what changed since."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.drawing import place
from stages.errors import UserError, sound
from stages.pipeline import params
from stages.pipeline.dvc_forms import outputs, read_lock, recorded, workspace
from stages.pipeline.files import content_hash, md5, read_json, write_json

Seen = dict[str, list[Any]]
"""For each path: how many files are there, and a hash of their names, sizes and times."""

UNREADABLE = object()
DECISIVE = ("reader", "path", "url", "drive", "sha256")  # options that decide which raw files are fetched


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    """A section of params.yaml: data with every `path` absolute: ~ is the home folder, relative ones start at the repository.

    Raises UserError where there is no such home folder, or where links lead in a circle.
    """
    found: dict[str, Any] = {name: resolved(value) if isinstance(value, dict) else value for name, value in options.items()}
    if found.get("path"):
        try:
            found["path"] = str(workspace() / Path(found["path"]).expanduser())
        except RuntimeError:  # no HOME, or nobody of the name after ~
            raise UserError(f"path = {found['path']}: that home folder is unknown here; write the path without ~") from None
        try:
            with contextlib.suppress(ValueError):  # a zero in it: there is no such file, which is told elsewhere
                Path(found["path"]).resolve()
        except RuntimeError:
            raise UserError(f"path = {found['path']}: its links lead in a circle") from None
    return found


def refuse_outputs(dataset: str, data: params.DataSection) -> None:
    """Refuse a source that is, contains or lies inside what a stage writes: DVC deletes that before the stage runs.

    Raises:
        UserError: naming the key, the path and the output; links are followed.
    """
    written = [(out, (workspace() / out).resolve()) for out in outputs(params.load())]
    for key, section in params.parts(f"data.{dataset}", data):
        if not (path := resolved(section.model_dump()).get("path")):
            continue
        source = Path(path).resolve()
        for out, written_at in written:
            if source == written_at or source in written_at.parents or written_at in source.parents:
                how = "is" if source == written_at else "contains" if source in written_at.parents else "lies inside"
                raise UserError(
                    f"{key}.path = {section.path} {how} {out}, which a stage writes and DVC deletes; "
                    "keep your files in a folder of their own, outside of data/, models/, samples/ and metrics/"
                )


def refuse_missing(dataset: str, data: params.DataSection) -> None:
    """Refuse a source that is not there, before anything runs, unless it was fetched from here, or elsewhere by dvc.lock.

    Raises:
        UserError: naming the key and the path.
    """
    was, now = _recorded_value(f"fetch@{dataset}", f"data.{dataset}"), data.model_dump()
    if was is UNREADABLE or (was and _decisive(was) == _decisive(now)):
        return
    before = _recall(dataset).get("seen", {})
    for key, section in params.parts(f"data.{dataset}", data):
        path = resolved(section.model_dump()).get("path")
        if path and path not in before and not _is_there(path):
            raise UserError(f"{key}.path = {section.path}: there is no such file or folder")


def file_to_begin_with(named: str) -> Path:
    """The file of weights that `train.init` names: a cell's, or one by its path. Raises UserError where it is not there."""
    if named.endswith(".safetensors"):
        path = Path(resolved({"path": named})["path"])
    elif cell := place.named(named):
        path = workspace() / place.network(cell.training) / place.EMA
    else:
        raise UserError(f"train.init = {named} is no cell and no .safetensors file; {_networks()}")
    if not path.is_file():
        raise UserError(f"train.init = {named}: {path} is missing; {_networks()}")
    return path


def _networks() -> str:
    names = sorted(path.parent.name for path in (workspace() / place.network("")).glob(f"*/{place.EMA}"))
    return f"networks that are here: {', '.join(names)}" if names else "no network was trained here yet"


def remember_weights(named: str, path: Path) -> None:
    """Remember what was taken of a file that `train.init` names."""
    write_json(_memory("train.init"), {"named": named, "md5": md5(path)})


def refuse_missing_weights(loaded: params.Params) -> None:
    """Refuse a train.init that is not there, before anything runs, unless its weights were taken before, by dvc.lock."""
    if loaded.train.init and _recorded_value("init", "train.init") not in (loaded.train.init, UNREADABLE):
        file_to_begin_with(loaded.train.init)


def _recorded_value(stage: str, name: str) -> Any:
    """The value of a parameter with which a stage was last run, by dvc.lock; UNREADABLE where that has to be mended yet."""
    try:
        entry = recorded(read_lock(), stage).get("params") or {}
    except UserError:
        return UNREADABLE
    return entry.get(str(params.PARAMS), {}).get(name)


def _is_there(path: str) -> bool:
    try:
        Path(path).stat()
    except (OSError, ValueError) as error:  # a name may be too long, or hold a zero
        return getattr(error, "errno", None) == errno.EACCES  # which is another mistake, told when it is fetched
    return True


@dataclass(frozen=True)
class Source:
    """What a dataset is fetched from, as it looks now."""

    dataset: str
    way: str
    """Hash of what decides the raw files: the options that say where they are, and the code that fetches them."""
    section: str
    """Hash of all options."""
    seen: Seen

    @classmethod
    def of(cls, dataset: str, options: dict[str, Any]) -> "Source":
        """The source that a resolved section of params.yaml: data names."""
        code = [md5(path) for path in sorted((Path(__file__).parents[1] / "datasets").glob("*.py"))]
        return cls(dataset, content_hash([_decisive(options), code]), content_hash(options), look(options))

    def is_kept(self, raw: Path) -> bool:
        """Whether what was fetched before is still what is asked for; it is brought back to `raw` then.

        That is so when another option changed, or when the source is not there now. It is not when nothing changed at all: then
        the fetch was forced, to take changed files in.
        """
        before = _recall(self.dataset)
        absent = any(files == 0 for files, _ in self.seen.values())
        if before.get("way") != self.way or (before.get("section") == self.section and not absent):
            return False
        bring_back(raw)
        return bool(md5(raw)) and md5(raw) == before.get("md5")

    def remember(self, raw: Path, *, kept: bool = False) -> None:
        """Remember how the source looked when the fetch began, now that it has succeeded; or, if `kept`, at the one before."""
        seen = _recall(self.dataset)["seen"] if kept else self.seen
        write_json(_memory(self.dataset), {"way": self.way, "section": self.section, "seen": seen, "md5": md5(raw)})


def bring_back(raw: Path) -> None:
    """Restore an output that DVC deleted before this stage ran, where its cache has what dvc.lock records."""
    if "DVC_STAGE" in os.environ and not raw.exists():
        subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet", str(raw)], capture_output=True, check=False)


def look(options: dict[str, Any]) -> Seen:
    """How the paths that a resolved section names look now."""
    seen: Seen = {}
    for name, value in options.items():
        if isinstance(value, dict):
            seen |= look(value)
        elif name == "path" and value:
            files = sorted(_listing(Path(value)))
            seen[value] = [len(files), content_hash(files)]
    return seen


def changed(loaded: params.Params) -> list[str]:
    """A line for each swept dataset whose files are no longer those of its last fetch here, with the command that fetches them."""
    lines = []
    for dataset in loaded.sweep.datasets:
        with sound(_memory(dataset)):
            before = {path: tuple(seen) for path, seen in _recall(dataset).get("seen", {}).items()}
        now = look(resolved(loaded.data[dataset].model_dump())) if before else {}
        for path in before.keys() & now.keys():
            (files_before, hash_before), (files, hash_now) = before[path], now[path]
            if files == 0:
                lines.append(f"{path} is not there; {dataset} stays as it was fetched")
            elif hash_before != hash_now:
                same = f"{files} files, other names, sizes or times"
                what = same if files == files_before else f"{files_before} files then, {files} now"
                lines.append(f"{path} changed since {dataset} was fetched ({what}); `dvc repro -f fetch@{dataset}` takes it in")
    return [*lines, *_changed_weights(loaded)]


def _changed_weights(loaded: params.Params) -> Iterator[str]:
    """A line where the file of train.init is another by now; the network of a cell that begins with itself always is."""
    named, before = loaded.train.init, _recall("train.init")
    cell = place.named(named) if named else None
    if named and before.get("named") == named and not (cell and cell.training in map(str, loaded.sweep.trainings())):
        with contextlib.suppress(UserError):  # it is gone, and what was taken of it stays
            if before.get("md5") != md5(file_to_begin_with(named)):
                yield f"{named} changed since trainings began with it; `dvc repro -f init` takes it in"


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """An empty folder that is removed in the end; what a kill leaves of it is removed the next time."""
    folder = Path(".state/scratch") / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk does not say which file it is about
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def unpacked(raw: Path) -> Iterator[Path]:
    """A folder with the files of an archive, for as long as the block lasts. Raises UserError when the archive is damaged."""
    with scratch(f"unpacked-{raw.name}") as folder:
        try:
            with zipfile.ZipFile(raw) as archive:
                archive.extractall(folder)  # checks every CRC, and leads nowhere else
        except FileNotFoundError:
            raise UserError(f"{raw} is missing; `dvc repro` makes it") from None
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
            raise UserError(f"{raw} is damaged ({error}); delete it and run `dvc repro`") from None
        yield folder


def _decisive(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {part: _decisive(inner) for part, inner in value.items()} if name == "of" else value
        for name, value in options.items()
        if name in (*DECISIVE, "of") and value is not None
    }


def _listing(path: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of a file, or of every file below a folder; nothing where there is neither."""
    if path.is_dir():
        return [item for folder, _, names in os.walk(path) for name in names for item in _one(Path(folder, name), path)]
    return _one(path, path.parent)


def _one(file: Path, root: Path) -> list[tuple[str, int, int]]:
    try:
        stat = file.stat()
    except OSError:
        return []
    return [(os.fsencode(file.relative_to(root)).decode(errors="replace"), stat.st_size, stat.st_mtime_ns)]


def _recall(dataset: str) -> dict[str, Any]:
    """What was remembered of a dataset; nothing where it was not fetched here."""
    return dict(read_json(_memory(dataset))) if _memory(dataset).exists() else {}


def _memory(dataset: str) -> Path:
    return workspace() / ".state" / "sources" / f"{dataset}.json"
