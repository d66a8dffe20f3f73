"""Extractor, reference and evaluate on one small dataset: bars whose position is the class."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages import evaluate, extractor, reference
from stages.datasets.images import balanced_order, to_float
from stages.diffusion.likelihood import step_kl
from stages.diffusion.process import alpha_bar_of, logsnr
from stages.diffusion.schedules import find, noise_levels, shared_levels
from stages.drawing.network import load_network
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.fidelity.rounding import rounded
from stages.fidelity.sets import Fake
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, params, paths
from stages.pipeline.checkpoint import save_tensors
from stages.pipeline.files import read_json
from stages.tracking import provenance

ROOT = Path(__file__).parents[1]
SIZE, CLASSES, N = 16, 3, 200
EXTRACTOR = params.Extractor(images=1600, batch=32, lr=3e-3, seed=0)
EVALUATE = params.Evaluate(images=96, draws=2, logsnr=[-2.0, 0.0, 3.0], min_scored=50, seed=0)
SIZES = (N, 20, 50, 1)  # of the fast and the T-step sets, from where on they are scored; threads
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
    how = {"size": SIZE, "reference_size": reference_size}
    alpha_bar = shared_levels(**how) if shared else noise_levels(cell.schedule, cell.T, **how)
    about = {
        "size": SIZE,
        "num_classes": CLASSES,
        "network": NETWORK.model_dump(),
        "diffusion": {"prediction": "v", "reference_size": reference_size, "zero_terminal_snr": False},
        "logsnr": logsnr(torch.from_numpy(alpha_bar)[[-1, 0]]).tolist(),
        "train": {"shared": shared},
        "machines": [checkpoint.machine()],
        "images": 100,
    }
    save_tensors(paths.weights(str(cell.training)) / "ema.safetensors", net.state_dict(), **about)


MADE = {"network_evaluations": 5, "machine": checkpoint.machine(), "trained_on": [checkpoint.machine()]}


def save_samples(cell: params.Cell) -> None:
    for name, n in (("fast", N), ("ancestral", 20)):
        save_tensors(paths.samples(str(cell)) / f"{name}.safetensors", bars(n, seed=4), sampler="ddim", steps=5, **MADE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory where the extractor and the reference of the dataset `bars` are made."""
    folder = tmp_path_factory.mktemp("tree")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for split, n, seed in (("train", 2 * N, 0), ("validation", 2 * N + 50, 6), ("test", 120, 1)):
            names = ["top", "middle", "bottom"]
            save_tensors(paths.prepared("bars") / f"{split}.safetensors", bars(n, seed), class_names=names)
        extractor.main("bars", EXTRACTOR, 1)
        reference.main("bars", *SIZES)
        yield folder


def score(drawn: dict[str, Tensor], min_scored: int = 50) -> dict[str, Any]:
    return evaluate.score_set(evaluate.Judge.load("bars"), drawn["images"], drawn["labels"], min_scored)


def test_images_without_labels_are_told_apart_by_how_they_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, n in (("train", 2 * N + 50), ("validation", 2 * N), ("test", 120)):
        drawn = bars(n, seed=n)
        drawn["labels"] *= 0
        save_tensors(paths.prepared("flat") / f"{split}.safetensors", drawn, class_names=["unlabelled"])
    extractor.main("flat", EXTRACTOR, 1)
    reference.main("flat", *SIZES)
    images = bars(N, seed=7)["images"]
    labels = torch.zeros(N, dtype=torch.int64)
    judge = evaluate.Judge.load("flat")
    upright, turned = (evaluate.score_set(judge, x, labels, 50) for x in (images, images.rot90(1, (2, 3))))
    assert judge.real.class_frequencies.tolist() == [1.0, 0.0, 0.0, 0.0]
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
    extractor.main("bars", EXTRACTOR, 1)
    assert paths.extractor("bars").read_bytes() == before
    assert read_json(paths.scores("extractor", "bars")) == scores


def test_extractor_stops_at_a_loss_that_is_no_number() -> None:
    train = bars(64, seed=0)
    with pytest.raises(UserError, match=r"the loss is nan at step \d+ of 50; lower extractor.lr = 1e\+30"):
        extractor.fit(train["images"], train["labels"], CLASSES, EXTRACTOR.model_copy(update={"lr": 1e30}))


