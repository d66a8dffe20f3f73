"""Draw pictures with a network that is trained: `make draw`. It reads what is there, and runs no stage.

    python -m stages.sweep.draw [CELL=name] [LABELS=3,1,4] [N=16] [SEED=0] [STEPS=14] [SAMPLER=ddim] [GUIDANCE=0.8] [OUT=folder]

CELL is a cell, or a dataset, whose best cell is taken. LABELS are taken in turn. What is not given is as params.yaml: sample has
it. Single PNGs and a grid go to drawings/CELL. With OUT the images go to a folder for each class, which `reader: folder` takes as a
dataset. Images that are there are not drawn again, so a run that was killed goes on.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from stages.drawing import place
from stages.drawing.model import MOST_NAMED, Label, Model, class_number, listed, load
from stages.errors import UserError, in_one_line
from stages.pipeline import checkpoint, params, paths, processes
from stages.sweep.drawings import SHOWN, own_folder, save_grid, set_of, write
from stages.tracking import results

Asked = dict[str, str]
"""What was asked for, as text, by name: of NAMES."""

NAMES = ("CELL", "LABELS", "N", "SEED", "STEPS", "SAMPLER", "GUIDANCE", "OUT")
DEFAULT_N, MOST = 16, 10**9  # images


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
    todo = set_of(model, n, labels_of(model, wanted), _how(sample, loaded), out)
    seconds, drawn = write(todo)
    how_long = f"{drawn:,} drawn in {seconds:.1f} s" + f", {n - drawn:,} were there" * (drawn < n)
    if out:
        yield f"{out}: {n:,} images, a folder for each class; {how_long}"
        yield f"`reader: folder` with `path: {out}` takes it as a dataset"
    else:
        yield f"{todo.path(0)}" + f" to {todo.path(n - 1).name}" * (n > 1) + f": {how_long}"
        yield f"Grid{f' of the first {SHOWN}' * (n > SHOWN)}: {save_grid(todo)}"


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
