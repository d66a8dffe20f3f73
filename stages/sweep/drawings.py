"""A set of drawn images: its folder, the names in it, what of it is there already; drawn and written part by part."""

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.drawing.model import Label, Model
from stages.errors import UserError
from stages.pipeline import dvc_forms, grids, params, processes
from stages.pipeline.files import alone, content_hash, md5, read_json, whole_file
from stages.pipeline.stage import progress

OWN = Path("drawings")
SHOWN, WIDEST = 400, 20  # images in a grid, and labels that stand below each other in it
LONGEST = 40  # bytes of the labels in a folder's name
ABOUT = "drawing.json"  # the settings of the images beside it; no image, so `reader: folder` leaves it alone
UNTOLD = "unlabelled"  # what images of no class are called
KEPT = (".git", ".dvc", ".state", ".venv", "stages", "mlruns", "mlartifacts")  # written by no stage, and no place for a set either
STAGES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Set:
    """A set of images and where it goes.

    Args:
        folder: with a file of settings.
        labels: taken in turn: image i has labels[i % len(labels)].
        names: what a label is called in a path.
        by_class: a folder for each label; or files that are named by it.
        settings: of `Model.draw`, but labels and `first`.
        about: what decides the images of the folder, for whoever comes back to it.
    """

    model: Model
    folder: Path
    n: int
    labels: Sequence[Label]
    names: dict[Label, str]
    by_class: bool
    settings: dict[str, Any]
    about: dict[str, Any]

    def path(self, i: int) -> Path:
        """Where image i goes."""
        name = self.names[self.label(i)]
        return self.folder / (f"{name}/{i:06d}.png" if self.by_class else f"{i:06d}-{name}.png")

    def label(self, i: int) -> Label:
        """The label of image i."""
        return self.labels[i % len(self.labels)]

    def missing(self, start: int, stop: int) -> list[int]:
        """Which of these images are not there; those that are, are whole."""
        return [i for i in range(start, min(stop, self.n)) if not self.path(i).exists()]


def own_folder(out: str, loaded: params.Params) -> Path:
    """The folder that is asked for. Raises UserError where it is a file, or belongs to the project or one of its stages."""
    folder, root = Path(out).expanduser(), dvc_forms.workspace()
    target = (root / folder).resolve()
    taken = {(root / name).resolve() for name in (*KEPT, *(Path(path).parts[0] for path in dvc_forms.outputs(loaded)))}
    if target in (root, *root.parents) or taken & {target, *target.parents}:
        raise UserError(f"OUT={out} belongs to the project or to a stage; name a folder of your own, such as OUT=drawings/my_set")
    if target.exists() and not target.is_dir():
        raise UserError(f"OUT={out} is a file; name a folder")
    return folder


def set_of(model: Model, n: int, labels: Sequence[Label], settings: dict[str, Any], out: Path | None) -> Set:
    """The set, whose folder has no other images."""
    classes = [None if label is None else model.class_names[int(label)] for label in labels]
    names = {label: UNTOLD if name is None else file_name(name) for label, name in zip(labels, classes, strict=True)}
    code = [md5(path) for room in ("diffusion", "drawing", "networks") for path in sorted(STAGES.joinpath(room).rglob("*.py"))]
    about = {"cell": model.name, "network": model.sha256, "code": content_hash(code), **settings, "labels": classes}
    if out:
        _refuse_other(out, about, set(names.values()))
    every = "-".join(names.values())
    of = every if len(every.encode()) <= LONGEST else f"{len(names)}-classes"
    folder = out or OWN / model.name / f"{of}-seed{settings['seed']}-{content_hash(about)[:8]}"
    return Set(model, folder, n, labels, names, out is not None, settings, about)


def _refuse_other(folder: Path, about: dict[str, Any], names: set[str]) -> None:
    """Raise UserError where a folder has images of other settings, or other things than folders of these names."""
    there = {path.name for path in folder.glob("[!.]*")}
    if ABOUT in there:
        before = dict(read_json(folder / ABOUT))
        keys = [key for key in (*before, *(about.keys() - before)) if before.get(key) != about.get(key)]
        if keys:
            told = "; ".join(f"{key}: {_short(before.get(key))}, now {_short(about.get(key))}" for key in keys)
            raise UserError(f"{folder} has images of other settings ({told}); name another folder")
        there -= {ABOUT, *names}
    if there:
        raise UserError(f"{folder} has other things in it, such as {min(there)!r}; name an empty or a new folder")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def file_name(class_name: str) -> str:
    """A class name as the name of a file or folder: itself, where that is safe, with %XX for what is not."""
    name = re.sub(
        r'[%/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]|^\.|[. ]$|^_(?=_MACOSX$)', lambda found: f"%{ord(found[0]):02X}", class_name
    )
    if len(name.encode()) > 100:
        return f"{name.encode()[:80].decode(errors='ignore')}%{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "%"


def write(todo: Set) -> tuple[float, int]:
    """Draw the images that are not there, each written whole. How many seconds that took, and how many they were."""
    workers, started = processes.cores(), time.perf_counter()
    with alone(Path(".state/locks") / f"draw {todo.folder.name}.lock"):
        portion = todo.settings["chunk"] * workers
        left = len(todo.missing(0, todo.n))
        with progress(total=todo.n, initial=todo.n - left, unit="images", label=todo.model.name) as bar:
            for start in range(0, todo.n, portion):
                if missing := todo.missing(start, start + portion):
                    _draw(todo, missing, workers, bar)
    return time.perf_counter() - started, left


def _draw(todo: Set, missing: Sequence[int], workers: int, bar: Any) -> None:
    """Draw these images of one portion. A mistake in the settings is told by the first, before anything is written."""
    first, stop, chunk = missing[0], missing[-1] + 1, todo.settings["chunk"]
    evaluations = ((stop - 1) // chunk - first // chunk + 1) * chunk * todo.settings["steps"]

    def evaluated(images: int) -> None:
        with bar.get_lock():
            bar.update(len(missing) * images / evaluations)

    labels = [todo.label(i) for i in range(first, stop)]
    images = todo.model.draw(labels, first=first, workers=workers, evaluated=evaluated, **todo.settings).numpy()
    if not (file := todo.folder / ABOUT).exists():
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(todo.about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for i in missing:
        grids.save_png(todo.path(i), images[i - first, 0])


def save_grid(todo: Set) -> Path:
    """Write the first images as one picture, in rows; equal labels stand below each other. Its path."""
    n, turn = min(todo.n, SHOWN), len(todo.labels)
    columns = min(n, max(1, math.ceil(math.sqrt(n) / turn)) * turn if turn <= WIDEST else math.ceil(math.sqrt(n)))
    images = np.stack([np.asarray(Image.open(todo.path(i))) for i in range(n)])[:, None]
    path = todo.folder / f"grid-{todo.n}.png"
    grids.save_png(path, grids.grid(images, columns, scale=2 if images.shape[-1] < 48 else 1))
    return path
