"""Extractor, reference and evaluate on one small dataset: bars whose position is the class."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages import UserError, evaluate, extractor, reference
from stages.datasets.images import balanced_order, to_float
from stages.diffusion.likelihood import step_kl
from stages.diffusion.process import alpha_bar_of, logsnr
from stages.diffusion.schedules import SHARED_LEVELS, find, noise_levels
from stages.fidelity.frechet import Gaussian
from stages.networks.unet import UNet
from stages.pipeline import params, paths
from stages.pipeline.checkpoint import load_classifier, load_network, load_tensors, save_tensors
from stages.pipeline.stage import read_json

SIZE, CLASSES, N = 16, 3, 200
EXTRACTOR = params.Extractor(images=1600, batch=32, lr=3e-3, seed=0)
EVALUATE = params.Evaluate(images=96, draws=2, logsnr=[-2.0, 0.0, 3.0], min_scored=50)
NETWORK = params.Network(
    stem_resolution=16,
    base_channels=8,
    channel_mult=[1],
    blocks_per_level=1,
    attention_levels=[],
    conditional=True,
)


def bars(n: int, seed: int) -> dict[str, Tensor]:
    """Noisy images of one bright row, at a third of the height for each class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=rng)
    images = torch.randint(0, 100, (n, 1, SIZE, SIZE), generator=rng)
    images[torch.arange(n), 0, 3 + 5 * labels] += 120
    return {"images": images.to(torch.uint8), "labels": labels}


