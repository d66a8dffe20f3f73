"""What sets of some hundred to some ten thousand images give: a cell of each through `make repro`, all scored by one judge.

Subsets of the Hoda digits, which people wrote, and of the drawn letters are written as folders of PNGs and read with
`reader: auto`. Each gets the default network of schedule cosine, drawn at T = 100; the smallest also one that begins with the
weights of a trained network (`train.init`). One judge scores all sets of a kind: a classifier
that was trained on all images that sets are taken from, and real images that neither it nor any set holds. So rows compare, which
the cells' own scores, each against its own few test images, do not. Seconds are of the processors, so that other work beside
hardly counts. Prints one JSON line; writes SHEET, a picture.

Run: python benchmarks/small_sets.py SHEET.png WEIGHTS.safetensors [HODA.cdb [SIZE ...]]: the letters, or with that file the digits
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages import extractor  # noqa: E402
from stages.datasets import glyphs, hoda  # noqa: E402
from stages.datasets.images import balanced_order, to_float  # noqa: E402
from stages.drawing.weights import load_tensors  # noqa: E402
from stages.fidelity.agreement import agreement  # noqa: E402
from stages.fidelity.frechet import fit_gaussian, frechet_distance  # noqa: E402
from stages.networks.classifier import CHUNK, Classifier, classify  # noqa: E402
from stages.pipeline import grids, params, paths  # noqa: E402
from stages.pipeline.files import read_json  # noqa: E402
from stages.pipeline.params import Cell, Extractor  # noqa: E402

JUDGE = Extractor(images=200_000, batch=128, lr=3e-3, seed=1)
HODA_SIZES, GLYPH_SIZES = (200, 2000, 15_000), (840, 2000, 20_000)  # 840: 20 of each of 42 classes
SCORED = 2000  # images of a set, and of the real ones that give the floor
SHOWN = 10


class Kind(NamedTuple):
    """Images to take sets from, others to score against, and the classifier that scores."""

    pool: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    floor: tuple[Tensor, Tensor]
    class_names: list[str]
    judge: Classifier

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, class_names: list[str], test: int) -> "Kind":
        """From images in any order: the first are held out to score, at the frequencies of the classes."""
        order = balanced_order(labels, torch.Generator().manual_seed(0))
        parts = [(images[rows], labels[rows]) for rows in (order[:test], order[test : test + SCORED], order[test + SCORED :])]
        return cls(parts[2], parts[0], parts[1], class_names, extractor.fit(*parts[2], len(class_names), JUDGE))

    def score(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """FID against the images held out, and accuracy, each with its error."""
        real, found = (classify(self.judge, map(to_float, x.split(CHUNK))) for x in (self.test[0], images))
        gaussian = fit_gaussian(real[0])
        value = frechet_distance(gaussian, fit_gaussian(found[0]))
        return {"fid": round(value, 3), "accuracy": [round(x, 4) for x in agreement(labels, found[1])], "images": len(images)}


def main(sheet: Path, weights: Path, cdb: Path | None, wanted: list[int]) -> None:
    name, kind, sizes = ("hoda", _hoda(cdb), HODA_SIZES) if cdb else ("letters", _letters(), GLYPH_SIZES)
    sizes = tuple(wanted) or sizes
    result: dict[str, Any] = {"floor": kind.score(*kind.floor)}
    pictures: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/naqsh"], check=True)
        os.chdir(f"{folder}/naqsh")
        sections = {}
        for n in sizes:
            _write(kind, n, Path(folder, f"{name}_{n}"))
            sections[f"{name}_{n}"] = {"reader": "auto", "path": f"{folder}/{name}_{n}"}
        text = params.PARAMS.read_text()
        for init, chosen in ((None, list(sections)), (weights, [f"{name}_{min(sizes)}"])):
            params.PARAMS.write_text(text)
            for dataset in chosen:
                params.PARAMS.write_text(params.with_dataset(dataset, sections[dataset]))
            sweep = f"sweep: {{datasets: {chosen}, schedules: [cosine], timesteps: [100]}}"
            Path("profiles/sets.yaml").write_text(f"{sweep}\ntrain: {{init: {init or 'null'}, longer: {{}}}}\n")
            params.PARAMS.write_text(params.merged(Path("profiles/sets.yaml")))
            for dataset in chosen:
                row = dataset.removeprefix(f"{name}_") + f", begins with {weights.stem}" * bool(init)
                cell = Cell(dataset, "cosine", 100, 0)
                seconds = _made(cell)
                found, labels = _drawn(cell, kind.class_names)
                result[row] = {"cpu_seconds": seconds, **kind.score(found, labels), **_own(cell)}
                pictures[row] = _shown(found, labels)
                print(row, result[row], file=sys.stderr, flush=True)
    pictures["real"] = _shown(*kind.test)
    side = max(images.shape[-1] for images in pictures.values())
    rows = torch.cat([torch.nn.functional.interpolate(images, side, mode="nearest") for images in pictures.values()])
    grids.save_png(sheet, grids.labelled(rows.numpy(), list(pictures), [""] * SHOWN))
    print(json.dumps({name: result}))


def _hoda(cdb: Path) -> Kind:
    labels, inks = zip(*hoda.digits(cdb.read_bytes(), str(cdb)), strict=True)
    images = torch.stack([torch.from_numpy(hoda.place(ink, 32, dark=0, light=255).copy()) for ink in inks])[:, None]
    return Kind.of(images, torch.tensor(labels), [str(digit) for digit in range(10)], test=3000)


def _letters() -> Kind:
    with tempfile.TemporaryDirectory() as folder:
        glyphs.fetch(Path(folder))
        found = glyphs.read(Path(folder), size=64, train_images=27_000, validation_images=1, test_images=1, seed=0)
    return Kind.of(*found.train, found.class_names, test=5000)


def _write(kind: Kind, n: int, folder: Path) -> None:
    """The first n images of the pool, as many of each class as of any other where they are few, as PNGs in folders."""
    images, labels = kind.pool
    each = -(-n // len(kind.class_names))
    for y, name in enumerate(kind.class_names):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images[labels == y][:each]):
            Image.fromarray(image[0].numpy()).save(folder / name / f"{i:05}.png")


def _made(cell: Cell) -> float:
    """Make a cell as `make repro` does; the seconds of the processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "stages.sweep.runner", "--jobs", "1", "--cell", str(cell)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _drawn(cell: Cell, class_names: list[str]) -> tuple[Tensor, Tensor]:
    """The fast set, and its labels by the judge's names."""
    drawn, _ = load_tensors(paths.samples(str(cell)) / "fast.safetensors")
    own = read_json(paths.prepared(cell.dataset) / "dataset.json")["class_names"]
    numbers = [str(int(name)) if name.isdecimal() else name for name in class_names]  # as `reader: auto` calls them
    return drawn["images"], torch.tensor([numbers.index(name) for name in own])[drawn["labels"]]


def _own(cell: Cell) -> dict[str, Any]:
    """What the cell's own scores say."""
    scores = read_json(paths.scores("evaluate", str(cell)))["fast"]
    about = read_json(paths.prepared(cell.dataset) / "dataset.json")
    return {"splits": about["images"], "own_fid": scores.get("fid"), "not_measured": scores["not_measured"]}


def _shown(images: Tensor, labels: Tensor) -> Tensor:
    """One image of each of the first classes."""
    return torch.stack([images[(labels == y).nonzero()[0, 0]] for y in range(SHOWN)])


if __name__ == "__main__":
    given = [Path(text).absolute() for text in sys.argv[1:4]]
    main(given[0], given[1], given[2] if given[2:] else None, [int(text) for text in sys.argv[4:]])
