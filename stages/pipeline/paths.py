"""Where every file of a dataset or a cell lives, relative to the root of the working tree; dvc.yaml names the same paths."""

import re
from pathlib import Path
from typing import Any

from stages.drawing import place

AXES = {1: ("dataset",), 3: ("dataset", "schedule", "seed"), 4: ("dataset", "schedule", "T", "seed")}
"""What the parts of a name are: of a dataset, of what all T of a schedule share, of a cell."""


INIT = Path("models/init.safetensors")
"""Weights that trainings begin with, or none."""


def of_item(entry: str, item: str) -> str:
    """An entry of dvc.yaml for one dataset, training or cell, by its name: DATASET[-SCHEDULE[-T]-SEED]."""
    parts = item.split("-")
    for axis, part in zip(AXES[len(parts)], parts, strict=True):
        entry = entry.replace(f"${{item.{axis}}}", part)
    return entry.replace("${key}", item)


def stage_name(kind: str, item: str) -> str:
    """What DVC calls a stage: by its kind, and by its dataset, training or cell where it has one."""
    return f"{kind}@{item}" if item else kind


def item_of(stage: dict[str, Any], cell: str) -> str:
    """The item of a stage, by its section of dvc.yaml, that leads to a cell: its dataset, its training, itself, or nothing."""
    named = dict(zip(AXES[4], cell.split("-"), strict=True))
    return "-".join(named[axis] for axis in stage.get("matrix", {}))


def deps(stage: dict[str, Any], item: str, values: dict[str, Any]) -> list[str]:
    """What a stage reads, by its section of dvc.yaml, for one dataset, training or cell; `values`: the content of params.yaml.

    Each path once: two parameters may choose the same file.
    """

    def value(dotted: re.Match[str]) -> str:
        found: Any = values
        for part in dotted[1].split("."):
            found = found[part]
        return str(found)

    return list(dict.fromkeys(re.sub(r"\$\{([\w.]+)\}", value, of_item(dep, item)) for dep in stage["deps"]))


def outs(stage: dict[str, Any]) -> list[str]:
    """What a stage writes, as its section of dvc.yaml names it."""
    entries = [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in entries]


def raw(dataset: str) -> Path:
    """Archive of the raw files, as fetched. DVC deletes what stands in the place of an output, so no person's file may."""
    return Path("data/raw") / f"{dataset}.fetched.zip"


def prepared(dataset: str) -> Path:
    """Folder of train, validation and test.safetensors, and dataset.json."""
    return Path("data/prepared") / dataset


def data_figures(dataset: str) -> Path:
    """Folder of samples.png and noising.png of a dataset."""
    return Path("data/figures") / dataset


def extractor(dataset: str) -> Path:
    """Weights of the classifier whose features score the samples."""
    return Path("models/extractor") / f"{dataset}.safetensors"


def reference(dataset: str) -> Path:
    """Statistics of the features of the test split."""
    return Path("models/reference") / f"{dataset}.safetensors"


def weights(training: str) -> Path:
    """Folder of ema.safetensors, raw.safetensors and previews.zip."""
    return place.network(training)


def samples(cell: str) -> Path:
    """Folder of the two sets of samples, grid.png, chain.png and denoising.gif."""
    return Path("samples") / cell


def loss_curve(training: str) -> Path:
    """Train and validation loss by step."""
    return Path("metrics/train") / f"{training}.csv"


def scores(stage: str, name: str) -> Path:
    """Deterministic results of extractor, reference or evaluate."""
    return Path("metrics") / stage / f"{name}.json"