def save_network(cell: params.Cell, reference_size: int = SIZE, *, shared: bool = False) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(size=SIZE, num_classes=CLASSES, **NETWORK.model_dump())
        nn.init.normal_(net.head.weight, std=0.1)  # it starts at zero, where every level would look alike
    about = {
        "size": SIZE,
        "num_classes": CLASSES,
        "network": NETWORK.model_dump(),
        "diffusion": {"prediction": "v", "reference_size": reference_size, "zero_terminal_snr": False},
        "levels": SHARED_LEVELS if shared else [cell.schedule, cell.T],
        "train": {"shared": shared},
    }
    save_tensors(paths.weights(str(cell)) / "ema.safetensors", net.state_dict(), **about)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory where the extractor and the reference of the dataset `bars` are made."""
    folder = tmp_path_factory.mktemp("tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, drawn in (("train", bars(2 * N + 50, seed=0)), ("test", bars(120, seed=1))):
            save_tensors(paths.prepared("bars") / f"{split}.safetensors", drawn, class_names=["top", "middle", "bottom"])
        extractor.main("bars", EXTRACTOR)
        reference.main("bars", N, N // 4)
        yield folder


def score(drawn: dict[str, Tensor], min_scored: int = 50) -> dict[str, Any]:
    tensors, about = load_tensors(paths.reference("bars"))
    real = Gaussian(tensors["mean"].numpy(), tensors["cov"].numpy(), about["images"])
    floors = read_json(paths.scores("reference", "bars"))
    return evaluate.score_set(load_classifier(paths.extractor("bars")), real, tensors["features"], floors, drawn, min_scored)


def test_images_without_labels_are_told_apart_by_how_they_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 2 * N + 50), ("test", 120)):
        drawn = bars(n, seed=n)
        drawn["labels"] *= 0
        save_tensors(paths.prepared("flat") / f"{split}.safetensors", drawn, class_names=["unlabelled"])
    extractor.main("flat", EXTRACTOR)
    reference.main("flat", N, N // 4)
    images = bars(N, seed=7)["images"]
    labels = torch.zeros(N, dtype=torch.int64)
    tensors, about = load_tensors(paths.reference("flat"))
    real, floors = (
        Gaussian(tensors["mean"].numpy(), tensors["cov"].numpy(), about["images"]),
        read_json(paths.scores("reference", "flat")),
    )
    net = load_classifier(paths.extractor("flat"))
    upright, turned = (
        evaluate.score_set(net, real, tensors["features"], floors, {"images": x, "labels": labels}, 50)
        for x in (images, images.rot90(1, (2, 3)))
    )
    assert floors["class_frequencies"] == [1.0, 0.0, 0.0, 0.0]
    # A bar above the middle looks like one below it turned by half: of the four ways, two are told apart for sure.
    assert upright["accuracy"]["value"] > 0.4
    assert turned["accuracy"]["value"] < 0.1
    assert turned["fid"]["value"] > 10 * upright["fid"]["value"]


def test_turned_images_come_with_the_number_of_right_angles() -> None:
    images = torch.arange(8 * 9, dtype=torch.uint8).reshape(8, 1, 3, 3)
    found = extractor.turned(images)
    assert found["labels"].tolist() == [0, 1, 2, 3] * 2
    for image, before, turns in zip(found["images"], images, found["labels"].tolist(), strict=True):
        assert torch.equal(image, before.rot90(turns, (1, 2)))


def test_extractor_learns_and_repeats_itself(tree: Path) -> None:
    scores = read_json(paths.scores("extractor", "bars"))
    assert scores["accuracy"]["value"] > 0.95
    assert scores["features"] == 128
    before = paths.extractor("bars").read_bytes()
    extractor.main("bars", EXTRACTOR)
    assert paths.extractor("bars").read_bytes() == before
    assert read_json(paths.scores("extractor", "bars")) == scores


def test_extractor_stops_at_a_loss_that_is_no_number() -> None:
    train = bars(64, seed=0)
    with pytest.raises(UserError, match=r"the loss is nan at step \d+ of 50; lower extractor.lr = 1e\+30"):
        extractor.fit(train["images"], train["labels"], CLASSES, EXTRACTOR.model_copy(update={"lr": 1e30}))


def test_reference_measures_disjoint_draws_of_n(tree: Path) -> None:
    floors = read_json(paths.scores("reference", "bars"))
    assert floors["test_images"] == 120
    few, many = floors["sets"][str(N // 4)], floors["sets"][str(N)]
    assert (few["draws"], many["draws"]) == (8, 2)
    assert few["fid"]["value"] > many["fid"]["value"] > 0 < many["fid"]["error"]  # FID falls with N
    assert floors["accuracy"] == read_json(paths.scores("extractor", "bars"))["accuracy"]
    labels = load_tensors(paths.prepared("bars") / "test.safetensors")[0]["labels"]
    assert floors["class_frequencies"] == pytest.approx((labels.bincount(minlength=CLASSES) / 120).tolist())


def test_every_stretch_of_the_balanced_order_holds_the_classes_at_their_frequencies() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    order = balanced_order(labels, torch.Generator().manual_seed(0))
    assert order.sort().values.tolist() == list(range(1000))
    for stretch in order.split(100):  # both ends of a stretch may gain or lose an image of a class
        assert labels[stretch].bincount() == pytest.approx(torch.tensor([50, 30, 20]), abs=2)
    within = order[labels[order] == 0]
    assert not within.equal(within.sort().values)


def test_reference_refuses_more_images_than_there_are(tree: Path) -> None:
    with pytest.raises(UserError, match=r"sample.images = 451 must be at most 450"):
        reference.main("bars", 451, 50)


def test_real_images_score_near_the_floor_and_spoilt_ones_do_not(tree: Path) -> None:
    real = bars(N, seed=2)
    good = score(real)
    assert good["fid"]["value"] < good["fid"]["floor"] + 3 * good["fid"]["error"]
    assert good["accuracy"]["value"] > 0.95
    assert good["accuracy"]["floor"] == read_json(paths.scores("reference", "bars"))["accuracy"]["value"]
    spoilt = score({"images": real["images"].flip(2), "labels": real["labels"]})  # upside down: top becomes bottom
    assert spoilt["accuracy"]["value"] < 0.6
    one_class = real["labels"] == 0
    collapsed = score({key: value[one_class].repeat(8, *[1] * (value.ndim - 1))[:N] for key, value in real.items()})
    assert collapsed["class_tv"]["value"] > 0.5
    assert collapsed["fid"]["value"] > 5 * good["fid"]["floor"]
    assert collapsed["recall"]["value"] < 0.7 * good["recall"]["value"]


def test_set_scores_say_what_they_cannot_know(tree: Path) -> None:
    small = score(bars(40, seed=3))
    assert small["scored"] is False
    assert not {"fid", "class_tv", "precision", "recall"} & small.keys()
    assert sum(small["class_histogram"]) == small["images"] == 40
    other = score(bars(60, seed=3))
    assert other["scored"] is True
    assert other["fid"]["floor"] is other["class_tv"]["floor"] is None  # they were measured at another N
    unlabelled = bars(60, seed=3) | {"labels": torch.full((60,), -1)}
    assert score(unlabelled)["accuracy"] is None


class Silent(nn.Module):
    """A network that always says zero."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x_t: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


