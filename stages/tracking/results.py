"""What the files say of a cell: one flat row of numbers, the loss curve, what clocks said, and the table of a sweep."""

import csv
import io
import math
from collections.abc import Iterable
from typing import Any

from stages.errors import UserError, damaged, sound
from stages.pipeline import clocks as timed
from stages.pipeline import dvc_forms, paths
from stages.pipeline.files import read_json
from stages.pipeline.params import Cell
from stages.tracking.provenance import Machines, Tree

IDENTITY = ("cell", "dataset", "schedule", "T", "seed", "network")
CLOCKED = ("train", "sample", "evaluate")

# Heading of the table, key of the row, format.
_COLUMNS = (
    ("FID", "fid", ".4g"),
    ("+-", "fid_error", ".2g"),
    ("floor", "fid_floor", ".4g"),
    ("acc", "accuracy", ".1%"),
    ("conf", "confident", ".1%"),
    ("bits/dim", "bits_per_dim", ".3f"),
    ("train", "train_seconds", ".0f"),
    ("fast", "fast_seconds_per_image", ".3f"),
    ("all T", "ancestral_seconds_per_image", ".3f"),
)
_LEGEND = """\
FID of the fast set and its error (about twice too wide; it says nothing of another training). floor:
FID of as many validation images. acc: share of samples recognised as the requested class; conf: share
that the classifier gives any class with at least 0.9 probability. bits/dim: variational bound.
train: seconds; fast, all T: seconds per image with few steps and with all T; -: not measured here."""


def row(cell: Cell) -> dict[str, Any]:
    """Everything measured of a cell but what a clock says, flat: scores under their names.

    A score `{value, error, floor}` becomes `name`, `name_error`, `name_floor`; those of the ancestral set start with
    `ancestral_`; losses on the log-SNR grid are `name_at_LOGSNR`. Raises UserError when the cell is not evaluated yet.
    """
    path = paths.scores("evaluate", str(cell))
    if not path.exists():
        raise UserError(f"cell {cell} has no {path}; `dvc repro evaluate@{cell}` makes it")
    scores = read_json(path)
    with sound(path):
        return _flat(cell, scores)


def _flat(cell: Cell, scores: dict[str, Any]) -> dict[str, Any]:
    identity = (str(cell), cell.dataset, cell.schedule, cell.T, cell.seed, scores.get("network", "own"))
    flat: dict[str, Any] = dict(zip(IDENTITY, identity, strict=True))
    flat |= _numbers("", scores["fast"]) | _numbers("", {key: value for key, value in scores.items() if key != "fast"})
    for point in scores["logsnr_grid"]:
        flat |= {f"{key}_at_{point['logsnr']:g}": value["value"] for key, value in point.items() if key != "logsnr"}
    for kind in ("fast", "ancestral"):
        flat[f"{kind}_evaluations"] = scores[kind]["sampling"]["network_evaluations"]
    return flat


def not_measured(cell: Cell) -> dict[str, str]:
    """Why scores of the fast set are missing, each by its name."""
    path = paths.scores("evaluate", str(cell))
    with sound(path):
        return dict(read_json(path)["fast"].get("not_measured", {}))


def why_missing(cells: Iterable[Cell]) -> list[str]:
    """A line for each dataset and reason why scores of its fast sets, or their floors, are missing."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        for name, why in not_measured(cell).items():
            score = "FID" if (of := name.removesuffix("_floor")) == "fid" else of
            what = f"floor of {score}" if name.endswith("_floor") else score
            found.setdefault((cell.dataset, why), {})[what] = None
    return [f"{dataset} has no {', no '.join(names)}: {why}" for (dataset, why), names in found.items()]


def machines(cell: Cell) -> Machines:
    """What machines made a cell, by its scores."""
    path = paths.scores("evaluate", str(cell))
    with sound(path):
        return dict(read_json(path)["machines"])


def clocks(tree: Tree, cell: Cell, *, fresh: str = "") -> tuple[dict[str, float], list[dict[str, float]]]:
    """What was measured with a clock when the files of a cell were made, where that was here: as `STAGE_NAME`; and by step.

    `fresh`: a stage that ended just now, so that dvc.lock does not know it yet.
    """
    flat: dict[str, float] = {}
    by_step: list[dict[str, float]] = []
    for stage in CLOCKED:
        item = paths.item_of(tree.stages[stage], str(cell))
        entry = timed.now(stage, item) if stage == fresh else dvc_forms.recorded(tree.lock, f"{stage}@{item}")
        found = timed.read(stage, item, entry)
        flat |= _numbers(f"{stage}_", found)
        by_step += [_numbers("", point) for point in found.get("by_step", [])]
    for kind in ("fast", "ancestral"):
        if rate := flat.get(f"sample_{kind}_images_per_sec"):
            flat[f"{kind}_seconds_per_image"] = 1 / rate
    return flat, by_step


def loss_curve(cell: Cell) -> list[dict[str, float]]:
    """The rows of the loss curve of a cell's network; a value that was not measured in a row is left out of it."""
    path = paths.loss_curve(str(cell.training))
    if not path.exists():
        raise UserError(f"cell {cell} has no {path}; `dvc repro train@{cell.training}` makes it")
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
        found = [{key: float(value) for key, value in row.items() if value or key in ("step", "images")} for row in rows]
        if not text.endswith("\n") or not rows or not {"step", "images"} <= found[0].keys():
            raise ValueError("it is cut off")
        if not all(math.isfinite(value) for row in found for value in row.values()):
            raise ValueError("a value is not finite")
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise damaged(path, error) from None
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as plain text, at most 100 columns wide, with a legend."""
    lines = [["cell", *(heading for heading, _, _ in _COLUMNS)]]
    for row in rows:
        lines.append(
            [
                row["cell"] + " (shared)" * (row["network"] == "shared"),
                *(format(row[key], spec) if key in row else "-" for _, key, spec in _COLUMNS),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], _LEGEND])


def _numbers(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        name = prefix.removesuffix("_") if key == "value" else prefix + key
        if isinstance(value, dict) and key != "sampling":
            flat |= _numbers(f"{name}_", value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
    return flat