def test_reference_measures_disjoint_draws_of_n_validation_images(tree: Path) -> None:
    floors = read_json(paths.scores("reference", "bars"))
    assert (floors["test_images"], floors["validation_images"]) == (120, 450)
    (sets,) = floors["sets"].values()  # 20 images are not scored
    assert sets["draws"] == 2
    assert sets["fid"]["value"] > 0 < sets["fid"]["error"]
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


def test_sets_are_disjoint_and_at_the_frequencies_of_the_test_split() -> None:
    like = torch.tensor([0] * 50 + [1] * 31 + [2] * 19)
    labels = torch.tensor([0] * 400 + [1] * 200 + [2] * 400)
    rows = torch.arange(1000)
    images = Fake(rows[:, None].float(), torch.zeros(1000, 3), labels)
    sets = reference.draws_of(images, like, 100)
    assert [each.labels.bincount().tolist() for each in sets] == [[50, 31, 19]] * 6  # 200 // 31
    drawn = torch.cat([each.features[:, 0].long() for each in sets])
    assert len(drawn.unique()) == 600
    assert all(torch.equal(labels[each.features[:, 0].long()], each.labels) for each in sets)
    assert len(reference.draws_of(images, like, 10)) == reference.DRAWS
    # What one set has too much of a class the next has too little: 15.5 images of class 1 in 50, 13 sets of 50 need 201.5.
    assert [each.labels.bincount().tolist() for each in reference.draws_of(images, like, 50)[:2]] == [[25, 16, 9], [25, 15, 10]]
    assert len(reference.draws_of(images, like, 645)) == 1  # 199.95 of class 1
    assert reference.draws_of(images, like, 649) == []  # 201.2


def test_the_class_that_is_furthest_behind_comes_next() -> None:
    like = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    turns = reference.in_turn(like, 1001)
    assert len(turns) == 1001
    for n, counts in ((10, [5, 3, 0, 2]), (4, [2, 1, 0, 1]), (1001, [501, 300, 0, 200])):  # of 4: 2, 1.2, 0, .8
        assert turns[:n].bincount(minlength=4).tolist() == counts
    assert len(reference.in_turn(like, 0)) == 0


def test_sets_have_n_images_each_its_own_where_a_class_is_rare() -> None:
    """Rounded each for itself, class 4 would have 1 of the first 20 images and none of the first 25."""
    like = torch.arange(8).repeat_interleave(torch.tensor([25, 49, 57, 27, 3, 17, 33, 32]))
    labels = like.repeat(20)
    images = Fake(torch.arange(len(labels))[:, None].float(), torch.zeros(len(labels), 8), labels)
    sets = reference.draws_of(images, like, 5)
    assert [each.n for each in sets] == [5] * reference.DRAWS
    assert len(torch.cat([each.features[:, 0] for each in sets]).unique()) == 5 * reference.DRAWS
    assert reference.in_turn(like, len(like)).bincount().equal(like.bincount())


