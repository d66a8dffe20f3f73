"""Images as people have them: what a folder or an archive is taken for, and what is refused as unclear."""

import unicodedata
from pathlib import Path

import pytest
import torch
from test_pictures import drawn, encoded
from test_zips import put, zipped

from stages.datasets import archive, auto
from stages.datasets.auto import FLAT, FOLDERS, NAMES, Layout
from stages.datasets.pictures import Look
from stages.datasets.splits import Dataset
from stages.errors import UserError

READ = {"size": 16, "invert": False, "pad": True, "strict": False, "group": None}
READ |= {"validation_share": 0.2, "test_share": 0.25, "seed": 0}
GOOD = encoded(drawn(0))
JUNK = {"Thumbs.db": b"", ".DS_Store": b"", "@eaDir/0/9.0.png": GOOD, "__MACOSX/0/9.1.png": GOOD, ".hidden.png": GOOD}
LETTERS = ("الف", "ب", "پ")


def named(form: str, *labels: str, N: int = 12) -> dict[str, bytes]:
    """Images of each label, whose paper tells which it is of."""
    return {form.format(y=y, i=i): encoded(drawn(100 * k + i, grey=100 + 50 * k)) for k, y in enumerate(labels) for i in range(N)}


def layout(path: Path, *names: str) -> Layout:
    return auto.layout(zipped(path / "a.zip", dict.fromkeys(names, GOOD)), "mine")


def read(raw: Path, mine: Path, **options: object) -> Dataset:
    auto.fetch(raw, path=str(mine), licence="mine")
    return auto.read(raw, **{**READ, **options}, path=str(mine), licence="mine")


def papers(data: Dataset) -> None:
    """Whether every image has the label that its paper tells."""
    for images, labels in data.splits.values():
        assert torch.equal(((images[:, 0, 0].float().mean(-1) - 100) / 50).round().long(), labels)


@pytest.mark.parametrize(
    ("files", "kind", "class_names"),
    [
        (named("{y}/{i}.png", *LETTERS), FOLDERS, list(LETTERS)),
        (named("{y}.{i:03d}.png", *LETTERS), NAMES, list(LETTERS)),
        (named("{y}/{i}.png", "2", "۱۰", "011"), FOLDERS, ["2", "10", "11"]),
        (named("{y}.{i}.png", "2", "۱۰", "011"), NAMES, ["2", "10", "11"]),
    ],
)
@pytest.mark.parametrize("around", ["", "letters/", "a/b c/"])
@pytest.mark.parametrize("packed", [False, True])
def test_each_layout_is_read_with_its_labels_from_a_folder_and_a_zip(raw, mine, files, kind, class_names, around, packed):
    files = {around + name: content for name, content in files.items()} | JUNK
    data = read(raw, zipped(mine / "a.zip", files) if packed else put(mine, files))
    assert data.class_names == class_names
    papers(data)
    assert sum(len(y) for _, y in data.splits.values()) == 36, "nothing of what systems leave"
    assert data.report["layout"] == kind + f", all inside {around}" * bool(around)
    assert data.report["size"] == 16


@pytest.mark.parametrize("around", ["", "letters/"])
def test_without_folders_and_labels_all_is_one_class(raw, mine, around):
    data = read(raw, put(mine, named(around + "IMG_{y}_{i:03d}.png", "0")))
    assert (data.class_names, data.report["layout"][: len(FLAT)]) == (["unlabelled"], FLAT)


def test_labels_that_are_one_number_or_one_name_are_one_class(tmp_path):
    found = layout(tmp_path, *(f"{y}.{i}.png" for i in range(3) for y in ("5", "05", "۵", "7")))
    assert found.class_names == ["5", "7"]
    assert found.labels.count(0) == 9
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    found = layout(tmp_path, *(f"{y}.{i}{y.isascii()}{len(y)}.png" for i in range(3) for y in (*forms, "b")))
    assert found.class_names == ["b", forms[0]]


FEW = [f"{y}.{i}.png" for y in "ab" for i in range(3)]


