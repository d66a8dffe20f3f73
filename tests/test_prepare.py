"""The prepare stage: tensors, what is said of them, and pictures; for every reader, on small data."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages import prepare
from stages.datasets import enough, glyphs, mnist, readers
from stages.datasets.images import to_float
from stages.datasets.readers import READERS
from stages.drawing.weights import load_tensors
from stages.pipeline import files, params, paths
from stages.pipeline.files import read_json

LOOK = {"licence": "mine", "size": 16, "invert": False, "pad": True, "group": None, "strict": False}
SHARES = {"validation_share": 0.25, "test_share": 0.25, "seed": 0}
LOOK |= SHARES
SECTIONS: dict[str, params.DataSection] = {
    "mnist": params.MnistData(reader="mnist", size=28, path=None),
    "glyphs": params.GlyphsData(reader="glyphs", size=16, train_images=90, validation_images=44, test_images=43, seed=0),
    "hoda": params.HodaData(reader="hoda", path="hoda", size=16, **SHARES),
    "archive": params.ArchiveData(reader="archive", path="archive", url=None, drive=None, sha256=None, **LOOK),
    "folder": params.FolderData(reader="folder", path="folder", **LOOK),
    "auto": params.AutoData(reader="auto", path="archive", **SHARES),
}
SPLITS = ("train", "validation", "test")
SECTIONS["mix"] = params.MixData(reader="mix", of={"one": SECTIONS["glyphs"], "two": SECTIONS["folder"]})


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def images(n: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size), np.uint8)


def pictures(root: Path, name: str) -> None:
    """Thirty files, each in the place and under the name that `name` makes of its label and number."""
    for i, image in enumerate(images(30)):
        file = root / name.format(label=i % 3, i=i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def cdb(n: int) -> bytes:
    """Hoda digits of 2 x 8 pixels: half of a row is paper, half is ink, at different places."""
    labels = [i % 10 for i in range(n)]
    counts = np.bincount(labels, minlength=128).astype("<u4").tobytes()
    header = bytes((0, 0, 1, 1, 0, 0)) + n.to_bytes(4, "little") + counts
    runs = [bytes((1 + i // 10 % 7, 7 - i // 10 % 7)) * 2 for i in range(n)]
    return header.ljust(1024, b"\0") + b"".join(
        bytes((255, y, 8, 2)) + len(row).to_bytes(2, "little") + row for y, row in zip(labels, runs, strict=True)
    )


@pytest.fixture(scope="module", params=list(READERS))
def reader(request, tmp_path_factory) -> Iterator[str]:
    """Each reader in turn, with what was prepared of small raw data in the current folder; raw/ holds these, unpacked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(request.param))
        patch.setattr(enough, "LEAST_OF_CLASS", 4)
        patch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-almarai": r"Almarai-Bold\.ttf"})
        (raw := Path("raw").absolute()).mkdir()
        if request.param == "mnist":
            rng = np.random.default_rng(0)
            for split, n in (("train", 60), ("t10k", 12)):
                (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
                (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 9, n)))  # no nine
            patch.setattr(mnist, "FILES", {file.name: mnist.Published(file.stat().st_size, digest(file)) for file in raw.iterdir()})
        else:
            pictures(Path("archive"), "below/{label}.{i}.png")
            pictures(Path("folder"), "{label}/{i}.png")
            Path("hoda").mkdir()
            Path("hoda/some.cdb").write_bytes(cdb(60))
            readers.fetch(raw, SECTIONS[request.param].model_dump())
        files.write_archive(paths.raw(request.param), raw)
        stray = paths.prepared(request.param) / "stray"
        stray.parent.mkdir(parents=True)
        stray.touch()
        prepare.main(request.param, SECTIONS[request.param])
        yield request.param


def digest(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_every_reader_is_tried_here():
    assert set(SECTIONS) == set(READERS)


def test_prepared_tensors_and_what_is_said_of_them(reader):
    folder = paths.prepared(reader)
    assert {file.name for file in folder.iterdir()} == {*(f"{name}.safetensors" for name in SPLITS), "dataset.json", "stray"}
    about = read_json(folder / "dataset.json")
    assert set(about) - {"dropped_files", "of", "layout"} == {
        *("reader", "synthetic", "licence", "source_sha256", "size", "class_names"),
        *("images", "images_per_class", "pixel_mean", "pixel_std", "split", "dropped", "duplicates", "nearly_equal"),
    }, "no date, host, path or route"
    assert about["reader"] == reader
    assert ("layout" in about) == (reader == "auto")
    assert about["synthetic"] == (reader in ("glyphs", "mix"))
    files = [file for file in Path("raw").rglob("*") if file.is_file()]
    assert about["source_sha256"] == {str(file.relative_to("raw")): digest(file) for file in files}
    pixels: list[bytes] = []
    for split in SPLITS:
        tensors, described = load_tensors(folder / f"{split}.safetensors")
        assert described["class_names"] == about["class_names"]
        images, labels = tensors["images"], tensors["labels"]
        assert set(tensors) == {"images", "labels"} | ({"sources"} if reader == "mix" else set())
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert images.shape == (about["images"][split], 1, about["size"], about["size"])
        assert labels.shape == images.shape[:1]
        counts = [int((labels == y).sum()) for y in range(len(about["class_names"]))]
        assert counts == about["images_per_class"][split]
        assert sum(counts) == about["images"][split] > 0
        pixels += {image.numpy().tobytes() for image in images}
    assert len(set(pixels)) == len(pixels), "an image is in two splits"


def test_preparing_again_gives_the_same_bytes(reader):
    def bytes_of_all() -> dict[str, bytes]:
        files = [*paths.prepared(reader).iterdir(), *paths.data_figures(reader).iterdir()]
        return {file.name: file.read_bytes() for file in files}

    first = bytes_of_all()
    assert set(first) >= {"samples.png", "noising.png"}
    for file in (*paths.data_figures(reader).iterdir(), paths.prepared(reader) / "dataset.json"):
        file.unlink()
    prepare.main(reader, SECTIONS[reader])
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
    h = len(prepare.SCHEDULES) * 29 * 3 + 3
    cells = picture[-h:, -(10 * 29 * 3 + 3) :][::3, ::3]
    for row in range(len(prepare.SCHEDULES)):
        first, last = (cells[row * 29 + 1 :][:28, column * 29 + 1 :][:, :28].astype(float) for column in (0, 9))
        # At t = 0 every schedule has 1 - alpha_bar <= 3e-4: noise of 0.018 * 127.5 = 2.3 grey levels.
        assert abs(first.mean() - 200) < 2
        assert first.std() < 2.6
        # Pure unit noise, clipped to [-1, 1]: mean 127.5 and std 0.72 * 127.5 = 92, over 784 pixels (3.3 for the mean).
        assert abs(last.mean() - 127.5) < 12
        assert 80 < last.std() < 105


def test_nothing_of_the_machine_is_said(reader):
    text = (paths.prepared(reader) / "dataset.json").read_text(encoding="utf-8")
    assert str(Path.cwd()) not in text
