"""What stages measured with a clock: in files that git and DVC do not see, each under what its stage was run with.

Results in git hold nothing that a clock says. A result that DVC restores is that of an earlier run with the same code, parameters
and data, so it finds the clocks of that run.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from stages.errors import UserError, damaged, sound
from stages.pipeline import dvc_forms, params, paths
from stages.pipeline.files import content_hash, md5, read_json, write_json

Clocks = dict[str, Any]
"""`seconds` and whatever else the stage measured; `by_step`, a list of such with `step`, for a training."""


def write(stage: str, item: str, measured: Clocks) -> None:
    """Keep what a stage measured, for its dataset, training or cell, with the inputs that are here now."""
    write_json(path_of(stage, item, now(stage, item)), measured)


def now(stage: str, item: str) -> dict[str, Any]:
    """What a stage would be run with now, in the form of its entry in dvc.lock."""
    section, loaded = dvc_forms.stages()[stage], params.load()
    deps = [{"path": path, "md5": md5(Path(path))} for path in paths.deps(section, item, loaded.model_dump())]
    return {"deps": deps, "params": {str(params.PARAMS): dvc_forms.params_of(section, item, loaded)}}


def read(stage: str, item: str, entry: dict[str, Any]) -> Clocks:
    """What was measured when a stage was run with the inputs of an entry; nothing where that was elsewhere, or long ago.

    No result needs it, so a damaged file is told and counts as none.

    Args:
        entry: of dvc.lock, or `now`.
    """
    path = path_of(stage, item, entry)
    return _read(path) if path.exists() else {}


def expected(name: str, what: str) -> float | None:
    """What a stage measured last, here; else on the same dataset, else on any; None where it was never run: see `latest`."""
    found = latest(name, what)
    return found and found[1]


def latest(name: str, what: str) -> tuple[str, float] | None:
    """The same with the stage that measured it.

    Args:
        name: as DVC has it, train@mnist-cosine-0.
        what: seconds, or peak_memory_mib.
    """
    stage, _, item = name.partition("@")
    for pattern in (f"{item}.*", f"{item.partition('-')[0]}[.-]*", "*"):
        for path in sorted(_folder(stage).glob(pattern), key=lambda file: file.stat().st_mtime, reverse=True):
            found = _read(path).get(what)
            if isinstance(found, int | float):
                return paths.stage_name(stage, path.name.partition(".")[0]), float(found)
    return None


def _folder(stage: str) -> Path:
    return dvc_forms.workspace() / ".state" / "clocks" / stage


def path_of(stage: str, item: str, entry: dict[str, Any]) -> Path:
    """The file of what was measured when a stage was run with the inputs of an entry."""
    deps = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
    values = json.loads(json.dumps(entry.get("params")), parse_int=float)  # dvc.lock has 1 where the schema makes 1.0 of it
    return _folder(stage) / f"{item}.{content_hash([deps, values])[:16]}.json"


def _read(path: Path) -> Clocks:
    try:
        found = dict(read_json(path))
        with sound(path):
            numbers = [found.get("seconds", 0), *(dict(point)["step"] for point in found.get("by_step", []))]
        if not all(isinstance(number, int | float) for number in numbers):
            raise damaged(path, "it is no record of a stage")
        return found
    except UserError as error:
        _tell(str(error))
        return {}


@functools.cache
def _tell(line: str) -> None:
    """Print a line on stderr, once."""
    print(line, file=sys.stderr, flush=True)
