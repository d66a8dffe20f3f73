"""Glyphs: fonts in, images out, the same ones every time; on two small fonts so that it is quick."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from stages.datasets import glyphs
from stages.datasets.images import to_float
from stages.errors import UserError
from stages.extractor import fit
from stages.networks.classifier import CHUNK, classify
from stages.pipeline.params import Extractor

LOOK_ALIKES = ("۱ا", "۰۵ه")  # a stroke is a one or an alef; a loop is a zero, a five or a heh
OPTIONS = {"size": 32, "train_images": 100, "validation_images": 44, "test_images": 45, "seed": 3}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fetched folder with two fonts, one of them of variable weight."""
    folder = tmp_path_factory.mktemp("raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-almarai": r"Almarai-Regular\.ttf", "fontpkg-cairo": r".*\.ttf"})
        glyphs.fetch(folder)
    return folder


@pytest.fixture(scope="module")
def fields(raw: Path):
    return glyphs._load_fields(raw / "fonts.zip")


@pytest.fixture(scope="module")
def train(fields) -> tuple[torch.Tensor, torch.Tensor]:
    return glyphs._draw_split(*fields, 32, 100, 3, "train")


def test_classes_are_ten_digits_and_32_letters():
    assert "".join(glyphs.CLASS_NAMES[:10]) == "۰۱۲۳۴۵۶۷۸۹"
    assert len(set(glyphs.CLASS_NAMES)) == 42


