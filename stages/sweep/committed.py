"""Whether the results here are those that git holds, to the bit; and where not, how far they lie from them."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from stages.errors import UserError
from stages.pipeline import dvc_forms, paths
from stages.pipeline.params import Cell
from stages.tracking import git
from stages.tracking.provenance import Tree

MOST = 4  # cells that are told one by one


def lines(tree: Tree, cells: Sequence[Cell]) -> Iterator[str]:
    """What to say of finished cells of which git holds results; nothing where it holds none."""
    committed = git.git("show", f"HEAD:./{dvc_forms.LOCK}")
    before = dvc_forms.lock_entries((committed or "").replace("\r\n", "\n"))
    cells = [cell for cell in cells if f"evaluate@{cell}" in before]
    if not cells:
        return
    others = [cell for cell in cells if _outputs(tree, before, cell) != _outputs(tree, tree.lock, cell)]
    yield f"{len(cells) - len(others)} of {len(cells)} cells have the committed bits."
    for cell in others[:MOST]:
        yield f"  {cell}: {_distance(cell)}"
    if len(others) > MOST:
        yield f"  and {len(others) - MOST} more"


def _outputs(tree: Tree, lock: dict[str, str], cell: Cell) -> dict[str, str]:
    """MD5 of all that the stages of a cell wrote, by its path."""
    try:
        names = [paths.stage_name(name, paths.item_of(stage, str(cell))) for name, stage in tree.stages.items()]
        entries = [dvc_forms.recorded(lock, name) for name in names]
    except UserError:
        return {}
    return {out["path"]: out["md5"] for entry in entries for out in entry.get("outs", [])}


def _distance(cell: Cell) -> str:
    path = paths.scores("evaluate", str(cell))
    try:
        before, now = (json.loads(text) for text in (git.git("show", f"HEAD:./{path}") or "", path.read_text()))
        machines = f"; committed ones were made on {_processors(before)}" if _processors(before) != _processors(now) else ""
        return _told(before["fast"]["fid"], now["fast"]["fid"]) + machines
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "git holds no score of it that compares"


def _processors(scores: dict[str, Any]) -> str:
    found = {machine["processor"]: "" for stage in scores.get("machines", {}).values() for machine in stage}
    return ", ".join(found) or "a processor that is not recorded"


def _told(before: dict[str, Any], now: dict[str, Any]) -> str:
    said = f"FID {now['value']:.4g}, committed {before['value']:.4g}"
    error = math.hypot(before["error"], now["error"])
    return f"{said}: {abs(now['value'] - before['value']) / error:.1f} standard errors apart" if error else said
