"""Score the samples and the network of a cell; publish the cell to MLflow.

Reads samples/CELL, the final weights, the test split, the extractor and the reference; writes metrics/evaluate/CELL.json.
Beside the two sets also those of the averages at each quarter of the last phase of training: would training longer pay?
A score is {value, error, floor}: the error is one standard error, the floor is the same score of real images; null where
there is none.
Run: python -m stages.evaluate CELL
"""

import math
from typing import Any

import torch
from torch import Tensor

from stages import UserError
from stages.datasets.images import to_float
from stages.diffusion.likelihood import decoder_nll, prior_kl, step_chances, step_kl
from stages.diffusion.process import Prediction, alpha_bar_of, logsnr, q_sample, x0_and_eps
from stages.diffusion.schedules import noise_levels, shared_levels
from stages.fidelity.agreement import accuracy, class_histogram, class_tv, confident
from stages.fidelity.frechet import Gaussian, fid
from stages.fidelity.manifold import precision_recall
from stages.networks.classifier import CHUNK, Classifier, classify
from stages.networks.unet import UNet
from stages.pipeline import params, paths, tracking
from stages.pipeline.checkpoint import load_classifier, load_network, load_tensors
from stages.pipeline.stage import progress, read_json, run, write_json

LOSS_CHUNK = 256  # images at a time, for the network and for the likelihood

Score = dict[str, float | None]


def main(cell: params.Cell, evaluate: params.Evaluate) -> None:
    """Score both sets, measure the losses, write, publish."""
    classifier = load_classifier(paths.extractor(cell.dataset))
    reference, about = load_tensors(paths.reference(cell.dataset))
    real = Gaussian(reference["mean"].numpy(), reference["cov"].numpy(), about["images"])
    floors = read_json(paths.scores("reference", cell.dataset))

    def scored(drawn: dict[str, Tensor]) -> dict[str, Any]:
        return score_set(classifier, real, reference["features"], floors, drawn, evaluate.min_scored)

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


