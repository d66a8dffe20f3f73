"""The files on a person's disk that datasets are made from: where they are, and whether they changed since they were fetched."""

import os
from pathlib import Path
from typing import Any

from stages.pipeline import params
from stages.pipeline.provenance import content_hash, workspace
from stages.pipeline.stage import read_json, write_json

Seen = dict[str, list[Any]]
"""For each path: how many files are there, and a hash of their names, sizes and times."""


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    """A section of params.yaml: data with every `path` absolute: ~ is the home folder, relative ones start at the repository."""
    found: dict[str, Any] = {name: resolved(value) if isinstance(value, dict) else value for name, value in options.items()}
    if found.get("path"):
        found["path"] = str(workspace() / Path(found["path"]).expanduser())
    return found


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


def remember(dataset: str, seen: Seen) -> None:
    """Keep what `look` saw, when a fetch that began then has succeeded."""
    write_json(_memory(dataset), seen)


def changed(loaded: params.Params) -> list[str]:
    """A line for each swept dataset whose files are no longer those of its last fetch here, with the command that fetches them."""
    lines = []
    for dataset in loaded.sweep.datasets:
        if not _memory(dataset).exists():
            continue
        before, now = read_json(_memory(dataset)), look(resolved(loaded.data[dataset].model_dump()))
        for path in before.keys() & now.keys():
            (files_before, hash_before), (files, hash_now) = before[path], now[path]
            if hash_before != hash_now:
                same = f"{files} files, other names, sizes or times"
                what = same if files == files_before else f"{files_before} files then, {files} now"
                lines.append(f"{path} changed since {dataset} was fetched ({what}); `dvc repro -f fetch@{dataset}` takes it in")
    return lines


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


def _memory(dataset: str) -> Path:
    return workspace() / ".state" / "sources" / f"{dataset}.json"
