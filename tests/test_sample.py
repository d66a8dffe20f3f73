import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import sampling
from stages import sample
from stages.diffusion.process import logsnr
from stages.diffusion.samplers import ddim
from stages.drawing import weights
from stages.drawing.chain import How
from stages.errors import UserError
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, params, paths, processes

CELL = params.Cell("toy", "cosine", 12, 1)
NETWORK = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """An untrained network in an empty folder, and sizes small enough to draw from it in a second."""
    monkeypatch.chdir(tmp_path)
    save_network(conditional=True)
    split = {"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0, 1, 0, 2])}
    checkpoint.save_tensors(paths.prepared("toy") / "test.safetensors", split, class_names=["a", "b", "c"])
    return params.Sample(
        seed=0, images=10, ancestral_images=5, guidance=0.3, guidance_interval=[-4.0, 4.0], clip_x0=True,
        precision="fp32", chunk=4,
        fast=params.FastSampler(sampler="ddim", spacing="trailing", steps=4, eta=0.0),
        ancestral=params.AncestralSampler(sampler="ddpm", variance="posterior"),
    )  # fmt: skip


def save_network(conditional, zero_terminal_snr=False, reference_size=8):
    """Weights that do something."""
    torch.manual_seed(0)
    network = NETWORK | {"conditional": conditional}
    net = UNet(size=8, num_classes=3, **network)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    diffusion = {"prediction": "v", "reference_size": reference_size, "zero_terminal_snr": zero_terminal_snr}
    about = {"images": 64, "logsnr": [-12.0, 12.0], "machines": [checkpoint.machine()], "size": 8, "num_classes": 3}
    about |= {"network": network, "diffusion": diffusion}
    checkpoint.save_tensors(paths.weights(str(CELL.training)) / "ema.safetensors", net.state_dict(), **about)


def drawn(name):
    return weights.load_tensors(paths.samples(str(CELL)) / f"{name}.safetensors")


def test_writes_both_sets_a_grid_and_an_animation(options):
    measured = sample.main(CELL, options)
    (fast, how), (ancestral, _) = drawn("fast"), drawn("ancestral")
    assert fast["images"].shape == (10, 1, 8, 8)
    assert fast["images"].dtype == torch.uint8
    assert ancestral["images"].shape == (5, 1, 8, 8)
    # Cosine's log-SNR at t = 11, 8, 5, 2 of 12 is about -11, -1.8, 0 and 1.7: all but the first are guided.
    assert how["network_evaluations"] == 7
    assert measured["fast_images_per_sec"] > 0
    assert measured["threads"] == processes.cores()
    folder = paths.samples(str(CELL))
    assert Image.open(folder / "grid.png").size == ((10 * 9 + 1) * 2, (3 * 9 + 1) * 2)
    assert Image.open(folder / "denoising.gif").n_frames == 12
    assert Image.open(folder / "chain.png").size == ((10 * 9 + 1) * 2, (8 * 9 + 1) * 2)  # x_t and x0_hat of four images


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    ("sampler", "spacing", "evaluations"), [("dpm_solver_pp_2m", "trailing", 4), ("heun", "karras", 7), ("ddpm", "linspace", 4)]
)
def test_any_sampler_draws_the_fast_set(options, sampler, spacing, evaluations, zero_terminal_snr):
    if zero_terminal_snr and sampler == "heun":
        pytest.skip("refused: sigma is infinite there")
    save_network(conditional=True, zero_terminal_snr=zero_terminal_snr)
    fast = params.FastSampler(sampler=sampler, spacing=spacing, steps=4, eta=0.0)
    sample.main(CELL, options.model_copy(update={"fast": fast, "guidance": 0.0}))
    images, how = drawn("fast")
    assert (how["sampler"], how["spacing"], how["network_evaluations"]) == (sampler, spacing, evaluations)
    assert images["images"].float().std() > 1


def test_x0_may_be_left_unclipped(options):
    sample.main(CELL, options)
    clipped, _ = drawn("ancestral")
    sample.main(CELL, options.model_copy(update={"clip_x0": False}))
    assert not torch.equal(drawn("ancestral")[0]["images"], clipped["images"])


def test_wider_images_are_drawn_and_guided_at_noisier_levels(options, monkeypatch):
    fast = params.FastSampler(sampler="ddim", spacing="trailing", steps=4, eta=0.0)
    visited = []

    def watched(denoise, path, noise, **more):
        visited.append(path)
        return unwatched(denoise, path, noise, **more)

    unwatched = ddim.sample
    monkeypatch.setattr(ddim, "sample", watched)
    for reference_size in (8, 4):
        save_network(conditional=True, reference_size=reference_size)
        sample.main(CELL, options.model_copy(update={"fast": fast}))
    shift = -np.log(2)  # SNR times 4 / 8
    same, shifted = visited[0], visited[-1]
    assert torch.allclose(logsnr(shifted[:-1]), logsnr(same[:-1]) + shift)
    assert drawn("fast")[1]["guidance_interval"] == pytest.approx([-4 + shift, 4 + shift])


def test_the_rate_is_that_of_all_workers_at_work(options):
    chain = sample.chain_of(CELL, options, paths.weights(str(CELL.training)) / "ema.safetensors", [2, 1, 1])
    shares = {}
    for workers in (1, 2, 8):
        chain.workers = workers
        shares[workers] = [chain.share_of_workers(n) for n in (4, 8, 64, 70)]  # 1, 2, 16 and 18 chunks
    assert shares == {1: [1, 1, 1, 1], 2: [0.5, 1, 1, 1], 8: [0.125, 0.25, 1, 0.75]}


