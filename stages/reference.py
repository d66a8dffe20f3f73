"""Measure real images against real ones: the statistics that samples are compared with, and the floor of every score.

The floor at N is what N validation images score against the whole test split; precision and recall, which look at neighbours, take
as many real images as there are. Reads data/prepared/D and the extractor; writes models/reference/D.safetensors and
metrics/reference/D.json.
Run: python -m stages.reference DATASET
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.datasets.images import balanced_order, to_float
from stages.drawing.weights import load_tensors
from stages.fidelity.frechet import fit_gaussian
from stages.fidelity.manifold import K
from stages.fidelity.metrics import METRICS, Measured
from stages.fidelity.sets import Fake, Real
from stages.networks.classifier import CHUNK, classify
from stages.pipeline import paths
from stages.pipeline.checkpoint import load_classifier, machine, save_tensors
from stages.pipeline.files import write_json
from stages.pipeline.stage import progress, run

DRAWS = 10  # disjoint sets of N validation images at most; each is measured as if it were a set of samples


def main(dataset: str, sample__images: int, sample__ancestral_images: int, evaluate__min_scored: int, train__threads: int) -> None:
    """Embed the test and the validation split, measure sets of each size that is scored, write."""
    torch.set_num_threads(train__threads)
    test, _ = load_tensors(paths.prepared(dataset) / "test.safetensors")
    validation, _ = load_tensors(paths.prepared(dataset) / "validation.safetensors")
    images, labels = (torch.cat([test[name], validation[name]]) for name in ("images", "labels"))
    embedded = embed(dataset, images, labels)
    split, others = embedded.part(0, len(test["labels"])), embedded.part(len(test["labels"]), embedded.n)
    real = real_of(split, sample__images)
    saved = {"features": real.features}
    for name, gaussian in (("", real.gaussian), ("validation_", fit_gaussian(others.features))):
        saved |= {f"{name}mean": torch.from_numpy(gaussian.mean), f"{name}cov": torch.from_numpy(gaussian.cov)}
    _, extractor = load_tensors(paths.extractor(dataset))
    machines = {"extractor": [extractor["machine"]], "reference": [machine()]}
    save_tensors(paths.reference(dataset), saved, images=split.n, machines=machines)
    sizes = sorted({N for N in (sample__images, sample__ancestral_images) if N >= evaluate__min_scored})
    scores = {
        "test_images": split.n,
        "validation_images": others.n,
        "sets": {str(N): floors_of_sets(real, split, others, N) for N in sizes},
        **floors_of_split(real, split),
        "class_frequencies": real.class_frequencies.tolist(),
    }
    write_json(paths.scores("reference", dataset), scores)


def embed(dataset: str, images: Tensor, labels: Tensor) -> Fake:
    """What the classifier of a dataset says of images, (N, 1, H, W) uint8, with labels, (N,) int64."""
    chunks = images.split(CHUNK)
    net = load_classifier(paths.extractor(dataset))
    return Fake(*classify(net, map(to_float, progress(chunks, total=len(chunks), unit="chunk", label="reference"))), labels)


def real_of(split: Fake, N: int) -> Real:
    """What sets of at most N images are compared with, of the test split; its shares are yet to be measured."""
    some = balanced_order(split.labels, torch.Generator().manual_seed(0))[:N]
    frequencies = np.bincount(split.labels, minlength=split.probabilities.shape[1]) / split.n
    return Real(fit_gaussian(split.features), split.features[some], frequencies, shares={})


def draws_of(images: Fake, like: Tensor, N: int) -> list[Fake]:
    """Disjoint sets of N of the images, DRAWS or as many as there are, whose labels have the frequencies of `like`, (M,) int64.

    Samples are drawn so as well; sets with chance class counts would put the floor too high.
    """
    turns, classes = in_turn(like, DRAWS * N), int(like.max()) + 1
    ends = [turns[: k * N].bincount(minlength=classes).tolist() for k in range(DRAWS + 1)]  # of the sets, within each class
    order = torch.randperm(images.n, generator=torch.Generator().manual_seed(0))
    of_class = [order[images.labels[order] == y] for y in range(len(ends[0]))]
    draws = sum(all(end <= len(rows) for end, rows in zip(of_set, of_class, strict=True)) for of_set in ends[1:])
    parts = [[rows[a:b] for rows, a, b in zip(of_class, ends[k], ends[k + 1], strict=True)] for k in range(draws)]
    return [images.take(torch.cat(part)) for part in parts]


def in_turn(like: Tensor, N: int) -> Tensor:
    """(N,) int64, classes at the frequencies of labels, (M,) int64, in every beginning: next is always the one furthest behind.

    Source: the method of Webster and Sainte-Laguë for the seats of a parliament.
    """
    counts = like.bincount()
    most = (counts * (N + len(counts))).div(len(like), rounding_mode="floor") + 1  # no class comes up more often
    most[counts == 0] = 0
    y = torch.arange(len(counts)).repeat_interleave(most)
    earlier = torch.arange(len(y)) - (most.cumsum(0) - most)[y]
    return y[((earlier + 0.5) / counts[y]).argsort(stable=True)[:N]]


def floors_of_sets(real: Real, split: Fake, others: Fake, N: int) -> dict[str, Any]:
    """Mean and sd over sets of N validation images, of each metric that depends on N; null where there is no set.

    Metrics of neighbours are measured on sets of `neighbours` images: N, or as many as both splits have. Where that is less than a
    ball's K + 1 images of each class, all balls would reach into other classes, and cover what lies between.

    Args:
        split: the test split. others: the validation split.
    """
    largest = most_drawn(others.labels, split.labels, N)
    n = min(largest, split.n)
    enough = n >= (K + 1) * np.count_nonzero(real.class_frequencies)
    sets = {size: draws_of(others, split.labels, size) for size in {n, N}}
    measured = {
        name: [metric.measure(real, each) for each in sets[n if metric.of_neighbours else N]]
        for name, metric in METRICS.items()
        if metric.depends_on_n and (enough or not metric.of_neighbours)
    }
    scores = {name: _mean_and_sd(measured.get(name, [])) for name, metric in METRICS.items() if metric.depends_on_n}
    return {"draws": len(sets[N]), "largest": largest, "neighbours": n if enough else 0, **scores}


def most_drawn(labels: Tensor, like: Tensor, N: int) -> int:
    """The size of the largest set, of N images at most, that `draws_of` finds among images with labels, (n,) int64."""
    turns, available = in_turn(like, N), labels.bincount(minlength=int(like.max()) + 1)
    enough = torch.stack([(turns == y).cumsum(0) <= count for y, count in enumerate(available[: int(like.max()) + 1])]).all(0)
    return N if enough.all() else int(enough.logical_not().nonzero()[0])


def floors_of_split(real: Real, split: Fake) -> dict[str, Any]:
    """Value and error, on the test split, of each metric that does not depend on N; null where it has no meaning."""
    names = [name for name, metric in METRICS.items() if not metric.depends_on_n and metric.floor is None]
    measured = {name: METRICS[name].measure(real, split) for name in names}
    return {name: found and dict(zip(("value", "error"), found, strict=True)) for name, found in measured.items()}


def _mean_and_sd(measured: list[Measured | None]) -> dict[str, float | None] | None:
    """Of the values, whatever their own errors; null where there is none or one has no meaning, and no sd of a single one."""
    values = [found[0] for found in measured if found]
    if not values or len(values) < len(measured):
        return None
    return {"value": float(np.mean(values)), "error": float(np.std(values, ddof=1)) if len(values) > 1 else None}


if __name__ == "__main__":
    run(main)
