"""Score the samples and the network of a cell; publish the cell to MLflow.

Reads samples/CELL, the final weights, the test split, the extractor and the reference; writes metrics/evaluate/CELL.json.
Beside the two sets also those of the averages at each quarter of the last phase of training: would training longer pay?
A score is {value, error, floor}: the error is one standard error, the floor is the same score of real images; null where
there is none.
Run: python -m stages.evaluate CELL
"""

from typing import Any

import torch
from torch import Tensor

from stages import UserError
from stages.datasets.images import to_float
from stages.diffusion.process import Prediction, alpha_bar_of, logsnr, q_sample, x0_and_eps
from stages.diffusion.schedules import noise_levels
from stages.fidelity.agreement import accuracy, class_histogram, class_tv, confident
from stages.fidelity.frechet import Gaussian, fid
from stages.networks.classifier import CHUNK, Classifier, classify
from stages.networks.unet import UNet
from stages.pipeline import params, paths, tracking
from stages.pipeline.checkpoint import load_classifier, load_network, load_tensors
from stages.pipeline.stage import progress, read_json, run, write_json

LOSS_CHUNK = 256  # images per call of the network

Score = dict[str, float | None]


def main(cell: params.Cell, evaluate: params.Evaluate) -> None:
    """Score both sets, measure the losses, write, publish."""
    classifier = load_classifier(paths.extractor(cell.dataset))
    reference, about = load_tensors(paths.reference(cell.dataset))
    real = Gaussian(reference["mean"].numpy(), reference["cov"].numpy(), about["images"])
    floors = read_json(paths.scores("reference", cell.dataset))

    def scored(drawn: dict[str, Tensor]) -> dict[str, Any]:
        return score_set(classifier, real, floors, drawn, evaluate.min_scored)

    scores: dict[str, Any] = {}
    for name in ("fast", "ancestral"):
        drawn, sampling = load_tensors(paths.samples(str(cell)) / f"{name}.safetensors")
        scores[name] = {"sampling": sampling, **scored(drawn)}
    drawn, _ = load_tensors(paths.samples(str(cell)) / "snapshots.safetensors")
    scores["over_training"] = [
        {"trained_images": trained, **scored({"images": images, "labels": drawn["labels"]})}
        for trained, images in zip(drawn["trained_images"].tolist(), drawn["images"], strict=True)
    ]
    scores |= measure_losses(cell, evaluate)
    write_json(paths.scores("evaluate", str(cell)), scores)
    tracking.publish(cell)


def score_set(net: Classifier, real: Gaussian, floors: dict[str, Any], drawn: dict[str, Tensor], min_scored: int) -> dict[str, Any]:
    """Scores of one set of samples.

    `fid` and `class_tv` are biased upwards in a small set, so they are left out below `min_scored` images, where `scored`
    is false; their floor holds for one N only and is null at another.

    Args:
        real: of the features of the test split.
        floors: metrics/reference/D.json.
        drawn: `images` (N, 1, H, W) uint8 and `labels` (N,) int64, the labels asked for; -1 where none was.
    """
    labels, N = drawn["labels"], len(drawn["labels"])
    features, probabilities = classify(net, map(to_float, drawn["images"].split(CHUNK)))
    histogram = class_histogram(probabilities)
    share, error = confident(probabilities)
    real_share = floors["confident"]["value"]
    scored = min_scored <= N
    scores: dict[str, Any] = {"images": N, "scored": scored}
    if scored:
        floor = floors["sets"].get(str(N))
        scores["fid"] = _score(*fid(real, features), floor and floor["fid"]["value"])
        tv = class_tv(floors["class_frequencies"], histogram)
        scores["class_tv"] = _score(*tv, floor and floor["class_tv"]["value"])
    unconditional = bool((labels < 0).any())
    scores["accuracy"] = None if unconditional else _score(*accuracy(labels, probabilities), floors["accuracy"]["value"])
    scores["confident"] = _score(share, error, real_share)
    scores["confident_ratio"] = _score(share / real_share, error / real_share, 1.0) if real_share else None
    scores["class_histogram"] = histogram.tolist()
    return scores


