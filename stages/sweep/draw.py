"""Draw pictures with a network that is trained: `make draw`. It reads what is there, and runs no stage.

    python -m stages.sweep.draw [CELL=name] [LABELS=3,1,4] [N=16] [SEED=0] [STEPS=14] [SAMPLER=ddim] [GUIDANCE=0.8] [OUT=folder]

CELL is a cell, or a dataset, whose best cell is taken. LABELS are taken in turn. What is not given is as params.yaml: sample has
it. Single PNGs and a grid go to drawings/CELL. With OUT the images go to a folder for each class, which `reader: folder` takes as a
dataset. Images that are there are not drawn again, so a run that was killed goes on.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.drawing import place
from stages.drawing.model import MOST_NAMED, Label, Model, class_number, listed, load
from stages.errors import UserError, in_one_line
from stages.pipeline import checkpoint, dvc_forms, grids, params, paths, processes
from stages.pipeline.files import alone, content_hash, md5, read_json, whole_file
from stages.pipeline.stage import progress
from stages.tracking import results

Asked = dict[str, str]
"""What was asked for, as text, by name: of NAMES."""

NAMES = ("CELL", "LABELS", "N", "SEED", "STEPS", "SAMPLER", "GUIDANCE", "OUT")
OWN, DEFAULT_N, MOST = Path("drawings"), 16, 10**9
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


def draw(asked: Asked) -> Iterator[str]:
    """Draw what is asked for; what is to be told of it, line by line."""
    loaded = params.load()
    sample, n = settings_of(loaded.sample, asked), _count(asked.get("N", str(DEFAULT_N)))
    checkpoint.check_bf16(sample.precision)
    wanted = [label.strip() for label in asked["LABELS"].split(",")] if "LABELS" in asked else []
    out = own_folder(asked["OUT"], loaded) if "OUT" in asked else None
    cell, why = choose(loaded, asked.get("CELL"), wanted)
    if why:
        yield f"{cell}: {why}"
    model = load(str(cell))
    todo = _set(model, n, labels_of(model, wanted), _how(sample, loaded), out)
    seconds, drawn = write(todo)
    how_long = f"{drawn:,} drawn in {seconds:.1f} s" + f", {n - drawn:,} were there" * (drawn < n)
    if out:
        yield f"{out}: {n:,} images, a folder for each class; {how_long}"
        yield f"`reader: folder` with `path: {out}` takes it as a dataset"
    else:
        yield f"{todo.path(0)}" + f" to {todo.path(n - 1).name}" * (n > 1) + f": {how_long}"
        yield f"Grid{f' of the first {SHOWN}' * (n > SHOWN)}: {save_grid(todo)}"


# What is asked for


def settings_of(sample: params.Sample, asked: Asked) -> params.Sample:
    """The section `sample` with what is asked for. Raises UserError, as for params.yaml, where that cannot be.

    The sampler of the ancestral set comes with the noise levels of that set.
    """
    values = sample.model_dump()
    fast = values["fast"]
    if "SAMPLER" in asked and asked["SAMPLER"] != sample.fast.sampler:
        fast |= {"sampler": asked["SAMPLER"], "eta": 0.0}
        fast |= {"spacing": "trailing"} if asked["SAMPLER"] == sample.ancestral.sampler else {}
    for section, key, name in ((fast, "steps", "STEPS"), (values, "seed", "SEED"), (values, "guidance", "GUIDANCE")):
        if name in asked:
            section[key] = _number(asked[name])
    found: params.Sample = params.section("sample", values)
    return found


def _how(sample: params.Sample, loaded: params.Params) -> dict[str, Any]:
    """The settings of `Model.draw`."""
    is_ancestral = sample.fast.sampler == sample.ancestral.sampler != loaded.sample.fast.sampler
    named = sample.model_dump(include={"seed", "guidance", "guidance_interval", "clip_x0", "precision", "chunk"})
    return named | sample.fast.model_dump() | {"variance": sample.ancestral.variance if is_ancestral else "posterior"}


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _count(text: str) -> int:
    n = _number(text)
    if not (isinstance(n, int) and 1 <= n <= MOST):
        raise UserError(f"N = {text[:100]} must be a whole number of images in 1..{MOST}")
    return n


def choose(loaded: params.Params, name: str | None, labels: Sequence[str]) -> tuple[params.Cell, str]:
    """The cell to draw with, and why it, where its name does not say so.

    It has the lowest FID on validation of the dataset of that name; or, without a name, of the first dataset of the sweep that has
    all labels as class names, or else as numbers. Raises UserError when there is none that is trained.
    """
    cells = list(loaded.sweep.cells())
    here = [cell for cell in cells if (paths.weights(str(cell.training)) / place.EMA).exists()]
    there = f"trained here: {', '.join(map(str, here[:MOST_NAMED])) or 'none'}"
    found = [cell for cell in cells if name in (str(cell), cell.dataset, None)]
    if not found:
        raise UserError(f"the sweep has no cell or dataset {str(name)[:100]!r}; {there}")
    trained = [cell for cell in found if cell in here]
    if not trained:
        raise UserError(f"{name or 'the sweep'} has no trained network yet; `make repro CELL={found[0]}` makes one; {there}")
    if name == str(found[0]):
        return found[0], ""
    dataset = name or _dataset_with(labels, trained)
    return _best([cell for cell in trained if cell.dataset == dataset])


def _dataset_with(labels: Sequence[str], trained: Sequence[params.Cell]) -> str:
    """The first dataset that has all labels as class names, or else at all."""
    if not labels:
        return trained[0].dataset
    known = {dataset: load(next(str(cell) for cell in trained if cell.dataset == dataset)) for dataset in _datasets(trained)}
    told = {dataset: model.class_names for dataset, model in known.items() if _is_told(model)}
    for is_class in (lambda label, names: label in names, _is_class):
        for dataset, names in told.items():
            if all(is_class(label, names) for label in labels):
                return dataset
    classes = "; ".join(f"{dataset} has {listed(names)}" for dataset, names in told.items()) or "no network here was told labels"
    raise UserError(f"no dataset has all of LABELS={','.join(labels)[:100]}; {classes}")


def _datasets(cells: Sequence[params.Cell]) -> list[str]:
    return list(dict.fromkeys(cell.dataset for cell in cells))


def _is_class(label: str, class_names: Sequence[str]) -> bool:
    try:
        class_number(label, class_names)
    except UserError:
        return False
    return True


def _best(cells: Sequence[params.Cell]) -> tuple[params.Cell, str]:
    """The cell with the lowest FID on validation, and that it is that one; the first, where none has a score."""
    scores = {cell: score for cell in cells if (score := _score(cell)) is not None}
    if not scores:
        return cells[0], f"the first trained cell of {cells[0].dataset}; none is scored on validation yet"
    best = min(scores, key=lambda cell: scores[cell])
    return best, f"the lowest FID on validation, {scores[best]:.3g}, of {len(cells)} trained cells of {best.dataset}"


def _score(cell: params.Cell) -> float | None:
    try:
        return results.row(cell).get("validation_fid")
    except UserError:  # it is not evaluated yet
        return None


def _is_told(model: Model) -> bool:
    return model.conditional and len(model.class_names) > 1


def labels_of(model: Model, wanted: Sequence[str]) -> list[Label]:
    """Class numbers, to be taken in turn: those wanted, or all; None for a network that knows no labels."""
    if wanted and not _is_told(model):
        raise UserError(f"{model.name} draws images without labels; leave LABELS out")
    if not model.conditional:
        return [None]
    return [class_number(label, model.class_names) for label in wanted] or list(range(len(model.class_names)))


# Where it goes


def own_folder(out: str, loaded: params.Params) -> Path:
    """The folder that is asked for. Raises UserError where it is a file, or belongs to the project or one of its stages."""
    folder, root = Path(out).expanduser(), dvc_forms.workspace()
    place = (root / folder).resolve()
    taken = {(root / name).resolve() for name in (*KEPT, *(Path(path).parts[0] for path in dvc_forms.outputs(loaded)))}
    if place in (root, *root.parents) or taken & {place, *place.parents}:
        raise UserError(f"OUT={out} belongs to the project or to a stage; name a folder of your own, such as OUT=drawings/my_set")
    if place.exists() and not place.is_dir():
        raise UserError(f"OUT={out} is a file; name a folder")
    return folder


def _set(model: Model, n: int, labels: Sequence[Label], settings: dict[str, Any], out: Path | None) -> Set:
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


# Draw and write


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


def main() -> None:
    """Draw what the command line asks for."""
    if "MAKELEVEL" in os.environ:
        processes.end_with_parent()
    parser = argparse.ArgumentParser(prog="python -m stages.sweep.draw", description=__doc__)
    parser.add_argument("asked", metavar="NAME=VALUE", nargs="*")
    with in_one_line("draw"):
        asked = {name: value for name, _, value in (text.partition("=") for text in parser.parse_args().asked)}
        if unknown := [name for name in asked if name not in NAMES]:
            raise UserError(f"{unknown[0][:100]} is not known; there are {', '.join(NAMES)}")
        try:
            for line in draw({name: value for name, value in asked.items() if value}):
                print(line, flush=True)
        except KeyboardInterrupt:
            print("\nStopped. The same command goes on from here.", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
