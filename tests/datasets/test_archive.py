"""Images labelled by their names, from a zip archive or a folder: what is fetched, and what is read of it."""

import errno
import hashlib
import os
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import damaged
from test_pictures import drawn, encoded
from test_zips import put, zipped

from stages.datasets import archive, pictures
from stages.datasets.splits import Dataset
from stages.errors import UserError

NOWHERE = {"path": None, "url": None, "drive": None, "sha256": None}
READ = {"size": 16, "invert": False, "pad": False, "strict": False, "group": None}
READ |= {"validation_share": 0.2, "test_share": 0.25, "seed": 0}


def files_of(N: int = 60, classes: int = 3) -> dict[str, bytes]:
    return {f"set/{i % classes}/{i % classes}.{i:03d}.png": encoded(drawn(i)) for i in range(N)}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """An archive of the user."""
    return zipped(tmp_path / "mine.zip", files_of() | {"readme.txt": b"", "__MACOSX/set/._0.000.png": b""})


def fetch(raw: Path, **given: str) -> None:
    archive.fetch(raw, **{**NOWHERE, **given}, size=16, licence="mine")


def read(raw: Path, **options: object) -> Dataset:
    return archive.read(raw, **{**READ, **options}, path=None, licence="mine")


def same(one: Dataset, two: Dataset) -> bool:
    tensors = zip(*([x for part in data.splits.values() for x in part] for data in (one, two)), strict=True)
    return all(torch.equal(a, b) for a, b in tensors) and (one.class_names, one.report) == (two.class_names, two.report)


# Fetching


def test_archive_is_copied_byte_for_byte(raw, mine):
    fetch(raw, path=str(mine))
    assert [file.name for file in raw.iterdir()] == ["archive.zip"]
    assert (raw / "archive.zip").read_bytes() == mine.read_bytes()


def test_home_is_understood(raw, mine, monkeypatch):
    monkeypatch.setenv("HOME", str(mine.parent))
    fetch(raw, path="~/mine.zip")
    assert (raw / "archive.zip").read_bytes() == mine.read_bytes()


def test_folder_gives_the_dataset_of_the_archive(raw, mine, tmp_path):
    fetch(raw, path=str(mine))
    (tmp_path / "other").mkdir()
    fetch(tmp_path / "other", path=str(put(tmp_path / "folder", files_of() | {"set/notes.txt": b""})))
    assert same(read(raw), read(tmp_path / "other"))


@pytest.mark.parametrize("way", [{"url": "https://example.org/a.zip"}, {"drive": "abc"}])
def test_download_is_checked_and_kept(raw, mine, monkeypatch, way):
    asked = []

    def download(target: Path, **options: object) -> None:
        asked.append((target.name, options))
        shutil.copyfile(mine, target)

    monkeypatch.setattr(archive, "download", download)
    fetch(raw, **way, sha256="0" * 64)
    assert asked == [("archive.zip", {"url": None, "drive": None, **way, "sha256": "0" * 64})]
    assert (raw / "archive.zip").read_bytes() == mine.read_bytes()
    ((option, value),) = way.items()
    mine.write_bytes(b"<html>sign in</html>")
    with pytest.raises(UserError, match=f"^{option} = {value} is no zip archive: it starts with b'<html>si'"):
        fetch(raw, **way)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "none of path, url, drive is given; one of them must say where the images are"),
        ({"path": "a", "url": "b"}, "path, url of path, url, drive is given"),
        ({"path": "a", "url": "b", "drive": "c"}, "path, url, drive of path, url, drive is given"),
    ],
)
def test_exactly_one_way_is_given(raw, given, says):
    with pytest.raises(UserError, match=f"^{says}"):
        fetch(raw, **given)