def measure_losses(cell: params.Cell, evaluate: params.Evaluate) -> dict[str, Any]:
    """Losses of the network, told the labels, on test images: the same images and noise in every cell of a dataset.

    `eps_mse` is the mean over t uniform in 0..T-1: a property of the schedule, no measure of quality. `logsnr_grid`
    compares across schedules, at levels inside the range that the schedule trains on.

    Raises:
        UserError: evaluate.images exceeds the test split.
    """
    test, _ = load_tensors(paths.prepared(cell.dataset) / "test.safetensors")
    n, wanted = len(test["labels"]), evaluate.images
    if wanted > n:
        raise UserError(f"params.yaml: evaluate.images = {wanted} must be at most {n}, the test images of {cell.dataset}")
    net, about = load_network(paths.weights(str(cell)) / "ema.safetensors")
    prediction = about["diffusion"]["prediction"]
    rng = torch.Generator().manual_seed(0)
    picked = torch.randperm(n, generator=rng)[:wanted]
    x0, y = to_float(test["images"][picked]), test["labels"][picked]

    # The t of different T are the same fraction of T.
    reference_size = about["diffusion"]["reference_size"]
    table = torch.from_numpy(noise_levels(cell.schedule, cell.T, size=about["size"], reference_size=reference_size))
    random_t = [table[(torch.rand(wanted, generator=rng, dtype=torch.float64) * cell.T).long()] for _ in range(evaluate.draws)]
    grid = [alpha_bar_of(torch.full((wanted,), level)) for level in evaluate.logsnr]
    levels = progress([*random_t, *grid], total=len(random_t) + len(grid), unit="level", label="losses")
    errors = [squared_errors(net, prediction, x0, y, alpha_bar, rng) for alpha_bar in levels]
    averaged = torch.stack([eps for _, eps in errors[: evaluate.draws]]).mean(0)  # (images,): draws of one image are no new images
    on_grid = [
        {"logsnr": level, "x0_mse": _mean(x0_errors), "eps_mse": _mean(eps_errors)}
        for level, (x0_errors, eps_errors) in zip(evaluate.logsnr, errors[evaluate.draws :], strict=True)
    ]
    return {"eps_mse": _mean(averaged), "logsnr_grid": on_grid}


@torch.inference_mode()
def squared_errors(
    net: UNet, prediction: Prediction, x0: Tensor, y: Tensor, alpha_bar: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Squared errors of x0_hat and of eps_hat, both (N,) float64, means over pixels; on the CPU.

    Args:
        x0: (N, 1, H, W) float32 in [-1, 1].
        y: (N,) int64 labels.
        alpha_bar: (N,) float64, the noise level of each image.
        rng: of the noise, on the CPU.
    """
    where = next(net.parameters()).device
    errors = []
    for x0_cpu, y_cpu, a in zip(x0.split(LOSS_CHUNK), y.split(LOSS_CHUNK), alpha_bar.split(LOSS_CHUNK), strict=True):
        eps = torch.randn(x0_cpu.shape, generator=rng).to(where)
        clean = x0_cpu.to(where)
        x_t = q_sample(clean, a, eps)
        output = net(x_t, logsnr(a).float().to(where), y_cpu.to(where))
        x0_hat, eps_hat = x0_and_eps(prediction, output, x_t, a)
        pairs = ((x0_hat, clean), (eps_hat, eps))
        errors.append(torch.stack([(hat.double() - true).square().mean(dim=(1, 2, 3)) for hat, true in pairs]).cpu())
    x0_errors, eps_errors = torch.cat(errors, dim=1)
    return x0_errors, eps_errors


def _mean(values: Tensor) -> Score:
    """Mean over images with its standard error; null for a single image, which has none."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return _score(values.mean().item(), error, None)


def _score(value: float, error: float | None, floor: float | None) -> Score:
    return {"value": value, "error": error, "floor": floor}


if __name__ == "__main__":
    run(main)
