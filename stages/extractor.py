"""Train the classifier of a dataset, in whose features its samples are scored.

Reads data/prepared/D; writes models/extractor/D.safetensors and metrics/extractor/D.json.
Run: python -m stages.extractor DATASET
"""

import hashlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.datasets.images import to_float
from stages.drawing.weights import device, load_tensors
from stages.errors import UserError
from stages.fidelity.agreement import agreement
from stages.networks.classifier import CHUNK, FEATURES, Classifier, classify, shift
from stages.pipeline import params, paths
from stages.pipeline.checkpoint import machine, save_tensors
from stages.pipeline.files import write_json
from stages.pipeline.stage import progress, run

TURNS = 4  # ways to turn an image by right angles


def main(dataset: str, extractor: params.Extractor, train__threads: int) -> dict[str, Any]:
    """Train, measure on the test split, write. Where all images are of one class, the classifier learns how they are turned."""
    torch.set_num_threads(train__threads)
    train, about = load_tensors(paths.prepared(dataset) / "train.safetensors")
    test, _ = load_tensors(paths.prepared(dataset) / "test.safetensors")
    num_classes = len(about["class_names"])
    if num_classes == 1:
        train, num_classes = turned(train["images"]), TURNS
    start = time.perf_counter()
    net = fit(train["images"], train["labels"], num_classes, extractor)
    seconds = time.perf_counter() - start
    path = paths.extractor(dataset)
    about = {"size": train["images"].shape[-1], "num_classes": num_classes}
    save_tensors(path, net.state_dict(), classifier=about, machine=machine())

    _, probabilities = classify(net, map(to_float, test["images"].split(CHUNK)))
    scores = {
        "accuracy": dict(zip(("value", "error"), agreement(test["labels"], probabilities), strict=True)),
        "train_images": extractor.images,
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "features": FEATURES,
    }
    write_json(paths.scores("extractor", dataset), scores)
    return {"train_images_per_second": round(extractor.images / seconds, 1)}


def turned(images: Tensor) -> dict[str, Tensor]:
    """Images without labels, each turned by 0, 90, 180 or 270 degrees, and by how many of them as its label; 0 is upright.

    What tells them apart has to see strokes, so its features score samples too.

    Args:
        images: (N, 1, H, H) uint8.

    Source: Gidaris et al. 2018 (RotNet).
    """
    labels = torch.arange(len(images)) % TURNS
    copy = images.clone()
    for turns in range(1, TURNS):
        copy[turns::TURNS] = images[turns::TURNS].rot90(turns, (2, 3))
    return {"images": copy, "labels": labels}


def fit(images: Tensor, labels: Tensor, num_classes: int, extractor: params.Extractor) -> Classifier:
    """A classifier, in eval mode, trained on (N, 1, H, W) uint8 images with (N,) int64 labels.

    Raises:
        UserError: the loss stopped being a number.
    """
    where = device()
    rng = torch.Generator().manual_seed(extractor.seed)
    with torch.random.fork_rng():
        torch.manual_seed(extractor.seed)  # initial weights: torch takes no generator there
        net = Classifier(images.shape[-1], num_classes).to(where).to(memory_format=torch.channels_last)
        images, labels = images.to(where), labels.to(where)
        steps = -(-extractor.images // extractor.batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=extractor.lr, weight_decay=0.01)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, extractor.lr, total_steps=steps, pct_start=0.2)
        reach = max(1, images.shape[-1] // 14)
        for step in progress(range(steps), total=steps, unit="step", label="extractor"):
            batch = torch.randint(len(images), (extractor.batch,), generator=rng).to(where)
            loss = F.cross_entropy(net(shift(to_float(images[batch]), reach, rng)), labels[batch])
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()} at step {step} of {steps}; lower extractor.lr = {extractor.lr:g}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            plan.step()
    return net.eval()


if __name__ == "__main__":
    run(main)