def test_sha256_is_checked_of_archive_and_folder(raw, mine, tmp_path):
    digest = hashlib.sha256(mine.read_bytes()).hexdigest()
    fetch(raw, path=str(mine), sha256=digest.upper())
    with pytest.raises(UserError, match=rf"^path = .*mine.zip has SHA-256 {digest}, not {'0' * 64}$"):
        fetch(raw, path=str(mine), sha256="0" * 64)
    folder = put(tmp_path / "folder", files_of())
    with pytest.raises(UserError, match=r"folder has SHA-256 .*, not 0000"):
        fetch(raw, path=str(folder), sha256="0" * 64)
    fetch(raw, path=str(folder), sha256=hashlib.sha256((raw / "archive.zip").read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, ": there is no such file or folder$"),
        (
            lambda path: path.write_bytes(b"\x1f\x8b"),
            r" is no zip archive: it starts with b'\\x1f\\x8b'; copy or download it again$",
        ),
        (lambda path: zipped(path, {"a/../../1.png": b""}), ": 'a/../../1.png' leads outside of the archive"),
        (lambda path: zipped(path, {"1.txt": b""}), r" holds no image \(.png .jpg .jpeg .tif .tiff\)$"),
        (lambda path: path.mkdir(), " holds no image"),
    ],
)
def test_path_that_gives_no_images_is_refused_and_nothing_kept(raw, tmp_path, make, reason):
    make(tmp_path / "bad.zip")
    with pytest.raises(UserError, match=f"^path = .*bad.zip{reason}"):
        fetch(raw, path=str(tmp_path / "bad.zip"))
    assert not list(raw.iterdir())


def test_full_disk_is_one_line(raw, mine):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^path = .*mine.zip: copying it to .*archive.zip: File too large$"):
            fetch(raw, path=str(mine))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_archive_that_may_not_be_read_is_one_line(raw, mine, monkeypatch):
    def refusing(path: Path) -> zipfile.ZipFile:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(zipfile, "ZipFile", refusing)
    with pytest.raises(UserError, match=r"^path = .*mine.zip: Permission denied$"):
        fetch(raw, path=str(mine))


# Labels


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("7.png", 7),
        ("12.0001.x.png", 12),
        ("3.a/5.b.png", 5),
        ("007.1.png", 7),
        ("۵.1.png", 5),
        ("٥.1.png", 5),
        ("۱2.1.png", 12),
        ("-1.1.png", None),
        ("+1.1.png", None),
        ("1_0.1.png", None),
        (" 1.1.png", None),
        ("².1.png", None),
        ("a.1.png", None),
        ("5/a.png", None),
        ("1e3.png", None),
        (f"{'9' * 5000}.png", None),
    ],
)
def test_label_is_the_integer_before_the_first_dot(name, label):
    assert archive.label_of(name) == label


# Reading


def test_images_come_with_their_labels_in_rising_order_of_the_labels(raw):
    zipped(raw / "archive.zip", {f"{label}.{i}.png": encoded(drawn(9 * label + i)) for label in (10, 9, 2) for i in range(9)})
    data = read(raw)
    assert data.class_names == ["2", "9", "10"]
    images, labels = (torch.cat(parts) for parts in zip(*data.splits.values(), strict=True))
    assert images.shape == (27, 1, 16, 16)
    expected = {
        pictures.decode(encoded(drawn(9 * label + i)), size=16, invert=False, pad=False).tobytes(): y
        for y, label in enumerate((2, 9, 10))
        for i in range(9)
    }
    for image, y in zip(images, labels, strict=True):
        assert expected.pop(image.numpy().tobytes()) == y
    assert data.report["split"] == {"by": "pixels", "validation_share": 0.2, "test_share": 0.25, "seed": 0}
    assert data.report["dropped"] == {}


def test_digits_of_any_script_are_one_class(raw):
    zipped(raw / "archive.zip", {f"{label}.{i}.png": encoded(drawn(i)) for i, label in enumerate(["5", "۵", "٥", "05"])})
    assert read(raw).class_names == ["5"]


def test_options_reach_the_pictures(raw):
    zipped(raw / "archive.zip", files_of())
    plain, inverted = read(raw, pad=True), read(raw, pad=True, invert=True)
    pixels = [np.sort(torch.cat([images for images, _ in data.splits.values()]).numpy().ravel()) for data in (plain, inverted)]
    assert (pixels[0] == np.sort(255 - pixels[1])).all()
    assert not same(plain, read(raw, pad=True, seed=1))
    assert not same(plain, read(raw, pad=False))


