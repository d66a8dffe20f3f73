"""Score the samples and the network of a cell.

Reads samples/CELL, the final weights, the test split, the extractor and the reference; writes metrics/evaluate/CELL.json.
A score is {value, error, floor}: the error is one standard error, the floor is the same score of real images; null where
there is none, and `not_measured` says why.
Run: python -m stages.evaluate CELL
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stages.datasets.images import to_float
from stages.diffusion.likelihood import decoder_nll, prior_kl, step_chances, step_kl
from stages.diffusion.process import Prediction, alpha_bar_of, logsnr, q_sample, x0_and_eps
from stages.diffusion.schedules import noise_levels
from stages.drawing.network import load_network
from stages.drawing.weights import load_tensors
from stages.fidelity.class_tv import class_histogram
from stages.fidelity.frechet import Gaussian, fit_gaussian, frechet_distance
from stages.fidelity.manifold import K
from stages.fidelity.metrics import METRICS, Metric, Score
from stages.fidelity.sets import Fake, Real
from stages.networks.classifier import CHUNK, Classifier, classify
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, params, paths
from stages.pipeline.checkpoint import load_classifier
from stages.pipeline.files import read_json, write_json
from stages.pipeline.stage import progress, run
from stages.tracking.mirror import Scored

LOSS_CHUNK = 256  # images at a time, for the network and for the likelihood

Json = dict[str, Any]


def main(cell: params.Cell, evaluate: params.Evaluate, train__threads: int) -> None:
    """Score the sets, measure the losses, write."""
    torch.set_num_threads(train__threads)
    judge = Judge.load(cell.dataset)
    scores: Json = {}
    for name in ("fast", "ancestral"):
        drawn, sampling = load_tensors(paths.samples(str(cell)) / f"{name}.safetensors")
        scores[name] = {"sampling": sampling, **score_set(judge, drawn["images"], drawn["labels"], evaluate.min_scored)}
    scores |= measure_losses(cell, evaluate)
    scores["machines"] = {**judge.machines, "train": sampling["trained_on"]}
    scores["machines"] |= {"sample": [sampling["machine"]], "evaluate": [checkpoint.machine()]}
    write_json(paths.scores("evaluate", str(cell)), scores)


@dataclass(frozen=True)
class Judge:
    """What the samples of a dataset are scored with.

    Attributes:
        validation: fitted to the features of the validation split, for choices.
        floors: what metrics/reference/D.json holds.
        machines: that made classifier and reference.
    """

    classifier: Classifier
    real: Real
    validation: Gaussian
    floors: Json
    machines: Json

    @classmethod
    def load(cls, dataset: str) -> "Judge":
        """From the files of the stages `extractor` and `reference`."""
        tensors, about = load_tensors(paths.reference(dataset))
        floors = read_json(paths.scores("reference", dataset))
        gaussian = Gaussian(tensors["mean"].numpy(), tensors["cov"].numpy(), about["images"])
        validation = Gaussian(tensors["validation_mean"].numpy(), tensors["validation_cov"].numpy(), floors["validation_images"])
        shares = {name: floors[name]["value"] for name in floors.keys() & METRICS.keys() if floors[name]}
        real = Real(gaussian, tensors["features"], np.array(floors["class_frequencies"]), shares)
        return cls(load_classifier(paths.extractor(dataset)), real, validation, floors, about["machines"])

    def neighbours(self, n: int) -> int:
        """How many of n samples, and of real images, precision and recall compare."""
        return int(self.floors["sets"].get(str(n), {}).get("neighbours", min(n, self.real.gaussian.n)))

    def why_not(self, metric: Metric, n: int, min_scored: int) -> str:
        """Why a metric says nothing of n samples; empty where it does."""
        if not metric.depends_on_n:
            return ""
        if n < min_scored:
            return f"{n} samples are fewer than evaluate.min_scored = {min_scored}"
        if metric.of_covariance and self.real.gaussian.n < min_scored:
            return f"the test split has {self.real.gaussian.n} images, fewer than evaluate.min_scored = {min_scored}"
        if metric.of_neighbours and self.neighbours(n) <= K:
            return f"validation and test have too few images for sets with {K + 1} of each class"
        return ""

    def why_no_floor(self, n: int) -> str:
        """Why there is no floor of a set of n."""
        largest = self.floors["sets"].get(str(n), {}).get("largest")
        if largest is None:
            return f"no floor of {n} images was measured"
        return f"the validation split gives sets of at most {largest} images, at the frequencies of the classes, not of {n}"

    def floor(self, name: str, n: int) -> float | None:
        """What real images score: n of them, where the metric depends on how many; None where that was not measured."""
        metric = METRICS[name]
        if metric.floor is not None:
            return metric.floor
        floor = self.floors["sets"].get(str(n), {}).get(name) if metric.depends_on_n else self.floors[name]
        return floor["value"] if floor else None


def score_set(judge: Judge, images: Tensor, labels: Tensor, min_scored: int) -> Json:
    """Scores of one set of samples.

    Metrics that depend on N are null below `min_scored` images, where `scored` is false; their floor holds for one N only and is
    null at another. `not_measured` says of each score, or floor, that is null why. `validation_fid` is FID against the validation
    split: for choices, whatever the number of its images, so without a floor.

    Args:
        judge: of the dataset.
        images: (N, 1, H, W) uint8.
        labels: (N,) int64, the labels asked for; -1 where none was.
        min_scored: at least 4.
    """
    fake = Fake(*classify(judge.classifier, map(to_float, images.split(CHUNK))), labels)
    some = fake.part(0, judge.neighbours(fake.n))
    scores: Json = {"images": fake.n, "scored": min_scored <= fake.n}
    missing: dict[str, str] = {}
    for name, metric in METRICS.items():
        why = judge.why_not(metric, fake.n, min_scored)
        found = None if why else metric.measure(judge.real, some if metric.of_neighbours else fake)
        scores[name] = found and Score(*found, judge.floor(name, fake.n)).to_json()
        if found is None:
            missing[name] = why or metric.undefined
        elif metric.depends_on_n and scores[name]["floor"] is None:
            missing[f"{name}_floor"] = judge.why_no_floor(fake.n)
    if scores["scored"]:
        choice = frechet_distance(judge.validation, fit_gaussian(fake.features))
        scores |= {"validation_fid": Score(choice).to_json(), "neighbours": some.n}
    return scores | {"not_measured": missing, "class_histogram": class_histogram(fake.probabilities).tolist()}


def measure_losses(cell: params.Cell, evaluate: params.Evaluate) -> Json:
    """Losses of the network, told the labels, on test images: the same images in every cell of a dataset.

    Which images, and what is drawn for them, is decided by evaluate.seed. Each image gets the same normal draws in every cell, but
    at noise levels that differ with schedule and T; on `logsnr_grid` the levels are the same too. The decoder is drawn last: where
    the grid is shorter, its normal draws are others.

    `eps_mse` is the mean over t uniform in 0..T-1: a property of the schedule, no measure of quality. `logsnr_grid`
    compares across schedules, at those of its levels that the network was trained at. `bits_per_dim` is the variational bound
    on the negative log-likelihood of the images, given their labels, and its three parts.
    """
    rng = torch.Generator().manual_seed(evaluate.seed)
    x0, y = pick_images(cell.dataset, evaluate.images, rng)
    net, about = load_network(paths.weights(str(cell.training)) / "ema.safetensors")
    table, grid = known_levels(cell, about, evaluate.logsnr)
    levels = draw_levels(table, grid, evaluate.draws, len(x0), rng)

    # The order of the draws: all levels above, then the noise at each of them, then that of the decoder.
    predict_at: Predict = functools.partial(predict, net, about["diffusion"]["prediction"], x0, y, rng=rng)
    x0_errors, eps_errors = errors_at(predict_at, x0, levels.alpha_bar)
    first = table[:1].expand(len(x0))
    x0_hat, _ = predict_at(first)

    nats = {
        "prior": prior_kl(x0, table[-1]),
        "steps": nats_of_steps(levels.of_bound(x0_errors), levels.bound_t, table),
        "decoder": nats_of_decoder(x0, x0_hat, first),
    }
    return {
        "eps_mse": mean_score(levels.of_uniform(eps_errors).mean(0)),
        "bits_per_dim": mean_score(sum(nats.values(), torch.zeros(())) / math.log(2)),
        **{f"bits_of_{name}": mean_score(part / math.log(2)) for name, part in nats.items()},
        "logsnr_grid": [
            {"logsnr": level, "x0_mse": mean_score(x0_error), "eps_mse": mean_score(eps_error)}
            for level, x0_error, eps_error in zip(grid, levels.of_grid(x0_errors), levels.of_grid(eps_errors), strict=True)
        ],
        "network": "shared" if about["train"]["shared"] else "own",
        "train_images": about["images"],
        "loss_images": len(x0),
    }


def pick_images(dataset: str, wanted: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Test images, (N, 1, H, W) float32 in [-1, 1], and their labels, (N,) int64; N = wanted, or all if they are fewer."""
    test, _ = load_tensors(paths.prepared(dataset) / "test.safetensors")
    picked = torch.randperm(len(test["labels"]), generator=rng)[:wanted]
    return to_float(test["images"][picked]), test["labels"][picked]