@pytest.mark.parametrize("name", ["fast", "ancestral"])
def test_image_i_does_not_depend_on_how_many_are_asked_for(options, name):
    sample.main(CELL, options)
    few, _ = drawn(name)
    sample.main(CELL, options.model_copy(update={"images": 13, "ancestral_images": 9}))
    many, _ = drawn(name)
    n = len(few["images"])
    assert torch.equal(many["images"][:n], few["images"])
    assert torch.equal(many["labels"][:n], few["labels"])
    sample.main(params.Cell("toy", "cosine", 12, 1), options.model_copy(update={"guidance": 0.0}))
    assert not torch.equal(drawn(name)[0]["images"], few["images"])  # what does matter shows


def test_noise_is_that_of_its_own_seed_not_of_the_training(options):
    sample.main(CELL, options)
    (first, _), weights_of = drawn("fast"), paths.weights(str(CELL.training)) / "ema.safetensors"
    other = params.Cell("toy", "cosine", 12, 2)
    paths.weights(str(other.training)).mkdir(parents=True)
    shutil.copy(weights_of, paths.weights(str(other.training)))
    sample.main(other, options)
    same, _ = weights.load_tensors(paths.samples(str(other)) / "fast.safetensors")
    assert torch.equal(same["images"], first["images"])
    sample.main(CELL, options.model_copy(update={"seed": 1}))
    assert not torch.equal(drawn("fast")[0]["images"], first["images"])


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_image_i_is_the_same_drawing_at_every_t(options, zero_terminal_snr):
    """A network that says little, so that what is drawn is the noise's: closer at T = 24 than any two images of a set."""
    save_network(conditional=True, zero_terminal_snr=zero_terminal_snr)
    sets = []
    for T in (24, 48):
        cell = params.Cell("toy", "cosine", T, CELL.seed)
        sample.main(cell, options.model_copy(update={"ancestral_images": 10}))
        images = weights.load_tensors(paths.samples(str(cell)) / "ancestral.safetensors")[0]["images"]
        sets.append(images.double().flatten(1))
    apart = torch.cdist(*sets)
    assert apart.diagonal().max() < 0.5 * (apart + 1e9 * torch.eye(10)).min()


def test_classes_come_at_their_frequencies_in_every_stretch():
    labels = sample.class_sequence(torch.arange(1000), [5, 3, 2]).numpy()
    for stretch in (labels, labels[:100], labels[333:433]):
        # The discrepancy of the golden-ratio sequence over 100 points is below 0.03 for each class.
        assert np.abs(np.bincount(stretch, minlength=3) / len(stretch) - [0.5, 0.3, 0.2]).max() < 0.03
    assert sample.class_sequence(torch.arange(50), [1, 0, 1]).unique().tolist() == [0, 2]


def test_grid_has_the_classes_in_order_and_blanks_where_there_are_too_few():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    pixels = sample.class_grid(images, np.array([1, 0, 1, 0, 1, 1]), 2)[2::6, 2::6]  # scale 2, gap 1: one pixel of each image
    assert pixels.tolist() == [[1, 3] + [128] * 8, [0, 2, 4, 5] + [128] * 6]


def test_an_unconditional_network_asks_for_no_label(options):
    save_network(conditional=False)
    sample.main(CELL, options.model_copy(update={"guidance": 0.0}))
    assert drawn("fast")[0]["labels"].unique().tolist() == [-1]


def test_the_number_of_cores_does_not_change_a_bit(options, monkeypatch):
    sets = []
    for cores in (1, 3):
        monkeypatch.setattr(processes, "cores", lambda cores=cores: cores)
        sample.main(CELL, options)
        sets.append([path.read_bytes() for path in sorted(paths.samples(str(CELL)).iterdir())])
    assert len(sets[0]) == 5
    assert sets[0] == sets[1]


def test_a_failure_in_one_chunk_ends_all(options, monkeypatch):
    draws = []

    def failing(*args, **more):
        draws.append(0)
        if len(draws) == 2:
            raise UserError("no")
        yield from unwatched(*args, **more)

    unwatched = ddim.sample
    monkeypatch.setattr(ddim, "sample", failing)
    with pytest.raises(UserError, match="no"):
        sample.main(CELL, options)
    assert not paths.samples(str(CELL)).exists()


def test_the_study_of_samples_draws_with_the_network_of_the_cell_s_training(options, monkeypatch):
    """benchmarks/sampling.py, on the cells that exist after `make repro`."""
    loaded = Mock(sample=options)
    monkeypatch.setattr(sampling.params, "load", lambda: loaded)
    monkeypatch.setattr(sampling.params, "find_cell", lambda _, name: {str(CELL): CELL}[name])
    monkeypatch.setattr(sampling.Judge, "load", lambda _: None)
    score = {"value": 0.0, "error": None, "floor": None}
    monkeypatch.setattr(
        sampling, "score_set", lambda _, images, *rest: dict.fromkeys(("precision", "recall", "fid", "accuracy"), score)
    )
    row = sampling.Drawer(str(CELL)).row(How("ddpm", "trailing", 4, {"variance": "posterior"}), 6, guidance=0.0)
    assert row["cell"] == str(CELL)
    assert row["evaluations"] == 4
    assert row["images"] == 6
