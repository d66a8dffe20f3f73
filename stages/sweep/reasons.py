"""Why stages are out of date, in one line for each kind of stage, from what `dvc status` says and dvc.lock records.

DVC calls a file modified that a stage did not read before. Where a parameter now names another sampler, the reason is that
choice, not a change of the file.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.errors import masked
from stages.pipeline import dvc_forms, inputs
from stages.tracking.provenance import Tree

MOST = 3  # reasons of a line
ABSENT = ("deleted", "not in cache")  # as DVC says of a result
MISSING = "results are not here"
LONGEST = 60  # characters of a value


def lines(status: dict[str, list[Any]], tree: Tree, order: Iterable[str]) -> Iterator[str]:
    """A line for each kind of stage that is out of date, or for several that are so for the same reasons.

    Cells of which DVC says the same count as one: to parse the records of all takes long.

    Args:
        status: what `dvc status --json` says.
        order: the stages, with their dataset or cell, in the order of the lines.
    """
    values = tree.params.model_dump(exclude_unset=True)  # as DVC sees them
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name in order:
        stage, _, item = name.partition("@")
        kind = f"{stage} {json.dumps(status.get(name)).replace(item or name, '*')} {name in tree.lock}"
        if name in status and kind not in seen:
            known = found.setdefault(stage, [])
            known += [
                reason
                for reason in _reasons(status[name], dvc_forms.recorded(tree.lock, name), values, item)
                if reason not in known
            ]
        seen.add(kind)
    alike: dict[str, list[str]] = {}
    for stage, known in filter(lambda each: each[1], found.items()):
        more = [f"and {len(known) - MOST} more"] * (len(known) > MOST)
        alike.setdefault(", ".join(known[:MOST] + more), []).append(stage)
    yield from (masked(f"  {', '.join(stages)}: {why}") for why, stages in alike.items())


def _reasons(changes: list[Any], recorded: dict[str, Any], values: dict[str, Any], item: str) -> Iterator[str]:
    """What changed for one stage since it was recorded: parameters, code, then data."""
    if not recorded:
        yield "not run yet"
        return
    found: dict[str, Any] = {}
    for change in changes:  # "changed command", or the states of deps or outs by their paths
        if isinstance(change, str):
            yield change
        else:
            found |= {path: state for states in change.values() for path, state in states.items()}
    was = (recorded.get("params") or {}).get(inputs.PARAMS, {})
    chosen = []
    for name, state in found.pop(inputs.PARAMS, {}).items():
        for key, then, now in inputs.compared(name, was[name], inputs.at(values, name)) if name in was else ():
            chosen.append(str(now))
            yield f"{key} is now {_short(now)} (was {_short(then)})"
        if name not in was:
            yield f"{name} is {state}"
    read = {file["path"] for file in (*recorded.get("deps", []), *recorded.get("outs", []))}
    shown = _places(item)
    missing = [path for path, state in found.items() if state in ABSENT and not path.endswith(".py")]
    for path, state in sorted(found.items(), key=lambda file: not file[0].endswith(".py")):
        if path in missing:
            continue
        if path in read:
            yield f"{_general(path, shown)} is {state}"
        elif Path(path).stem not in chosen:
            yield f"{path} is a new input"
    if missing:
        yield MISSING


def _places(item: str) -> dict[str, str]:
    """What stands in the paths of a stage for its dataset, its network and its cell, longest first."""
    parts = item.split("-")
    if len(parts) == 4:
        return {item: "CELL", "-".join([*parts[:2], parts[3]]): "NETWORK", parts[0]: "DATASET"}
    return {item: "NETWORK", parts[0]: "DATASET"} if len(parts) == 3 else {item: "DATASET"} if item else {}


def _general(path: str, shown: dict[str, str]) -> str:
    """A path that is the same for all of a kind of stage; code keeps its name."""
    if not path.endswith(".py"):
        for name, word in shown.items():
            path = re.sub(rf"(?<=/){re.escape(name)}(?=[/.])", word, path)
    return path


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
