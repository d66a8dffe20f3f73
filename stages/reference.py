"""Measure real images against real ones: the statistics that samples are compared with, and the floor of every score.

Reads data/prepared/D and the extractor; writes models/reference/D.safetensors and metrics/reference/D.json.
Run: python -m stages.reference DATASET
"""

import numpy as np
import torch

from stages.datasets.images import balanced_order, to_float
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.fidelity.agreement import accuracy, class_histogram, class_tv, confident
from stages.fidelity.frechet import fit_gaussian, frechet_distance
from stages.fidelity.manifold import precision_recall
from stages.networks.classifier import CHUNK, classify
from stages.pipeline import paths
from stages.pipeline.checkpoint import load_classifier, save_tensors
from stages.pipeline.files import write_json
from stages.pipeline.stage import progress, run

DRAWS = 10  # disjoint sets of N train images at most; each is measured as if it were a set of samples


def main(dataset: str, sample__images: int, sample__snapshot_images: int) -> None:
    """Embed the test split and draws from the train split, measure sets of both sizes, write."""
    train, _ = load_tensors(paths.prepared(dataset) / "train.safetensors")
    test, _ = load_tensors(paths.prepared(dataset) / "test.safetensors")
    N, n = sample__images, len(train["images"])
    if n < N:
        raise UserError(f"params.yaml: sample.images = {N} must be at most {n}: the floor needs as many train images")
    drawn = balanced_order(train["labels"], torch.Generator().manual_seed(0))[: min(DRAWS, n // N) * N]

    chunks = torch.cat([test["images"], train["images"][drawn]]).split(CHUNK)
    net = load_classifier(paths.extractor(dataset))
    embedded = classify(net, map(to_float, progress(chunks, total=len(chunks), unit="chunk", label="reference")))
    (features, train_features), (probabilities, train_probabilities) = (
        x.split([len(test["labels"]), len(drawn)]) for x in embedded
    )

    real = fit_gaussian(features)
    frequencies = np.bincount(test["labels"], minlength=probabilities.shape[1]) / real.n
    real_features = features[balanced_order(test["labels"], torch.Generator().manual_seed(0))[:N]]
    sets = {}
    for size in {N, sample__snapshot_images}:
        draws = range(0, min(DRAWS, len(drawn) // size) * size, size)
        fids = [frechet_distance(real, fit_gaussian(train_features[i : i + size])) for i in draws]
        tvs = [class_tv(frequencies, class_histogram(train_probabilities[i : i + size]))[0] for i in draws]
        shares = [precision_recall(real_features[:size], train_features[i : i + size]) for i in draws]
        precisions, recalls = ([share for share, _ in values] for values in zip(*shares, strict=True))
        sets[str(size)] = {"draws": len(draws), "fid": _mean_and_sd(fids), "class_tv": _mean_and_sd(tvs)}
        sets[str(size)] |= {"precision": _mean_and_sd(precisions), "recall": _mean_and_sd(recalls)}
    saved = {"mean": torch.from_numpy(real.mean), "cov": torch.from_numpy(real.cov), "features": real_features}
    save_tensors(paths.reference(dataset), saved, images=real.n)
    scores = {
        "test_images": real.n,
        "sets": dict(sorted(sets.items())),
        "accuracy": dict(zip(("value", "error"), accuracy(test["labels"], probabilities), strict=True)),
        "confident": dict(zip(("value", "error"), confident(probabilities), strict=True)),
        "class_frequencies": frequencies.tolist(),
    }
    write_json(paths.scores("reference", dataset), scores)


def _mean_and_sd(values: list[float]) -> dict[str, float | None]:
    return {"value": float(np.mean(values)), "error": float(np.std(values, ddof=1)) if len(values) > 1 else None}


if __name__ == "__main__":
    run(main)
