"""A folder of images, one sub-folder per class, or none: what is packed, and what is read of it."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz import damaged
from test_pictures import GOOD, JPEG, TIFF, drawn, encoded
from test_zips import put

from stages.datasets import folder, pictures
from stages.datasets.splits import Dataset
from stages.errors import UserError

READ = {"size": 16, "invert": False, "pad": False, "strict": False, "group": None}
READ |= {"validation_share": 0.2, "test_share": 0.25, "seed": 0}


def files_of(*classes: str, N: int = 12) -> dict[str, bytes]:
    return {f"{y}/{i}.png": encoded(drawn(100 * k + i, grey=100 + 50 * k)) for k, y in enumerate(classes) for i in range(N)}


def read(raw: Path, mine: Path, **options: object) -> Dataset:
    folder.fetch(raw, path=str(mine), size=16, licence="mine")
    return folder.read(raw, **{**READ, **options}, path=str(mine), licence="mine")


def paper(images: torch.Tensor) -> torch.Tensor:
    """Which class of `files_of` images are of, by their paper."""
    return ((images[:, 0, 0].float().mean(-1) - 100) / 50).round().long()


def test_sub_folders_are_classes(raw, mine):
    data = read(raw, put(mine, files_of("الف", "ب", "پ")))
    assert data.class_names == ["الف", "ب", "پ"]
    for images, labels in data.splits.values():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (1, 16, 16)
        assert torch.equal(paper(images), labels)
    assert sum(len(y) for _, y in data.splits.values()) == 36
    assert data.report["dropped"] == {}
    assert [file.name for file in raw.iterdir()] == ["images.zip"]


def test_files_of_every_kind_in_deeper_folders_belong_to_the_first_level(raw, mine):
    put(
        mine,
        {
            "a/x/y/1.PNG": GOOD,
            "a/x/2.JPeG": JPEG,
            "a/3.jpg": JPEG[:-1] + b"\xd9",
            "a/4.Tif": TIFF,
            "b/x/1.tiff": encoded(drawn(3), "TIFF"),
        },
    )
    put(
        mine,
        {
            "b/2.png": encoded(drawn(0)),
            "b/3.png": encoded(drawn(1)),
            "a/x/5.png": encoded(drawn(2)),
            "b/notes.txt": b"",
            ".DS_Store": b"",
        },
    )
    data = read(raw, mine)
    assert data.class_names == ["a", "b"]
    assert sum(len(y) for _, y in data.splits.values()) == 8


def test_images_without_sub_folders_have_no_labels(raw, mine):
    data = read(raw, put(mine, {f"{i}.png": encoded(drawn(i)) for i in range(20)} | {"notes.txt": b""}))
    assert data.class_names == ["unlabelled"]
    assert all(y.unique().tolist() == [0] for _, y in data.splits.values())


def test_names_that_differ_in_case_are_two_classes(raw, mine):
    assert read(raw, put(mine, files_of("A", "a"))).class_names == ["A", "a"]


def test_class_names_are_nfc(raw, mine):
    name = unicodedata.normalize("NFC", "é")
    assert read(raw, put(mine, files_of(unicodedata.normalize("NFD", name)))).class_names == [name]


def test_result_is_the_same_every_time_and_with_any_number_of_cores(raw, mine, monkeypatch):
    put(mine, files_of("a", "b", N=100))
    found = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(pictures, "_cores", lambda cores=cores: cores)
        found.append((read(raw, mine), (raw / "images.zip").read_bytes()))
    (first, content), *others = found
    for data, again in others:
        assert again == content
        for a, b in zip(first.splits.values(), data.splits.values(), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_unreadable_images_are_dropped_or_refused(raw, mine):
    put(mine, files_of("a", "b") | {"a/5.png": b"text"})
    data = read(raw, mine)
    assert data.report["dropped_files"] == [f"a/5.png: {pictures.UNKNOWN}"]
    for images, labels in data.splits.values():
        assert torch.equal(paper(images), labels)
    with pytest.raises(UserError, match=f"images.zip: 'a/5.png': {pictures.UNKNOWN}; with strict: false"):
        read(raw, mine, strict=True)
    put(mine, {f"b/{i}.png": b"text" for i in range(2)})
    with pytest.raises(UserError, match="3 of 24 images are unreadable"):
        read(raw, mine)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda mine: put(mine, files_of("a") | {"1.png": GOOD}),
            ": '1.png' lies in no sub-folder but others are in classes, such as 'a'",
        ),
        (lambda mine: put(mine, {"1.png": GOOD, "unlabelled/1.png": GOOD}), ": '1.png' lies in no sub-folder"),
        (lambda mine: (put(mine, {"1.png": GOOD}), (mine / "a").mkdir()), ": '1.png' lies in no sub-folder"),
        (lambda mine: (put(mine, files_of("a")), (mine / "ب").mkdir()), r": the class 'ب' has no image \(.png .jpg .*\); remove"),
        (lambda mine: put(mine, files_of("a") | {"b/x/notes.txt": b""}), ": the class 'b' has no image"),
        (
            lambda mine: put(mine, {f"{unicodedata.normalize(form, 'é')}/1.png": GOOD for form in ("NFC", "NFD")}),
            ": .* are one name",
        ),
        (lambda mine: put(mine, {"a/notes.txt": b""}), " holds no image"),
        (lambda mine: (mine / "a").symlink_to(mine.parent), ": 'a' is a symbolic link"),
        (lambda mine: mine.rmdir(), ": there is no such folder"),
        (lambda mine: (mine.rmdir(), mine.write_bytes(b"")), " is no folder"),
    ],
)
def test_folder_whose_classes_are_not_clear_is_refused_in_one_line(raw, mine, make: Callable[[Path], object], reason):
    make(mine)
    with pytest.raises(UserError, match=rf"^path = .*mine{reason}") as caught:
        folder.fetch(raw, path=str(mine))
    assert "\n" not in str(caught.value)


def test_class_with_one_image_is_refused(raw, mine):
    with pytest.raises(UserError, match="class 'b' has 1 images"):
        read(raw, put(mine, files_of("a") | {"b/1.png": GOOD}))


def test_missing_archive_is_refused(raw):
    with pytest.raises(UserError, match=r"raw/images.zip is missing; `dvc repro` makes it$"):
        folder.read(raw, **READ)


def test_files_damaged_anyhow_give_errors_of_the_user_only(raw, mine, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_cores", lambda: 1)
    put(mine, files_of("a", "b", N=5))
    outcomes = set()
    for i, content in enumerate(damaged(GOOD, seconds=1)):
        (mine / "a" / f"{i % 5}.png").write_bytes(content)
        try:
            read(raw, mine)
            outcomes.add("read")
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else "told in two lines")
    assert outcomes <= {"read", "refused"}
    assert "refused" in outcomes
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "mine"}
