"""Turn the raw files of a dataset into tensors and say what is in them. `python -m stages.prepare mnist`.

Reads data/raw/NAME.fetched.zip; writes train, validation and test.safetensors and dataset.json to data/prepared/NAME, and the
pictures samples.png and noising.png to data/figures/NAME.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from stages.datasets import readers
from stages.datasets.images import to_float, to_uint8
from stages.diffusion.process import q_sample
from stages.diffusion.schedules import cosine, linear, linear_unscaled, sigmoid
from stages.errors import UserError
from stages.pipeline import grids, params, paths, sources
from stages.pipeline.checkpoint import save_tensors
from stages.pipeline.files import whole_files, write_json
from stages.pipeline.stage import run

EXAMPLES = 10  # images of each class in samples.png, and noise levels in noising.png
CHUNK = 4096  # images whose pixels are counted at a time
SCHEDULES = {  # in noising.png; one that is added later does not change it
    "linear": linear.alpha_bar,
    "linear_unscaled": linear_unscaled.alpha_bar,
    "cosine": cosine.alpha_bar,
    "sigmoid": sigmoid.alpha_bar,
}
TALLEST = 1500  # pixels; classes stand side by side rather than make samples.png higher


def main(dataset: str, data: params.DataSection) -> None:
    """Write the prepared folder and the figures, each whole or not at all."""
    options = data.model_dump()
    with sources.unpacked(paths.raw(dataset)) as raw:
        try:
            found = readers.read(raw, options)
        except UserError as error:
            raise UserError(f"data.{dataset}: {error}") from None
        digests = {str(file.relative_to(raw)): _sha256(file) for file in sorted(raw.rglob("*")) if file.is_file()}
    for name, (_, y) in found.splits.items():
        if len(y) < 2:
            raise UserError(f"data.{dataset}: the {name} split has {len(y)} image, and needs 2 or more; give it a larger share")
    train, y_train = found.train
    classes = len(found.class_names)
    mean, std = mean_and_std(train)
    about = {
        "reader": data.reader,
        "synthetic": readers.is_synthetic(options),
        "licence": readers.licence(options),
        "source_sha256": digests,
        "size": data.size,
        "class_names": found.class_names,
        "images": {name: len(y) for name, (_, y) in found.splits.items()},
        "images_per_class": {name: y.bincount(minlength=classes).tolist() for name, (_, y) in found.splits.items()},
        "pixel_mean": mean,
        "pixel_std": std,
        **found.report,
    }
    origins = [{"sources": origin} for origin in found.sources] if found.sources else [{}] * 3
    with whole_files(paths.prepared(dataset)) as folder:
        for (name, (images, labels)), origin in zip(found.splits.items(), origins, strict=True):
            tensors = {"images": images, "labels": labels, **origin}
            save_tensors(folder / f"{name}.safetensors", tensors, class_names=found.class_names)
        write_json(folder / "dataset.json", about)
    with whole_files(paths.data_figures(dataset)) as folder:
        grids.save_png(folder / "samples.png", samples(train, y_train, classes))
        grids.save_png(folder / "noising.png", noising(train[0]))


def mean_and_std(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all pixels in [-1, 1], float64, from how often each of the 256 values occurs."""
    counts = sum(chunk.flatten().bincount(minlength=256) for chunk in images.split(CHUNK))  # widened to int64 on the way
    share = torch.as_tensor(counts).double() / images.numel()
    values = to_float(torch.arange(256, dtype=torch.uint8)).double()
    mean = (share * values).sum()
    return mean.item(), (share * (values - mean) ** 2).sum().sqrt().item()


def samples(images: Tensor, labels: Tensor, classes: int) -> grids.Pixels:
    """A row of ten images per class, in the order of the class names; two or more classes side by side where there are many."""
    height = images.shape[-1] + 1
    picked = torch.full((classes, EXAMPLES, *images.shape[1:]), 128, dtype=torch.uint8)
    for y in range(classes):
        found = images[(labels == y).nonzero()[:EXAMPLES, 0]]
        picked[y, : len(found)] = found
    side_by_side = -(-classes * height // TALLEST)
    scale = max(1, TALLEST // 2 // (-(-classes // side_by_side) * height))
    return grids.grid(picked.flatten(0, 1).numpy(), EXAMPLES * side_by_side, scale=scale)


def noising(image: Tensor) -> grids.Pixels:
    """One image, (1, H, W) uint8, at ten t of 1000: a row per schedule, the same noise in all, pixels in their true range."""
    T = 1000
    t = torch.linspace(0, T - 1, EXAMPLES).round().long()
    eps = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).expand(EXAMPLES, *image.shape)
    x0 = to_float(image).expand(EXAMPLES, *image.shape)
    rows = [to_uint8(q_sample(x0, torch.from_numpy(alpha_bar(T))[t], eps)) for alpha_bar in SCHEDULES.values()]
    scale = max(1, 96 // image.shape[-1])
    return grids.labelled(torch.cat(rows).numpy(), list(SCHEDULES), [f"t = {step}" for step in t.tolist()], scale=scale)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run(main)
