"""Measure real images against real ones: the statistics that samples are compared with, and the floor of every score.

Reads data/prepared/D and the extractor; writes models/reference/D.safetensors and metrics/reference/D.json.
Run: python -m stages.reference DATASET
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.datasets.images import balanced_order, to_float
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.fidelity.frechet import fit_gaussian
from stages.fidelity.metrics import METRICS, Measured
from stages.fidelity.sets import Fake, Real
from stages.networks.classifier import CHUNK, classify
from stages.pipeline import paths
from stages.pipeline.checkpoint import load_classifier, save_tensors
from stages.pipeline.files import write_json
from stages.pipeline.stage import progress, run

DRAWS = 10  # disjoint sets of N train images at most; each is measured as if it were a set of samples


def main(dataset: str, sample__images: int) -> None:
    """Embed the test split and draws from the train split, measure sets of N, write."""
    train, _ = load_tensors(paths.prepared(dataset) / "train.safetensors")
    test, _ = load_tensors(paths.prepared(dataset) / "test.safetensors")
    N, n = sample__images, len(train["images"])
    if n < N:
        raise UserError(f"params.yaml: sample.images = {N} must be at most {n}: the floor needs as many train images")
    drawn = balanced_order(train["labels"], torch.Generator().manual_seed(0))[: min(DRAWS, n // N) * N]

    images, labels = (torch.cat([test[name], train[name][drawn]]) for name in ("images", "labels"))
    embedded = embed(dataset, images, labels)
    split, draws = embedded.part(0, len(test["labels"])), embedded.part(len(test["labels"]), embedded.n)
    real = real_of(split, N)
    saved = {"mean": torch.from_numpy(real.gaussian.mean), "cov": torch.from_numpy(real.gaussian.cov), "features": real.features}
    save_tensors(paths.reference(dataset), saved, images=split.n)
    scores = {
        "test_images": split.n,
        "sets": {str(N): floors_of_sets(real, draws, N)},
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


def floors_of_sets(real: Real, drawn: Fake, size: int) -> dict[str, Any]:
    """Mean and sd over disjoint sets of so many train images, of each metric that depends on N."""
    draws = min(DRAWS, drawn.n // size)
    sets = [drawn.part(k * size, (k + 1) * size) for k in range(draws)]
    measured = {name: [metric.measure(real, each) for each in sets] for name, metric in METRICS.items() if metric.depends_on_n}
    return {"draws": draws} | {name: _mean_and_sd(found) for name, found in measured.items()}


def floors_of_split(real: Real, split: Fake) -> dict[str, Any]:
    """Value and error, on the test split, of each metric that does not depend on N; null where it has no meaning."""
    names = [name for name, metric in METRICS.items() if not metric.depends_on_n and metric.floor is None]
    measured = {name: METRICS[name].measure(real, split) for name in names}
    return {name: found and dict(zip(("value", "error"), found, strict=True)) for name, found in measured.items()}


def _mean_and_sd(measured: list[Measured | None]) -> dict[str, float | None] | None:
    """Of the values, whatever their own errors; null where one has no meaning, and no sd of a single one."""
    values = [found[0] for found in measured if found]
    if len(values) < len(measured):
        return None
    return {"value": float(np.mean(values)), "error": float(np.std(values, ddof=1)) if len(values) > 1 else None}


if __name__ == "__main__":
    run(main)