@pytest.mark.parametrize("cores", [1, 2])
def test_labels_stay_with_their_images_where_some_are_dropped(raw, monkeypatch, cores):
    monkeypatch.setattr(pictures, "_cores", lambda: cores)
    files = {f"{i % 3}.{i:03d}.png": encoded(np.full((9, 9), 80 * (i % 3) + i % 7, np.uint8)) for i in range(150)}
    bad = {f"{i % 3}.{i:03d}.png": b"text" for i in (0, 4, 77)} | {"x.png": encoded(drawn(0)), "set/-1.2.png": encoded(drawn(1))}
    zipped(raw / "archive.zip", files | bad)
    data = read(raw)
    for images, labels in data.splits.values():
        assert ((images[:, 0, 0, 0] // 80) == labels).all()
    assert sum(len(y) for _, y in data.splits.values()) == 147
    assert data.report["dropped"] == {archive.UNLABELLED: 2, pictures.UNKNOWN: 3}
    assert data.report["dropped_files"][-2:] == [f"{name}: {archive.UNLABELLED}" for name in ("set/-1.2.png", "x.png")]


def test_images_of_one_writer_stay_together_where_some_are_dropped(raw):
    numbers = range(120)
    files = {f"writer{i % 40}/{i % 3}.{i}.png": encoded(np.full((9, 9), 2 * i, np.uint8)) for i in numbers}
    zipped(raw / "archive.zip", files | {f"writer{i}/0.{i}.png": b"text" for i in (0, 33)})
    data = read(raw, group=r"^writer(\d+)/")
    assert data.report["split"]["by"] == "group"
    side = {int(grey) // 2: name for name, (images, _) in data.splits.items() for grey in images[:, 0, 0, 0]}
    assert sorted(side) == [i for i in numbers if i not in (0, 33)]
    assert len({(i % 40, name) for i, name in side.items()}) == 40
    assert set(side.values()) == {"train", "validation", "test"}
    with pytest.raises(UserError, match=r"group = '\^writer\(1\)/' says nothing of 'writer0/0.0.png'; it must match"):
        read(raw, group="^writer(1)/")


def test_equal_images_of_two_writers_are_counted_beside_unreadable_ones(raw):
    files = {f"w{i % 10}/{i % 2}.{i}.png": encoded(np.full((9, 9), i // 2, np.uint8)) for i in range(100)}
    zipped(raw / "archive.zip", files | {"w0/0.x.png": b"text"})
    dropped = read(raw, group="(w.)").report["dropped"]
    assert dropped.pop(pictures.UNKNOWN) == 1
    assert set(dropped) <= {"train image that another split has too", "validation image that another split has too"}
    assert sum(dropped.values()) > 0


def test_strict_refuses_what_has_no_label(raw):
    zipped(raw / "archive.zip", files_of() | {"x.png": encoded(drawn(0))})
    with pytest.raises(UserError, match=r"archive.zip: 'x.png': no integer label before the first dot; with strict: false"):
        read(raw, strict=True)


def test_names_without_labels_are_told_as_such(raw):
    zipped(raw / "archive.zip", {f"image{i}.png": encoded(drawn(i)) for i in range(30)})
    with pytest.raises(UserError, match=r"30 of 30 images are unreadable \(no integer label before the first dot: 30\)"):
        read(raw)


def test_class_that_was_all_dropped_is_not_lost_silently(raw):
    zipped(raw / "archive.zip", files_of() | {"9.1.png": b"text"})
    with pytest.raises(UserError, match="class '9' has 0 images"):
        read(raw)


def test_missing_archive_is_refused(raw):
    with pytest.raises(UserError, match=r"raw/archive.zip is missing; `dvc repro` makes it$"):
        read(raw)


def test_damage_of_any_kind_is_an_error_of_the_user(raw, tmp_path, mine, monkeypatch):
    monkeypatch.setattr(pictures, "_cores", lambda: 1)
    whole = zipped(mine, files_of(30)).read_bytes()
    outcomes = set()
    for content in damaged(whole, seconds=1):
        mine.write_bytes(content)
        try:
            fetch(raw, path=str(mine))
            read(raw)
            outcomes.add("read")
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else "told in two lines")
    assert outcomes == {"read", "refused"}
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} <= {"mine.zip", "archive.zip"}