def test_a_floor_that_the_validation_split_cannot_give_is_null(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in ("data", "models"):
        shutil.copytree(tree / made, tmp_path / made)
    monkeypatch.chdir(tmp_path)
    reference.main("bars", 10 * N, 20, 20, 1)
    sets = read_json(paths.scores("reference", "bars"))["sets"]
    large = sets[str(10 * N)]
    assert (large["draws"], large["fid"], large["class_tv"]) == (0, None, None)
    assert 400 < large["largest"] <= 450
    assert large["neighbours"] == 120  # as many as the test split has
    assert large["precision"]["value"] > 0.5 < large["recall"]["value"]
    assert sets["20"]["draws"] == reference.DRAWS  # the T-step set is scored here
    assert evaluate.Judge.load("bars").floor("fid", 10 * N) is None
    assert evaluate.Judge.load("bars").floor("fid", 20) == sets["20"]["fid"]["value"]


def test_train_images_do_not_reach_the_reference_and_validation_images_do(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in ("data", "models"):
        shutil.copytree(tree / made, tmp_path / made)
    monkeypatch.chdir(tmp_path)
    before = read_json(tree / paths.scores("reference", "bars"))
    (paths.prepared("bars") / "train.safetensors").unlink()
    reference.main("bars", *SIZES)
    assert read_json(paths.scores("reference", "bars")) == before
    save_tensors(
        paths.prepared("bars") / "validation.safetensors", bars(2 * N + 50, seed=8), class_names=["top", "middle", "bottom"]
    )
    reference.main("bars", *SIZES)
    after = read_json(paths.scores("reference", "bars"))
    assert after["sets"] != before["sets"]
    assert {name: after[name] for name in ("accuracy", "class_frequencies")} == {
        name: before[name] for name in ("accuracy", "class_frequencies")
    }


def test_the_seed_of_evaluate_picks_images_and_noise(tree: Path) -> None:
    cell = params.Cell("bars", "cosine", 50, 0)
    save_network(cell)
    first, same, other = (evaluate.measure_losses(cell, EVALUATE.model_copy(update={"seed": seed})) for seed in (0, 0, 1))
    assert first == same
    assert first["eps_mse"] != other["eps_mse"]
    error = (first["eps_mse"]["error"] ** 2 + other["eps_mse"]["error"] ** 2) ** 0.5
    assert first["eps_mse"]["value"] == pytest.approx(other["eps_mse"]["value"], abs=4 * error)


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
    assert {small[name] for name in ("fid", "class_tv", "precision", "recall")} == {None}
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
    assert first["loss_images"] == 96


def test_losses_of_a_small_test_split_are_of_all_its_images(tree: Path) -> None:
    cell = params.Cell("bars", "cosine", 50, 0)
    save_network(cell)
    found = [evaluate.measure_losses(cell, EVALUATE.model_copy(update={"images": images})) for images in (120, 10_000)]
    assert found[0] == found[1]
    assert found[0]["loss_images"] == 120


def small(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> dict[str, Any]:
    """What the reference says, and the scores of N samples, where the splits are small."""
    for made in ("data", "models"):
        shutil.copytree(tree / made, tmp_path / made)
    monkeypatch.chdir(tmp_path)
    for split, n in sizes.items():
        save_tensors(paths.prepared("bars") / f"{split}.safetensors", bars(n, seed=n), class_names=["top", "middle", "bottom"])
    reference.main("bars", *SIZES)
    (sets,) = read_json(paths.scores("reference", "bars"))["sets"].values()
    return dict(sets)


def test_a_small_set_is_scored_as_far_as_it_goes_and_what_is_missing_has_a_reason(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 validation and 26 test images, of which N = 200 samples are many more."""
    sets = small(tree, tmp_path, monkeypatch, validation=20, test=26)
    assert 12 <= sets["neighbours"] <= 20
    found = score(bars(N, seed=4))
    assert found["neighbours"] == sets["neighbours"]
    assert found["fid"] is None
    assert found["not_measured"] == {
        "fid": "the test split has 26 images, fewer than evaluate.min_scored = 50",
        "class_tv_floor": f"the validation split gives sets of at most {sets['largest']} images, "
        "at the frequencies of the classes, not of 200",
    }
    n = found["neighbours"]
    assert found["precision"]["value"] * n == pytest.approx(round(found["precision"]["value"] * n))  # a share of n
    assert found["precision"]["floor"] == pytest.approx(sets["precision"]["value"])
    assert found["accuracy"]["value"] > 0.9
    darker = {**bars(N, seed=4), "images": bars(N, seed=4)["images"] // 4}
    assert found["validation_fid"]["value"] < score(darker)["validation_fid"]["value"]


def test_precision_needs_the_images_of_a_ball_of_each_class(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 images of 3 classes: balls to the third neighbour would reach into other classes, and cover all between."""
    sets = small(tree, tmp_path, monkeypatch, validation=11, test=26)
    assert sets["largest"] <= 11
    assert (sets["neighbours"], sets["precision"]) == (0, None)
    found = score(bars(N, seed=4))
    assert (found["precision"], found["recall"]) == (None, None)
    assert found["not_measured"]["precision"] == "validation and test have too few images for sets with 4 of each class"


def test_samples_without_labels_have_no_accuracy_and_it_says_why(tree: Path) -> None:
    drawn = bars(N, seed=4)
    drawn["labels"] = torch.full_like(drawn["labels"], -1)
    found = score(drawn)
    assert found["accuracy"] is None
    assert found["not_measured"] == {"accuracy": "the network was told no labels"}


def test_the_largest_set_that_can_be_drawn() -> None:
    like = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    for counts in ([5, 3, 2], [9, 1, 9], [0, 5, 5], [100, 100, 100], [3, 3]):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        images = Fake(torch.zeros(len(labels), 1), torch.zeros(len(labels), 3), labels)
        n = reference.most_drawn(labels, like, 40)
        assert n == max([k for k in range(1, 41) if reference.draws_of(images, like, k)], default=0)


def test_the_choice_is_by_the_validation_split(tree: Path) -> None:
    judge = evaluate.Judge.load("bars")
    validation, _ = load_tensors(paths.prepared("bars") / "validation.safetensors")
    test, _ = load_tensors(paths.prepared("bars") / "test.safetensors")
    assert score(validation)["validation_fid"]["value"] == pytest.approx(0, abs=1e-5)
    assert score(test)["fid"]["value"] == pytest.approx(0, abs=1e-5)
    assert score(test)["validation_fid"]["value"] > 1e-3
    assert judge.validation.n == 450
    assert "validation_fid" not in score(bars(20, seed=4))  # not scored


def test_losses_are_measured_at_levels_that_the_network_knows(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = params.Cell("bars", "linear", 100, 0)  # log-SNR -10.1 to 6.9 at the size that the schedule is for
    asked = EVALUATE.model_copy(update={"logsnr": [-12.0, -9.0, 5.0, 8.0]})
    visited: list[float] = []
    predict = evaluate.predict

    def watched(*args: Any, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        visited.extend(logsnr(args[4]).tolist())
        return predict(*args, rng)

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


def test_draws_of_every_image_are_stratified() -> None:
    found = evaluate.stratified(4, 100, torch.Generator().manual_seed(0))
    assert (found.shape, found.dtype) == ((4, 100), torch.float64)
    strata = (found.sort(1).values * 400).long()
    assert strata.flatten().tolist() == list(range(400))  # one in each of 400 equal stretches, a quarter of them for each draw
    assert not found.equal(found.sort(1).values)


def test_levels_are_split_as_they_were_put_together() -> None:
    table = torch.from_numpy(find("cosine")(50))
    levels = evaluate.draw_levels(table, [-1.0, 2.0], 3, 10, torch.Generator().manual_seed(0))
    assert levels.alpha_bar.shape == (8, 10)
    assert levels.of_bound(levels.alpha_bar).equal(table[levels.bound_t])
    assert logsnr(levels.of_grid(levels.alpha_bar)).numpy() == pytest.approx(np.repeat([[-1.0], [2.0]], 10, axis=1))
    uniform_t = torch.stack([(table == level).nonzero()[0, 0] for level in levels.of_uniform(levels.alpha_bar).flatten()])
    assert (uniform_t.reshape(3, 10) * 3 // 50).float().mean(1).tolist() == pytest.approx(
        [0, 1, 2], abs=0.2
    )  # a third for each draw
    assert levels.bound_t.min() >= 1
    assert len(evaluate.draw_levels(table, [], 3, 10, torch.Generator()).alpha_bar) == 6


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
    net, _ = load_network(paths.weights(str(cell.training)) / "ema.safetensors")
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


def test_main_writes_whole_scores_to_the_same_bytes(tree: Path) -> None:
    cell = params.Cell("bars", "cosine", 50, 0)
    save_network(cell)
    save_samples(cell)
    written = []
    for _ in range(2):
        evaluate.main(cell, EVALUATE, 1)
        written.append(paths.scores("evaluate", str(cell)).read_bytes())
    assert written[0] == written[1]
    scores = json.loads(written[0])
    bits = {"bits_per_dim", "bits_of_prior", "bits_of_steps", "bits_of_decoder"}
    assert scores.keys() == {
        "fast",
        "ancestral",
        "eps_mse",
        "logsnr_grid",
        "network",
        "train_images",
        "loss_images",
        "machines",
        *bits,
    }
    assert scores["bits_per_dim"]["value"] == pytest.approx(sum(scores[name]["value"] for name in bits - {"bits_per_dim"}))
    floors = read_json(paths.scores("reference", "bars"))["sets"][str(N)]
    assert scores["fast"]["fid"]["floor"] == floors["fid"]["value"]
    assert scores["train_images"] == 100
    assert scores["fast"]["sampling"] == {"sampler": "ddim", "steps": 5, **MADE}
    assert scores["machines"] == provenance.here(), "each stage whose bits the machine decides"
    assert scores["network"] == "own"
    assert scores["fast"]["scored"]
    assert not scores["ancestral"]["scored"]
    for name in ("fid", "class_tv", "precision", "recall", "accuracy", "confident", "confident_ratio"):
        assert scores["fast"][name].keys() == {"value", "error", "floor"}


SPREAD = """
from stages.fidelity.sets import Fake, Real


def spread(real: Real, fake: Fake) -> tuple[float, float]:
    return fake.features.std().item(), 0.25
"""
SHARPNESS = """
from stages.fidelity.sets import Fake, Real


def sharpness(real: Real, fake: Fake) -> tuple[float, float] | None:
    return None if (fake.labels < 0).any() else (fake.probabilities.amax(1).mean().item(), 0.125)
"""
EVALUATED = """
import json
from stages import evaluate, reference
from stages.pipeline import params
from stages.tracking import results

cell = params.Cell("bars", "cosine", 50, 0)
reference.main("bars", *SIZES)
evaluate.main(cell, params.Evaluate(**EVALUATE), 1)
print(json.dumps(results.row(cell)))
"""


def evaluated(tree: Path, folder: Path, added: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The row of a cell in a copy of the tree in `folder`, with metrics added: the code and the line of the dict of each name."""
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for made in ("data", "models", "samples"):
        shutil.copytree(tree / made, folder / made)
    metrics = folder / "stages/fidelity/metrics.py"
    for name, (code, line) in added.items():
        (metrics.parent / f"{name}.py").write_text(code)
        head, opening, rest = metrics.read_text().partition("METRICS = {\n")
        assert opening
        metrics.write_text(f"{head}from stages.fidelity.{name} import {name}\n\n{opening}    {line},\n{rest}")
    code = f"SIZES, EVALUATE = {SIZES}, {EVALUATE.model_dump()}\n{EVALUATED}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_metric_is_a_file_and_a_line(tree: Path, tmp_path: Path) -> None:
    """Its floor is measured, every set is scored, and the row of the cell, which the report and MLflow show, has it."""
    cell = params.Cell("bars", "cosine", 50, 0)
    save_network(cell)
    save_samples(cell)
    lines = {"spread": '"spread": Metric(spread)', "sharpness": '"sharpness": Metric(sharpness, depends_on_n=False)'}
    row = evaluated(tree, tmp_path, {"spread": (SPREAD, lines["spread"]), "sharpness": (SHARPNESS, lines["sharpness"])})

    floors = read_json(tmp_path / paths.scores("reference", "bars"))
    scores = read_json(tmp_path / paths.scores("evaluate", str(cell)))
    spread, sharpness = scores["fast"]["spread"], scores["fast"]["sharpness"]
    assert spread == {"value": spread["value"], "error": 0.25, "floor": floors["sets"][str(N)]["spread"]["value"]}
    assert sharpness == {"value": sharpness["value"], "error": 0.125, "floor": floors["sharpness"]["value"]}
    assert floors["sharpness"]["error"] == 0.125
    assert floors["sets"][str(N)]["spread"]["error"] != 0.25  # the sd over sets
    assert scores["ancestral"]["spread"] is None  # too few images
    for name, found in (("spread", spread), ("sharpness", sharpness), ("ancestral_sharpness", scores["ancestral"]["sharpness"])):
        assert (row[name], row[f"{name}_error"], row[f"{name}_floor"]) == (found["value"], found["error"], found["floor"])

    drawn, sampling = load_tensors(paths.samples(str(cell)) / "fast.safetensors")  # and nothing else is another
    others = {name: value for name, value in scores["fast"].items() if name not in lines}
    assert others == rounded({"sampling": sampling, **score(drawn)})
    assert floors["sets"][str(N)].keys() - lines.keys() == read_json(paths.scores("reference", "bars"))["sets"][str(N)].keys()
