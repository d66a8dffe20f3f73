"""What a stage was started with: its code, its sections of params.yaml, its data. DVC records what it finds in the end.

Imported before anything of the stage is, so that no change of a file goes unseen. Imports the standard library alone.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARAMS = "params.yaml"


class Inputs:
    """The inputs of the stage that DVC runs in this process, as they were when this module was imported."""

    def __init__(self) -> None:
        files = [Path(PARAMS), *sorted(Path("stages").rglob("*.py"))] if "DVC_STAGE" in os.environ else []
        self.content = {str(path): path.read_bytes() for path in files if path.is_file()}
        self.data: dict[str, list[tuple[str, int, int]]] = {}

    def look(self) -> None:
        """See how the data that the stage reads look: names, sizes, times."""
        self.data = {path: list(_listing(Path(path))) for path in self._deps() if path not in self.content}

    def changed(self) -> list[str]:
        """What is no longer as it was: files of code, dotted names of parameters with both values, paths of data."""
        found = []
        for path in self._deps():
            code = path in self.content and self.content[path] != _bytes(path)
            if code or (path in self.data and self.data[path] != list(_listing(Path(path)))):
                found.append(path)
        if PARAMS in self.content and self.content[PARAMS] != (now := _bytes(PARAMS)):
            try:
                found += _differences(self.content[PARAMS], now)
            except ValueError:  # it cannot be read any more
                found.append(PARAMS)
        return found

    def _deps(self) -> list[str]:
        """The deps of this stage, with the choices of params.yaml as it was; none where DVC runs no stage here."""
        from stages.pipeline import params, paths

        stage, item = _stage()
        if not stage or PARAMS not in self.content:
            return []
        return paths.deps(stage, item, params.parse_yaml(self.content[PARAMS].decode("utf-8-sig"), Path(PARAMS)))


def _stage() -> tuple[dict[str, Any], str]:
    """The section of this stage in dvc.yaml, and its dataset or cell; empty where DVC runs no stage here."""

    from stages.pipeline import dvc_forms, processes

    name, item = processes.dvc_stage()
    return (dvc_forms.stages().get(name, {}) if name else {}), item


def _differences(before: bytes, now: bytes) -> Iterator[str]:
    from stages.pipeline import params, paths

    then, new = (params.parse_yaml(text.decode(), Path(PARAMS)) for text in (before, now))
    stage, item = _stage()
    for name in (paths.of_item(entry, item) for entry in stage.get("params", [])):
        yield from (f"{key} from {before} to {after}" for key, before, after in compared(name, at(then, name), at(new, name)))


def compared(name: str, then: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of a parameter differ: dotted names, each with the value before and after, None where there is none."""
    if isinstance(then, dict) and isinstance(new, dict):
        for key in [*then, *(new.keys() - then.keys())]:
            yield from compared(f"{name}.{key}", then.get(key), new.get(key))
    elif then != new:
        yield name, then, new


def at(values: Any, dotted: str) -> Any:
    """The value of a dotted name in nested mappings; None where there is none."""
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes() if Path(path).is_file() else b""


def _listing(path: Path) -> Iterator[tuple[str, int, int]]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name != ".gitignore":
            stat = file.stat()
            yield str(file), stat.st_size, stat.st_mtime_ns


STARTED = Inputs()