class Informed(Silent):
    """The exact v of images that are -0.5 everywhere."""

    def forward(self, x_t: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
        a = logsnr.double().sigmoid().reshape(-1, 1, 1, 1)
        eps = (x_t + 0.5 * a.sqrt()) / (1 - a).sqrt()
        return (a.sqrt() * eps + 0.5 * (1 - a).sqrt()).float()


def errors_of(net: nn.Module, prediction: str, level: float) -> tuple[Tensor, Tensor]:
    x0, y = torch.full((300, 1, 8, 8), -0.5), torch.zeros(300, dtype=torch.long)
    alpha_bar = alpha_bar_of(torch.full((300,), level))
    x0_hat, eps_errors = evaluate.predict(net, prediction, x0, y, alpha_bar, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return (x0_hat.double() - x0).square().flatten(1).mean(1), eps_errors


def test_errors_of_known_networks() -> None:
    x0_errors, eps_errors = errors_of(Silent(), "x0", 1.0)
    assert x0_errors == pytest.approx(torch.full((300,), 0.25, dtype=torch.float64))
    x0_errors, eps_errors = errors_of(Silent(), "eps", 1.0)
    assert eps_errors.mean() == pytest.approx(1, abs=5 * (2 / (300 * 64)) ** 0.5)  # a mean of squared normals
    x0_errors, eps_errors = errors_of(Informed(), "v", 1.0)
    assert max(x0_errors.max(), eps_errors.max()) < 1e-10  # float32 rounding, squared: (1e-6)^2 and room


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_both_errors_differ_by_the_signal_to_noise_ratio(prediction: str) -> None:
    # x_t fixes one by the other: x0_hat - x0 = -(sigma / alpha) (eps_hat - eps); float32, hence 1e-4.
    x0_errors, eps_errors = errors_of(Silent(), prediction, 1.5)
    assert eps_errors == pytest.approx(x0_errors * torch.tensor(1.5).exp().double(), rel=1e-4)


def test_grid_compares_across_schedules_and_eps_mse_does_not(tree: Path) -> None:
    cells = [params.Cell("bars", "cosine", 50, 0), params.Cell("bars", "linear", 100, 0)]
    for cell in cells:
        save_network(cell)
    first, second = (evaluate.measure_losses(cell, EVALUATE) for cell in cells)
    assert first["logsnr_grid"] == second["logsnr_grid"]
    assert [point["logsnr"] for point in first["logsnr_grid"]] == EVALUATE.logsnr
    assert first["eps_mse"]["value"] != second["eps_mse"]["value"]
    assert first["eps_mse"]["error"] > 0
    assert first["bits_per_dim"]["value"] != second["bits_per_dim"]["value"]
    with pytest.raises(UserError, match=r"evaluate.images = 121 must be at most 120, the test images of bars"):
        evaluate.measure_losses(cells[0], EVALUATE.model_copy(update={"images": 121}))


def test_losses_are_measured_at_levels_that_the_network_knows(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = params.Cell("bars", "linear", 100, 0)  # log-SNR -10.1 to 6.9 at the size that the schedule is for
    asked = EVALUATE.model_copy(update={"logsnr": [-12.0, -9.0, 5.0, 8.0]})
    visited: list[float] = []
    predict = evaluate.predict

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        visited.extend(logsnr(args[4]).tolist())
        return predict(*args)

    monkeypatch.setattr(evaluate, "predict", watched)
    for reference_size, shift in ((SIZE, 0.0), (SIZE // 2, -math.log(2))):  # twice as wide: half the SNR
        save_network(cell, reference_size)
        visited.clear()
        found = evaluate.measure_losses(cell, asked)
        lowest, highest = logsnr(torch.from_numpy(find("linear")(100)))[[-1, 0]] + shift
        assert [point["logsnr"] for point in found["logsnr_grid"]] == [x for x in asked.logsnr if lowest <= x <= highest]
        assert max(visited) == pytest.approx(highest.item())
        assert min(visited) < lowest + 1
        assert min(visited) >= lowest - 1e-6


def test_a_shared_network_knows_levels_that_the_schedule_of_its_cell_does_not_have(tree: Path) -> None:
    cell = params.Cell("bars", "linear", 100, 0)
    asked = EVALUATE.model_copy(update={"logsnr": [-12.0, -9.0, 5.0, 8.0, 20.0]})
    save_network(cell, shared=True)
    found = evaluate.measure_losses(cell, asked)
    assert [point["logsnr"] for point in found["logsnr_grid"]] == asked.logsnr[:-1]
    assert found["network"] == "shared"


def test_bound_estimated_by_draws_is_the_sum_over_every_t(tree: Path) -> None:
    cell = params.Cell("bars", "cosine", 20, 0)
    save_network(cell)
    everything = EVALUATE.model_copy(update={"images": 120})
    few, many = (evaluate.measure_losses(cell, everything.model_copy(update={"draws": n}))["bits_of_steps"] for n in (4, 64))
    net, _ = load_network(paths.weights(str(cell)) / "ema.safetensors")
    test, _ = load_tensors(paths.prepared("bars") / "test.safetensors")
    x0, rng = to_float(test["images"]), torch.Generator().manual_seed(1)
    table = torch.from_numpy(noise_levels("cosine", 20, size=SIZE, reference_size=SIZE, zero_terminal_snr=False))
    total = torch.zeros(120, dtype=torch.float64)
    for t in range(1, 20):
        x0_hat, _ = evaluate.predict(net, "v", x0, test["labels"], table[t].expand(120), rng)
        total += step_kl((x0_hat.double() - x0).square().flatten(1).mean(1), table[t], table[t - 1])
    expected = total.mean().item() / math.log(2)
    assert many["value"] == pytest.approx(expected, rel=0.01)
    assert few["value"] == pytest.approx(expected, abs=4 * few["error"])
    assert few["error"] > many["error"]


def test_main_writes_whole_scores_and_then_publishes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = params.Cell("bars", "cosine", 50, 0)
    save_network(cell)
    for name, n in (("fast", N), ("ancestral", 20)):
        save_tensors(paths.samples(str(cell)) / f"{name}.safetensors", bars(n, seed=4), sampler="ddim", steps=5)
    snapshots = {"images": torch.stack([bars(50, seed=5)["images"]] * 4), "labels": bars(50, seed=5)["labels"]}
    trained = torch.tensor([25, 50, 75, 100])
    save_tensors(paths.samples(str(cell)) / "snapshots.safetensors", {**snapshots, "trained_images": trained})
    published = []
    monkeypatch.setattr(
        evaluate.tracking, "publish", lambda cell: published.append(paths.scores("evaluate", str(cell)).read_bytes())
    )
    evaluate.main(cell, EVALUATE)
    evaluate.main(cell, EVALUATE)
    assert published[0] == published[1]
    scores = json.loads(published[0])
    bits = {"bits_per_dim", "bits_of_prior", "bits_of_steps", "bits_of_decoder"}
    assert scores.keys() == {"fast", "ancestral", "over_training", "eps_mse", "logsnr_grid", "network", *bits}
    assert scores["bits_per_dim"]["value"] == pytest.approx(sum(scores[name]["value"] for name in bits - {"bits_per_dim"}))
    assert [point["trained_images"] for point in scores["over_training"]] == [25, 50, 75, 100]
    floors = read_json(paths.scores("reference", "bars"))["sets"]["50"]
    assert all(point["fid"]["floor"] == floors["fid"]["value"] for point in scores["over_training"])
    assert scores["fast"]["sampling"] == {"sampler": "ddim", "steps": 5}
    assert scores["network"] == "own"
    assert scores["fast"]["scored"]
    assert not scores["ancestral"]["scored"]
    for name in ("fid", "class_tv", "precision", "recall", "accuracy", "confident", "confident_ratio"):
        assert scores["fast"][name].keys() == {"value", "error", "floor"}