def test_fetch_packs_fonts_and_licences_into_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        glyphs.fetch(tmp_path / name)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["fonts.zip"]
    assert (tmp_path / "a" / "fonts.zip").read_bytes() == (tmp_path / "b" / "fonts.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "fonts.zip") as archive:
        names = archive.namelist()
    for package in glyphs.FONT_PACKAGES:
        mine = [name for name in names if name.startswith(f"{package}/")]
        assert any(name.endswith(".ttf") for name in mine)
        assert any("LICENSE" in name for name in mine)


def test_read_gives_three_splits_drawn_independently(raw, train):
    (images, labels), (validation, y_validation), (test, y_test), class_names, *_ = glyphs.read(raw, **OPTIONS)
    assert torch.equal(images, train[0])
    assert torch.equal(labels, train[1])
    assert test.shape == (45, 1, 32, 32)
    assert class_names == glyphs.CLASS_NAMES
    assert not torch.equal(labels[:42], y_test[:42])
    assert y_validation.tolist() == y_test[:44].tolist()  # the floor at N needs as many of every class
    assert len({image.numpy().tobytes() for image in torch.cat([images, validation, test])}) == 100 + 44 + 45


def test_train_and_test_images_are_those_of_before_there_was_a_validation_split(raw, fields):
    """Their random numbers have streams 0 to 3, whatever validation draws."""
    few = glyphs.read(raw, **OPTIONS | {"validation_images": 42})
    many = glyphs.read(raw, **OPTIONS)
    for name in ("train", "test"):
        assert torch.equal(few.splits[name][0], many.splits[name][0])
    assert torch.equal(few.validation[0], many.validation[0][:42])
    drawn = glyphs._draw(glyphs._rng(3, 1, 0), fields[1][many.test[1][0]], 32)
    chosen, *rest = (torch.from_numpy(np.stack([part])) for part in drawn)
    assert torch.equal(glyphs._ink(fields[0][chosen][:, None], *rest)[0], many.test[0][0])


def test_image_is_the_same_however_many_are_asked_for_and_at_once(fields, train, monkeypatch):
    few, y_few = glyphs._draw_split(*fields, 32, 7, 3, "train")
    assert torch.equal(few, train[0][:7])
    assert torch.equal(y_few, train[1][:7])
    monkeypatch.setattr(glyphs, "BATCH", 9)
    assert torch.equal(glyphs._draw_split(*fields, 32, 100, 3, "train")[0], train[0])


def test_seed_changes_images_and_order(fields, train):
    images, labels = glyphs._draw_split(*fields, 32, 42, 4, "train")
    assert not torch.equal(labels, train[1][:42])
    assert not any(torch.equal(a, b) for a, b in zip(images, train[0], strict=False))


def test_every_block_of_42_holds_each_class_once_shuffled(train):
    labels = train[1]
    assert labels.dtype == torch.int64
    for block in (labels[:42], labels[42:84]):
        assert block.sort().values.tolist() == list(range(42))
        assert block.tolist() != list(range(42))
    assert labels[:42].tolist() != labels[42:84].tolist()


def test_ink_is_dark_and_paper_light_and_noisy(train):
    images = train[0]
    assert images.dtype == torch.uint8
    assert images.shape == (100, 1, 32, 32)
    corners = images[:, 0, :3, :3].float()
    assert corners.median() > 190
    assert corners.flatten(1).std(1).min() > 0.5
    darkest = images.flatten(1).min(1).values
    assert darkest.max() < 140, "every image has ink"
    assert (images < 120).flatten(1).float().mean(1).max() < 0.5, "and is mostly paper"


def test_glyph_uses_most_of_the_paper_and_stays_on_it(fields):
    images, labels = glyphs._draw_split(*fields, 64, 420, 0, "train")
    ink = images[labels > 0, 0] < 110  # all but the small zero
    edge = torch.ones(64, 64, dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    assert (ink & edge).flatten(1).any(1).float().mean() < 0.01
    longest = torch.stack([ink.any(axis).float().sum(1) for axis in (1, 2)]).amax(0)  # a lower bound where the ink has gaps
    assert longest.quantile(0.05) > 24
    assert longest.median() > 36


def test_hands_differ_in_pen_ink_and_paper(fields, monkeypatch):
    monkeypatch.setattr(glyphs, "_balanced_labels", lambda count, *_: torch.full((count,), glyphs.CLASS_NAMES.index("ا")))
    images = glyphs._draw_split(*fields, 64, 100, 0, "train")[0][:, 0].float()
    paper, ink = images.flatten(1).quantile(0.5, dim=1), images.flatten(1).quantile(0.02, dim=1)
    inked = images < (paper + ink)[:, None, None] / 2
    width = inked.flatten(1).sum(1) / inked.any(2).sum(1)
    upper, lower = ((half * torch.arange(64.0)).sum((1, 2)) / half.sum((1, 2)) for half in inked.split(32, dim=1))
    lean = upper - lower
    assert paper.std() > 8
    assert ink.std() > 10
    assert width.quantile(0.9) > 1.5 * width.quantile(0.1)
    assert lean.quantile(0.1) < -2 < 2 < lean.quantile(0.9)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_every_size_is_drawn(fields, size):
    images, _ = glyphs._draw_split(*fields, size, 3, 0, "train")
    assert images.shape == (3, 1, size, size)


def test_field_is_the_distance_to_the_path_of_the_pen(fields):
    # Every field has ink, the corners are off it, and a distance changes by at most one per pixel; dots by their thickness less.
    assert (fields[0].amin((1, 2)) == 0).all()
    assert fields[0][:, 0, 0].min() > 3
    assert fields[0].diff(dim=1).abs().max() < 1.01
    assert fields[0].diff(dim=2).abs().max() < 1.01


def test_letters_keep_their_size_and_place_on_the_line(fields):
    def rows(character: str) -> tuple[int, int]:
        _, printed = fields[1][glyphs.CLASS_NAMES.index(character)]
        inked = (fields[0][printed[0]] < 1).any(1).nonzero()
        return int(inked.min()), int(inked.max())

    (top_alef, bottom_alef), (top_heh, bottom_heh), (_, bottom_jeem) = rows("ا"), rows("ه"), rows("ج")
    assert top_alef < top_heh
    assert abs(bottom_alef - bottom_heh) < 10
    assert bottom_jeem > bottom_alef + 5


def test_thinning_leaves_lines_one_pixel_wide_and_keeps_what_is_connected():
    yy, xx = np.mgrid[:40, :40]
    bar = (abs(yy - 20) < 4) & (abs(xx - 20) < 15)
    ring = (np.hypot(yy - 20, xx - 20) < 15) & (np.hypot(yy - 20, xx - 20) > 8)
    blob = (abs(yy - 19.5) < 2) & (abs(xx - 19.5) < 2)
    thin_bar, thin_ring, thin_blob = glyphs._thin(np.stack([bar, ring, blob]))
    assert thin_blob.sum() == 1
    assert set(thin_bar.sum(0)) <= {0, 1}
    assert thin_bar.sum() > 20
    assert label(thin_ring, np.ones((3, 3)))[1] == 1
    assert label(~thin_ring)[1] == 2, "paper inside and outside the ring"
    assert thin_ring.sum() < 100, "about its circumference, 72"


def test_dots_of_a_glyph_are_found_and_nothing_else(raw):
    font, _ = next(glyphs._fonts(raw / "fonts.zip"))
    for character, mask in zip(glyphs.CLASS_NAMES, glyphs._masks(font, glyphs.CLASS_NAMES), strict=True):
        body, dots = glyphs._part(mask, character)
        assert len(dots) == glyphs.DOTTED.get(character, ("", 0))[1], character
        assert body.sum() > 0.5 * mask.sum() or character == "ژ"


def test_dots_are_written_apart_or_merged():
    rng = np.random.default_rng(0)
    for count, wanted in ((1, {1}), (2, {1, 2}), (3, {1, 2, 3})):
        centres = 10.0 * np.array([[0, 0], [1, 0], [0.5, 1]])[:count]
        assert {len(glyphs._dots(centres, rng)) for _ in range(40)} == wanted


def test_strokes_that_share_a_point_still_do_when_points_move(monkeypatch):
    for form, parts in (("22,13 48,88; 48,88 78,12", 1), ("22,13 36,88; 60,88 78,12", 2)):
        monkeypatch.setitem(glyphs.STROKES, "۷", [form])
        assert {label(field < 1.5)[1] for field in glyphs._written_fields("۷", np.random.default_rng(0))} == {parts}


def test_every_letter_is_drawn_both_ways_and_variants_add_forms(fields):
    written, printed = zip(*fields[1], strict=True)
    assert all(written)
    assert len(printed[glyphs.CLASS_NAMES.index("۲")]) == 2, "one per font"
    assert len(printed[glyphs.CLASS_NAMES.index("۴")]) == 4, "and an Arabic one"
    used = sorted(index for forms in fields[1] for source in forms for index in source)
    assert used == list(range(len(fields[0])))


@pytest.mark.slow
def test_glyphs_are_readable_and_nearly_all_confusions_are_between_look_alikes(tmp_path):
    glyphs.fetch(tmp_path)
    data = glyphs.read(tmp_path, size=64, train_images=20000, validation_images=42, test_images=5000, seed=0)
    (images, labels), (test, y_test), names = data.train, data.test, data.class_names
    net = fit(images, labels, 42, Extractor(images=100000, batch=128, lr=3e-3, seed=0))
    predicted = classify(net, map(to_float, test.split(CHUNK)))[1].argmax(1)
    merged = torch.arange(42)
    for first, *others in LOOK_ALIKES:
        merged[[names.index(other) for other in others]] = names.index(first)
    assert (predicted == y_test).float().mean() > 0.97
    assert (merged[predicted] == merged[y_test]).float().mean() > 0.99


def test_font_without_a_glyph_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "FONT_PACKAGES", {"matplotlib": r"DejaVuSerif\.ttf"})
    glyphs.fetch(tmp_path)
    with pytest.raises(UserError, match=r"matplotlib/DejaVuSerif.ttf lacks ۰ .*; a font must have all 42 glyphs"):
        glyphs.read(tmp_path, **OPTIONS)


def test_missing_package_and_missing_or_damaged_archive_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"fonts.zip is missing"):
        glyphs.read(tmp_path, **OPTIONS)
    (tmp_path / "fonts.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"fonts.zip is damaged"):
        glyphs.read(tmp_path, **OPTIONS)
    monkeypatch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-nonesuch": ".*"})
    with pytest.raises(UserError, match="the font package fontpkg-nonesuch is not installed"):
        glyphs.fetch(tmp_path)