@pytest.mark.parametrize(
    ("names", "kind", "class_names"),
    [
        (["IMG_001.png", "a.png", "b.png", "c.png"], FLAT, ["unlabelled"]),
        ([f"2024.{month:02d}.{day:02d}.png" for month in (1, 2) for day in range(1, 9)], FLAT, ["unlabelled"]),
        ([f"{year}.01.{day:02d}.png" for year in (2023, 2024) for day in range(1, 9)], FLAT, ["unlabelled"]),
        ([f"{day:02d}.{month:02d}.2024.png" for month in range(1, 9) for day in range(1, 9)], FLAT, ["unlabelled"]),
        ([f"Screenshot 2024-05-01 at {h}.{m}.30.png" for h in (10, 11) for m in range(9)], FLAT, ["unlabelled"]),
        ([f"img.{i}.png" for i in range(9)], FLAT, ["unlabelled"]),
        ([f"{i}.scan.png" for i in range(9)], FLAT, ["unlabelled"]),
        ([*(f"{i}.png" for i in range(9)), *FEW], FLAT, ["unlabelled"]),
        ([*FEW, "b.3.png"], NAMES, ["a", "b"]),
        ([f"{y}.2024-05-{day:02d}.png" for y in "12" for day in range(1, 9)], NAMES, ["1", "2"]),
        ([f"{y}/{i}.scan.png" for y in "ab" for i in range(9)], FOLDERS, ["a", "b"]),
        ([f"{y}/2024.05.{i:02d}.png" for y in "ab" for i in range(1, 9)], FOLDERS, ["a", "b"]),
        ([f"{y}/{y}.{i}.png" for y in "ab" for i in range(9)], FOLDERS, ["a", "b"]),
        ([f"{y}/writer {w}/{i}.scan.png" for y in "ab" for w in (1, 2) for i in range(9)], FOLDERS, ["a", "b"]),
        ([*FEW, *(f"more/{name}" for name in FEW)], NAMES, ["a", "b"]),
    ],
)
def test_names_tell_labels_only_where_several_images_share_each(tmp_path, names, kind, class_names):
    found = layout(tmp_path, *names)
    assert (found.kind, found.class_names) == (kind, class_names)
    assert len(found.labels) == len(names)


def test_one_name_in_ten_may_tell_no_label_and_is_dropped_and_counted(raw, mine):
    files = named("{y}.{i}.png", "0", "1", N=15)
    data = read(raw, put(mine, files | {f"{i}.png": GOOD for i in range(3)}))
    assert data.report["dropped"] == {auto.UNNAMED: 3}
    assert data.report["dropped_files"] == [f"{i}.png: {auto.UNNAMED}" for i in range(3)]
    papers(data)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([*FEW, "1.png"], r": the names of 86% tell labels, LABEL\.anything\.png, of others not, such as '1\.png'; rename these"),
        (
            [f"{part}/{name}" for part in "xy" for name in FEW],
            r": the classes could be folders, such as 'x', or .* such as 'a'; say",
        ),
        (["a/1.png", "a/2.png", "1.png"], r": '1\.png' lies in no folder but others do, such as 'a/1\.png'; put it into"),
        (["Train/a/1.png", "test/a/1.png"], r" has folders called 'Train' and 'test': are these classes\?"),
        (["a/1.png", "b/1.png", "c/1.bmp"], r": the class 'c' has no image \(.png .jpg .*\); remove its folder"),
        (["in/a/1.png", "in/b/1.png", "in/c/d/1.bmp"], r": the class 'in/c' has no image"),
        (["notes.txt"], r" holds no image"),
    ],
)
def test_what_is_not_clear_is_refused_in_one_line_that_says_what_to_do(tmp_path, names, says):
    with pytest.raises(UserError, match=f"^mine{says}") as refused:
        layout(tmp_path, *names)
    assert "\n" not in str(refused.value)


def test_folders_without_an_image_elsewhere_do_no_harm(tmp_path):
    assert layout(tmp_path, "1.png", "2.png", "docs/readme.txt").kind == FLAT
    assert layout(tmp_path, "in/a/1.png", "in/b/1.png", "docs/x.txt", "in/a/x/y.txt", "in/.git/x").class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, ": there is no such file or folder"), (b"GIF89a", " is no zip archive: it starts with b'GIF89a'"), (b"", " is no zip")],
)
def test_a_path_that_is_neither_is_refused(raw, tmp_path, content, says):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=f"^path = .*/x{says}"):
        auto.fetch(raw, path=str(tmp_path / "x"))


def test_the_size_is_the_nearest_to_the_longer_side_of_most_pictures(raw, mine):
    sizes = {5: 16, 21: 16, 23: 28, 28: 28, 35: 32, 45: 48, 300: 64}
    assert {side: auto.fitting_size([Look(3, side, 0), Look(side, 3, 0), Look(900, 9, 0)]) for side in sizes} == sizes
    data = read(raw, put(mine, {f"{i}.png": encoded(drawn(i)) for i in range(30)} | {"bad.png": b"no"}), size=None)
    sides = [max(drawn(i).shape) for i in range(30)]
    assert auto.longer_side(auto.looks(raw / archive.FILE, auto.layout(raw / archive.FILE).members)) == int(
        torch.tensor(sides).double().quantile(0.5)
    )
    assert data.train[0].shape[-1] == data.report["size"] == 32


def test_so_many_are_looked_at_from_the_first_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "LOOKED_AT", 3)
    files = {f"{i:02d}.png": encoded(torch.full((4, 10 + i), 9 * i, dtype=torch.uint8).numpy()) for i in range(11)}
    path = zipped(tmp_path / "a.zip", files)
    assert auto.looks(path, auto.layout(path).members) == [Look(10, 4, 0), Look(15, 4, 45), Look(20, 4, 90)]