def known_levels(cell: params.Cell, about: Json, asked: list[float]) -> tuple[Tensor, list[float]]:
    """alpha_bar of the cell's chain, (T,) float64, and those of the log-SNRs asked for that the network was trained at.

    Args:
        cell: it names schedule and T.
        about: what the file of the weights says of the network.
        asked: log-SNRs.
    """
    how = {name: about["diffusion"][name] for name in ("reference_size", "zero_terminal_snr")}
    table = torch.from_numpy(noise_levels(cell.schedule, cell.T, size=about["size"], **how))
    noisiest, cleanest = about["logsnr"]
    return table, [level for level in asked if noisiest <= level <= cleanest]


class Levels(NamedTuple):
    """The noise levels at which N images are asked about: draws of t, uniform ones and those of the bound, and a grid."""

    bound_t: Tensor
    """(draws, N) int64, the t drawn for the bound."""
    alpha_bar: Tensor
    """(2 draws + grid, N) float64: at uniform t, at `bound_t`, on the grid."""

    def of_uniform(self, values: Tensor) -> Tensor:
        """Those of values, (2 draws + grid, N), that belong to t uniform in 0..T-1: (draws, N)."""
        return values[: len(self.bound_t)]

    def of_bound(self, values: Tensor) -> Tensor:
        """Those that belong to `bound_t`: (draws, N)."""
        return values[len(self.bound_t) : 2 * len(self.bound_t)]

    def of_grid(self, values: Tensor) -> Tensor:
        """Those that belong to the grid: (grid, N)."""
        return values[2 * len(self.bound_t) :]