def score_set(
    net: Classifier, real: Gaussian, real_features: Tensor, floors: dict[str, Any], drawn: dict[str, Tensor], min_scored: int
) -> dict[str, Any]:
    """Scores of one set of samples.

    `fid`, `class_tv`, `precision` and `recall` depend on N, so they are left out below `min_scored` images, where `scored`
    is false; their floor holds for one N only and is null at another.

    Args:
        real: of the features of the test split.
        real_features: (N, D), of as many test images, or of all where there are fewer; classes at their frequencies.
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
        for name, found in zip(("precision", "recall"), precision_recall(real_features[:N], features), strict=True):
            scores[name] = _score(*found, floor and floor[name]["value"])
    unconditional = bool((labels < 0).any())
    scores["accuracy"] = None if unconditional else _score(*accuracy(labels, probabilities), floors["accuracy"]["value"])
    scores["confident"] = _score(share, error, real_share)
    scores["confident_ratio"] = _score(share / real_share, error / real_share, 1.0) if real_share else None
    scores["class_histogram"] = histogram.tolist()
    return scores


def measure_losses(cell: params.Cell, evaluate: params.Evaluate) -> dict[str, Any]:
    """Losses of the network, told the labels, on test images: the same images in every cell of a dataset.

    Each image gets the same normal draws in every cell, but at noise levels that differ with schedule and T; on `logsnr_grid` the
    levels are the same too. The decoder is drawn last: where the grid is shorter, its normal draws are others.

    `eps_mse` is the mean over t uniform in 0..T-1: a property of the schedule, no measure of quality. `logsnr_grid`
    compares across schedules, at those of its levels that the network was trained at. `bits_per_dim` is the variational bound
    on the negative log-likelihood of the images, given their labels, and its three parts.

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
    how = {name: about["diffusion"][name] for name in ("reference_size", "zero_terminal_snr")}
    table = torch.from_numpy(noise_levels(cell.schedule, cell.T, size=about["size"], **how))
    learned = torch.from_numpy(shared_levels(size=about["size"], **how)) if about["train"]["shared"] else table
    noisiest, cleanest = logsnr(learned[[-1, 0]]).tolist()
    grid = [level for level in evaluate.logsnr if noisiest <= level <= cleanest]

    # Draw k of an image takes its u from the k-th part of [0, 1), the same in every cell: for eps_mse the same part of the chain.
    def stratified() -> Tensor:
        u = [
            (torch.randperm(wanted, generator=rng) + torch.rand(wanted, generator=rng, dtype=torch.float64)) / wanted for _ in draws
        ]
        return torch.stack([(k + part) / len(draws) for k, part in zip(draws, u, strict=True)])

    draws = range(evaluate.draws)
    chance = step_chances(table)
    bound_t = torch.searchsorted(chance.cumsum(0), stratified(), right=True).clamp(max=cell.T - 1)
    levels = [*table[(stratified() * cell.T).long()], *table[bound_t]]
    levels += [alpha_bar_of(torch.full((wanted,), level)) for level in grid]
    levels.append(table[:1].expand(wanted))
    bar = progress(levels, total=len(levels), unit="level", label="losses")
    x0_errors, eps_errors = [], []
    for alpha_bar in bar:
        x0_hat, eps_error = predict(net, prediction, x0, y, alpha_bar, rng)
        x0_errors.append((x0_hat.double() - x0).square().flatten(1).mean(1))
        eps_errors.append(eps_error)
    on_grid = [
        {"logsnr": level, "x0_mse": _mean(x0_errors[k]), "eps_mse": _mean(eps_errors[k])}
        for k, level in enumerate(grid, start=2 * len(draws))
    ]

    # The bound: the decoder stands for t = 0, which counts for nothing among the steps. Draws of one image are no new images.
    drawn = zip(x0_errors[len(draws) :], bound_t, strict=False)
    steps = torch.stack([step_kl(error, table[t], table[t - 1]) / chance[t] for error, t in drawn]).mean(0)
    chunks = zip(x0.split(LOSS_CHUNK), x0_hat.split(LOSS_CHUNK), alpha_bar.split(LOSS_CHUNK), strict=True)
    decoder = torch.cat([decoder_nll(*chunk) for chunk in chunks])
    parts = {"prior": prior_kl(x0, table[-1]), "steps": steps, "decoder": decoder}
    return {
        "eps_mse": _mean(torch.stack(eps_errors[: len(draws)]).mean(0)),
        "bits_per_dim": _mean(sum(parts.values(), torch.zeros(())) / math.log(2)),
        **{f"bits_of_{name}": _mean(nats / math.log(2)) for name, nats in parts.items()},
        "logsnr_grid": on_grid,
        "network": "shared" if about["train"]["shared"] else "own",
    }


@torch.inference_mode()
def predict(
    net: UNet, prediction: Prediction, x0: Tensor, y: Tensor, alpha_bar: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x0_hat, (N, 1, H, W) float32, and the squared error of eps_hat, mean over pixels, (N,) float64; both on the CPU.

    Args:
        x0: (N, 1, H, W) float32 in [-1, 1].
        y: (N,) int64 labels.
        alpha_bar: (N,) float64, the noise level of each image.
        rng: of the noise, on the CPU.
    """
    where = next(net.parameters()).device
    predicted, errors = [], []
    for clean, label, a in zip(x0.split(LOSS_CHUNK), y.split(LOSS_CHUNK), alpha_bar.split(LOSS_CHUNK), strict=True):
        eps = torch.randn(clean.shape, generator=rng)
        x_t = q_sample(clean, a, eps)
        output = net(x_t.to(where), logsnr(a).float().to(where), label.to(where)).cpu()
        x0_hat, eps_hat = x0_and_eps(prediction, output, x_t, a)
        predicted.append(x0_hat)
        errors.append((eps_hat.double() - eps).square().flatten(1).mean(1))
    return torch.cat(predicted), torch.cat(errors)


def _mean(values: Tensor) -> Score:
    """Mean over images with its standard error; null for a single image, which has none."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return _score(values.mean().item(), error, None)


def _score(value: float, error: float | None, floor: float | None) -> Score:
    return {"value": value, "error": error, "floor": floor}


if __name__ == "__main__":
    run(main)
