"""The prepare stage: tensors, what is said of them, and pictures; for every reader, on small data."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from stages import prepare
from stages.datasets import glyphs, mnist
from stages.datasets.images import to_float
from stages.datasets.readers import READERS
from stages.diffusion.schedules import SCHEDULES
from stages.pipeline import params, paths
from stages.pipeline.checkpoint import load_tensors
from stages.pipeline.stage import read_json

SECTIONS = {
    "mnist": params.MnistData(reader="mnist", size=28, path=None),
    "glyphs": params.GlyphsData(reader="glyphs", size=16, train_images=90, test_images=43, seed=0),
}


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture(params=list(READERS))
def reader(request, tmp_path, monkeypatch) -> str:
    """Each reader in turn, with small raw data in place."""
    monkeypatch.chdir(tmp_path)
    raw = paths.raw(request.param)
    raw.mkdir(parents=True)
    if request.param == "glyphs":
        monkeypatch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-almarai": r"Almarai-Bold\.ttf"})
        glyphs.fetch(raw)
    if request.param == "mnist":
        rng = np.random.default_rng(0)
        for split, n in (("train", 30), ("t10k", 12)):
            (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 9, n)))  # no nine
        table = {file.name: mnist.Published(file.stat().st_size, digest(file)) for file in raw.iterdir()}
        monkeypatch.setattr(mnist, "FILES", table)
    return request.param


def digest(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_reader_is_tried_here():
    assert set(SECTIONS) == set(READERS)


def test_prepared_tensors_and_what_is_said_of_them(reader):
    stray = paths.prepared(reader) / "stray"
    stray.parent.mkdir(parents=True)
    stray.touch()
    prepare.main(reader, SECTIONS[reader])
    folder = paths.prepared(reader)
    assert {file.name for file in folder.iterdir()} == {"train.safetensors", "test.safetensors", "dataset.json"}
    about = read_json(folder / "dataset.json")
    assert set(about) == {
        *("reader", "synthetic", "licence", "source_sha256", "size", "class_names"),
        *("images", "images_per_class", "pixel_mean", "pixel_std"),
    }, "no date, host, path or route"
    assert about["reader"] == reader
    assert about["synthetic"] == (reader == "glyphs")
    assert about["source_sha256"] == {file.name: digest(file) for file in paths.raw(reader).iterdir()}
    for split in ("train", "test"):
        tensors, _ = load_tensors(folder / f"{split}.safetensors")
        images, labels = tensors["images"], tensors["labels"]
        assert set(tensors) == {"images", "labels"}
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (about["images"][split], 1, about["size"], about["size"])
        assert labels.shape == images.shape[:1]
        counts = [int((labels == y).sum()) for y in range(len(about["class_names"]))]
        assert counts == about["images_per_class"][split]
        assert sum(counts) == about["images"][split]


def test_preparing_again_gives_the_same_bytes(reader):
    def bytes_of_all() -> dict[str, bytes]:
        prepare.main(reader, SECTIONS[reader])
        files = [*paths.prepared(reader).iterdir(), *paths.data_figures(reader).iterdir()]
        return {file.name: file.read_bytes() for file in files}

    first = bytes_of_all()
    assert set(first) >= {"samples.png", "noising.png"}
    assert bytes_of_all() == first


def test_mean_and_std_are_those_of_all_pixels():
    images = torch.randint(0, 256, (50, 1, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = to_float(images).double()
    # Both are float64 sums over the same float32 values, in another order: equal to a few 1e-16 times 4050 terms.
    assert prepare.mean_and_std(images) == pytest.approx((x.mean().item(), x.std(correction=0).item()), abs=1e-12)


def test_samples_have_a_row_per_class_in_their_order():
    labels = torch.arange(3).repeat(12)
    images = (labels * 100).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    picture = prepare.samples(images, labels, 4)
    scale = picture.shape[1] // (10 * 5 + 1)
    small = picture[::scale, ::scale]
    assert small.shape == (4 * 5 + 1, 10 * 5 + 1)
    assert small[1::5, 1].tolist() == [0, 100, 200, 128], "a class without images stays grey"


@pytest.mark.parametrize(("classes", "size"), [(10, 28), (42, 64), (42, 256), (100, 28)])
def test_samples_stay_below_the_tallest(classes, size):
    picture = prepare.samples(torch.zeros(1, 1, size, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), classes)
    assert 300 < picture.shape[0] <= prepare.TALLEST + size


def test_noising_goes_from_the_image_to_noise_in_true_range(tmp_path):
    image = torch.full((1, 28, 28), 200, dtype=torch.uint8)
    picture = prepare.noising(image)
    Image.fromarray(picture).verify()
    # Below and right of the labels lies the grid: rows are schedules, scaled by 3, with one pixel of gap.
    h = len(SCHEDULES) * 29 * 3 + 3
    cells = picture[-h:, -(10 * 29 * 3 + 3) :][::3, ::3]
    for row in range(len(SCHEDULES)):
        first, last = (cells[row * 29 + 1 :][:28, column * 29 + 1 :][:, :28].astype(float) for column in (0, 9))
        # At t = 0 every schedule has 1 - alpha_bar <= 3e-4: noise of 0.018 * 127.5 = 2.3 grey levels.
        assert abs(first.mean() - 200) < 2
        assert first.std() < 2.6
        # Pure unit noise, clipped to [-1, 1]: mean 127.5 and std 0.72 * 127.5 = 92, over 784 pixels (3.3 for the mean).
        assert abs(last.mean() - 127.5) < 12
        assert 80 < last.std() < 105


def test_nothing_of_the_machine_is_said(reader, tmp_path):
    prepare.main(reader, SECTIONS[reader])
    text = (paths.prepared(reader) / "dataset.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "/" not in text