def draw_levels(table: Tensor, grid: list[float], draws: int, N: int, rng: torch.Generator) -> Levels:
    """Noise levels for N images: `draws` of each kind of t for every image, and the grid, the same for all.

    Args:
        table: (T,) float64, alpha_bar.
        grid: log-SNRs.
        draws: how many.
        N: of images.
        rng: the t of the bound are drawn first.
    """
    T = len(table)
    bound_t = torch.searchsorted(step_chances(table).cumsum(0), stratified(draws, N, rng), right=True).clamp(max=T - 1)
    uniform_t = (stratified(draws, N, rng) * T).long()
    on_grid = [alpha_bar_of(torch.full((N,), level)) for level in grid]
    return Levels(bound_t, torch.stack([*table[uniform_t], *table[bound_t], *on_grid]))


def stratified(draws: int, N: int, rng: torch.Generator) -> Tensor:
    """Numbers in [0, 1), (draws, N) float64: draw k of every image lies in the k-th part, in one of its N strata.

    So draw k of an image is about the same part of the chain in every cell.
    """
    parts = [(torch.randperm(N, generator=rng) + torch.rand(N, generator=rng, dtype=torch.float64)) / N for _ in range(draws)]
    return torch.stack([(k + part) / draws for k, part in enumerate(parts)])


Predict = Callable[[Tensor], tuple[Tensor, Tensor]]
"""alpha_bar, (N,) -> what `predict` says of the images at these noise levels."""


def errors_at(predict_at: Predict, x0: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of x0_hat and of eps_hat, mean over pixels, each (L, N) float64, at L noise levels of every image.

    Args:
        predict_at: it draws noise in the order of the levels.
        x0: (N, 1, H, W) float32 in [-1, 1].
        alpha_bar: (L, N) float64.
    """
    x0_errors, eps_errors = [], []
    for level in progress(alpha_bar, total=len(alpha_bar), unit="level", label="losses"):
        x0_hat, eps_error = predict_at(level)
        x0_errors.append((x0_hat.double() - x0).square().flatten(1).mean(1))
        eps_errors.append(eps_error)
    return torch.stack(x0_errors), torch.stack(eps_errors)


def nats_of_steps(x0_errors: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """What the steps count for in the bound, (N,) float64: the mean over draws of t, which are no new images.

    Args:
        x0_errors: (draws, N) float64, of x0_hat at t.
        t: (draws, N) int64, drawn by `step_chances`: never 0, where the decoder stands.
        table: (T,) float64, alpha_bar.
    """
    return (step_kl(x0_errors, table[t], table[t - 1]) / step_chances(table)[t]).mean(0)


def nats_of_decoder(x0: Tensor, x0_hat: Tensor, alpha_bar: Tensor) -> Tensor:
    """What the decoder, which stands for t = 0, counts for in the bound, (N,) float64; in chunks, for its memory."""
    chunks = zip(x0.split(LOSS_CHUNK), x0_hat.split(LOSS_CHUNK), alpha_bar.split(LOSS_CHUNK), strict=True)
    return torch.cat([decoder_nll(*chunk) for chunk in chunks])


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


def mean_score(values: Tensor) -> Json:
    """Mean over images, (N,), with its standard error; null for a single image, which has none. Losses have no floor."""
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return Score(values.mean().item(), error).to_json()


if __name__ == "__main__":
    run(main, Scored)
