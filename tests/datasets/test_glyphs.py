"""Glyphs: fonts in, images out, the same ones every time; on two small fonts so that it is quick."""

import zipfile
from pathlib import Path

import pytest
import torch

from stages import UserError
from stages.datasets import glyphs

OPTIONS = {"size": 32, "train_images": 100, "test_images": 45, "seed": 3}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fetched folder with one font of fixed and one of variable weight."""
    folder = tmp_path_factory.mktemp("raw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-almarai": r"Almarai-Bold\.ttf", "fontpkg-cairo": r".*\.ttf"})
        glyphs.fetch(folder)
    return folder


@pytest.fixture(scope="module")
def fields(raw: Path):
    return glyphs._load_fields(raw / "fonts.zip")


@pytest.fixture(scope="module")
def train(fields) -> tuple[torch.Tensor, torch.Tensor]:
    return glyphs._draw_split(*fields, 32, 100, 3, 0)


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


def test_read_gives_both_splits_drawn_independently(raw, train):
    (images, labels), (test, y_test), class_names = glyphs.read(raw, **OPTIONS)
    assert torch.equal(images, train[0])
    assert torch.equal(labels, train[1])
    assert test.shape == (45, 1, 32, 32)
    assert class_names == glyphs.CLASS_NAMES
    assert not torch.equal(labels[:42], y_test[:42])
    assert not any(torch.equal(a, b) for a in images for b in test)


def test_image_is_the_same_however_many_are_asked_for_and_at_once(fields, train, monkeypatch):
    few, y_few = glyphs._draw_split(*fields, 32, 7, 3, 0)
    assert torch.equal(few, train[0][:7])
    assert torch.equal(y_few, train[1][:7])
    monkeypatch.setattr(glyphs, "BATCH", 9)
    assert torch.equal(glyphs._draw_split(*fields, 32, 100, 3, 0)[0], train[0])


def test_seed_changes_images_and_order(fields, train):
    images, labels = glyphs._draw_split(*fields, 32, 42, 4, 0)
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


@pytest.mark.parametrize("size", [16, 33, 64])
def test_every_size_is_drawn(fields, size):
    images, _ = glyphs._draw_split(*fields, size, 3, 0, 0)
    assert images.shape == (3, 1, size, size)


def test_faces_are_the_weights_of_a_variable_font_and_grow_bolder(fields):
    masks, families = fields
    assert [len(faces) for faces in families] == [1, len(glyphs.WEIGHTS)]
    ink = [(masks[face] > 0).float().mean().item() for face in families[1]]
    assert ink == sorted(ink)
    assert ink[0] < 0.8 * ink[-1]


def test_field_is_the_distance_to_the_outline(fields):
    # The zero digit is a blob without a hole: its deepest point is at most half its width inside, the corners are far outside,
    # and a distance changes by at most one per pixel (by sqrt(2) on a diagonal; here only rows and columns are compared).
    field = fields[0][0, 0]
    assert 2 < field.max() < (field > 0).any(0).sum()
    assert field[0, 0] < -20
    assert field.diff(dim=0).abs().max() < 1.01
    assert field.diff(dim=1).abs().max() < 1.01


def test_letters_keep_their_size_and_place_on_the_line(fields):
    def rows(character: str) -> tuple[int, int]:
        inked = (fields[0][0, glyphs.CLASS_NAMES.index(character)] > 0).any(1).nonzero()
        return int(inked.min()), int(inked.max())

    (top_alef, bottom_alef), (top_heh, bottom_heh), (_, bottom_jeem) = rows("ا"), rows("ه"), rows("ج")
    assert top_alef < top_heh
    assert abs(bottom_alef - bottom_heh) <= 2
    assert bottom_jeem > bottom_alef + 5


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
