"""The Hoda digits: .cdb files made here, right and wrong in every way; and the real one, where NAQSH_HODA names its folder."""

import errno
import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import damaged
from numpy.typing import NDArray

from stages.datasets import hoda
from stages.datasets.hoda import HEIGHT, TYPICAL, Ink, decode, digits, place
from stages.errors import UserError

OPTIONS: dict[str, Any] = {"validation_share": 0.2, "test_share": 0.3, "seed": 0, "path": None}


def drawing(*rows: str) -> Ink:
    """Ink where there is a #."""
    return np.array([[c == "#" for c in row] for row in rows])


def runs_of(ink: Ink) -> bytes:
    """The run lengths of an image, by the format's own words: pixel after pixel, row after row."""
    runs = bytearray()
    for row in ink.tolist():
        colour, length = False, 0
        for pixel in row:
            if pixel != colour:
                runs.append(length)
                colour, length = pixel, 0
            length += 1
        runs.append(length)
    return bytes(runs)


def record(label: int, width: int, height: int, runs: bytes, *, mark: int = 0xFF, own: bool = True) -> bytes:
    size = bytes((width, height)) if own else b""
    return bytes((mark, label)) + size + len(runs).to_bytes(2, "little") + runs


def header(labels: list[int], *, count: int | None = None, width: int = 0, height: int = 0, kind: int = 0) -> bytes:
    per_label = np.bincount(labels, minlength=128).astype("<u4").tobytes()
    count = len(labels) if count is None else count
    start = (2005).to_bytes(2, "little") + bytes((8, 4, height, width)) + count.to_bytes(4, "little")
    return (start + per_label + bytes((kind,)) + b"Remarks").ljust(1024, b"\0")


def cdb(images: list[tuple[int, Ink]]) -> bytes:
    """A .cdb file of labels and images, each of a size of its own."""
    records = [record(label, ink.shape[1], ink.shape[0], runs_of(ink)) for label, ink in images]
    return header([label for label, _ in images]) + b"".join(records)


def scribbles(n: int, seed: int = 0) -> list[tuple[int, Ink]]:
    """Images of all labels in turn, 1 to 40 pixels high and wide."""
    rng = np.random.default_rng(seed)
    return [(i % 10, rng.random(rng.integers(1, 41, 2)) < 0.4) for i in range(n)]


def put(folder: Path, **files: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name.replace('_', ' ')}.cdb").write_bytes(content)
    return folder


def shown(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


# Parsing


def test_each_record_with_a_size_of_its_own_is_read_to_the_pixel() -> None:
    ring, dot = drawing(".##.", "#..#", ".##."), drawing("#")
    content = header([5, 0]) + record(5, 4, 3, bytes((1, 2, 1, 0, 1, 2, 1, 1, 2, 1))) + record(0, 1, 1, bytes((0, 1)))
    (label, ink), (other_label, other) = digits(content, "f")
    assert (label, other_label) == (5, 0)
    assert np.array_equal(ink, ring)
    assert np.array_equal(other, dot)


def test_records_of_one_size_that_the_header_tells() -> None:
    runs = bytes((3, 0, 1, 2, 2, 1))  # 3 wide and 3 high: paper; # and 2 of paper; 2 of paper and #
    content = header([7, 7], width=3, height=3) + 2 * record(7, 3, 3, runs, own=False)
    found = list(digits(content, "f"))
    assert [label for label, _ in found] == [7, 7]
    assert all(np.array_equal(ink, drawing("...", "#..", "..#")) for _, ink in found)


def test_width_and_height_of_the_header_are_not_mixed_up() -> None:
    content = header([1], width=2, height=3) + record(1, 2, 3, bytes((0, 2, 2, 1, 1)), own=False)
    ((_, ink),) = digits(content, "f")
    assert np.array_equal(ink, drawing("##", "..", ".#"))


def test_any_image_comes_back_as_it_was_written() -> None:
    images = [*scribbles(200), (0, np.ones((255, 1), bool)), (0, np.ones((1, 255), bool)), (9, np.zeros((7, 5), bool))]
    found = list(digits(cdb(images), "f"))
    assert [label for label, _ in found] == [label for label, _ in images]
    assert all(np.array_equal(ink, was) for (_, ink), (_, was) in zip(found, images, strict=True))


def test_a_run_of_nothing_within_a_row_changes_the_colour_and_no_more() -> None:
    assert np.array_equal(decode(np.array([1, 0, 1, 0, 0, 1], np.uint8), 3, 1), drawing("..#"))


RING = record(5, 4, 3, bytes((1, 2, 1, 0, 1, 2, 1, 1, 2, 1)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no whole .cdb file: it has 0 bytes, its header alone would have 1024"),
        (b"PK\3\4" * 200, "is no whole .cdb file: it has 800 bytes"),
        (b"PK\3\4" * 999, "holds images of kind 3; only binary ones, kind 0, can be read, and no grey ones"),
        (header([5], kind=1) + RING, "holds images of kind 1; only binary ones, kind 0, can be read, and no grey ones"),
        (header([5], width=4) + RING, "says that all images are 4 wide and 0 high; both must be 0, or neither"),
        (header([]), "has no records"),
        (header([5], count=2**32 - 1) + RING, "its header says 4294967295 records, too many for its 1040 bytes"),
        (header([5, 5]) + RING, "record 2 of 2 is cut off"),
        (header([5, 5]) + RING + b"\xff", "record 2 of 2 is cut off"),
        (header([5, 5]) + RING + RING[:-1], "record 2 of 2 is cut off: it says that its image has 10 bytes; 9 are left"),
        (header([5, 5]) + RING + b"\xfe" + RING[1:], "record 2 of 2 begins with 0xfe, not with 0xff"),
        (header([10]) + record(10, 1, 1, b"\1"), r"record 1 of 1 has the label 10; allowed: 0\.\.9"),
        (header([5]) + record(5, 0, 3, b"\1"), "record 1 of 1 is 0 pixels wide and 3 high; both must be at least 1"),
        (header([5]) + record(5, 4, 0, b"\1"), "record 1 of 1 is 4 pixels wide and 0 high"),
        (header([5]) + record(5, 4, 3, b"\5\7"), "record 1 of 1 has a run longer than its row"),
        (header([5]) + record(5, 4, 3, b"\4\2\4\2"), "record 1 of 1 has a run longer than its row"),
        (header([5]) + record(5, 4, 3, b"\4\4\2"), "record 1 of 1 fills 10 of 12 pixels: 4 wide, 3 high"),
        (header([5]) + record(5, 4, 3, b"\4\4"), "record 1 of 1 fills 8 of 12 pixels"),
        (header([5, 5]) + RING + record(5, 4, 3, b""), "record 2 of 2 fills 0 of 12 pixels"),
        (header([5]) + record(5, 4, 3, b"\4\4\4\4"), "record 1 of 1 has runs after its last row: 4 pixels wide, 3 high"),
        (header([5]) + record(5, 4, 3, b"\4\4\4\0"), "record 1 of 1 has runs after its last row"),
        (header([5]) + RING + b"\0", "goes on for 1 bytes after the 1 records that its header says"),
        (header([5]) + RING + RING, "goes on for 16 bytes after the 1 records"),
        (header([6]) + RING, "the header says 0 records of the label 5; there are 1"),
        (header([5, 99], count=1) + RING, "the header says 1 records of the label 99; there are 0"),
    ],
)
def test_a_malformed_file_is_refused_by_its_name_and_record(content: bytes, says: str) -> None:
    with pytest.raises(UserError, match=rf"^mine\.cdb[ :].*{says}") as caught:
        list(digits(content, "mine.cdb"))
    assert "\n" not in str(caught.value)


def test_a_record_without_bytes_at_the_end_of_the_file_is_refused() -> None:
    whole = record(1, 4, 3, b"\4\4\4", own=False)
    with pytest.raises(UserError, match="record 2 of 2 fills 0 of 12 pixels"):
        list(digits(header([1, 1], width=4, height=3) + whole + record(1, 4, 3, b"", own=False), "f"))


def test_garbage_is_refused_and_takes_no_memory() -> None:
    whole = cdb(scribbles(30))
    same = header([3] * 20, width=8, height=9) + 20 * record(3, 8, 9, bytes([2, 3, 3] * 9), own=False)
    refusals, kept = [], 0
    tracemalloc.start()
    for content in (whole, same):
        for copy in damaged(content, seconds=1.5):
            try:
                for _, ink in digits(copy, "f"):
                    assert ink.size <= 255 * 255
                kept += 1
            except UserError as error:
                refusals.append(str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20
    assert len(refusals) > 100
    assert all(re.match(r"f[ :]", message) and "\n" not in message for message in refusals)
    assert kept  # damage to the remarks, or to pixels


def test_a_claim_of_more_records_than_bytes_allocates_nothing(tmp_path: Path) -> None:
    folder = put(tmp_path / "raw", digits=header([5], count=2**32 - 1) + RING * 1000)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"digits\.cdb is no whole \.cdb file: its header says 4294967295 records"):
        hoda.read(folder, size=64, **OPTIONS)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# Placing


def box(image: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is darker than the middle grey; the ends are not part of it."""
    rows, columns = np.flatnonzero((image < 128).any(1)), np.flatnonzero((image < 128).any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


@pytest.mark.parametrize("size", [28, 32, 64, 100])
@pytest.mark.parametrize("shape", [(33, 33), (20, 40), (64, 10), (5, 5), (255, 40), (255, 255)])
def test_a_digit_is_black_on_white_in_the_middle_in_its_proportions_at_the_common_scale(size: int, shape: tuple[int, int]) -> None:
    image = place(np.ones(shape, bool), size)
    top, bottom, left, right = box(image)
    # Of a straight edge between pixels, the half-way grey lies within half a new pixel of it.
    scale = HEIGHT * size / max(*shape, TYPICAL)
    assert bottom - top == pytest.approx(shape[0] * scale, abs=1.01)
    assert right - left == pytest.approx(shape[1] * scale, abs=1.01)
    assert abs(top - (size - bottom)) <= 1
    assert abs(left - (size - right)) <= 1
    assert (image.shape, image.dtype) == ((size, size), np.uint8)
    assert image[0, 0] == image[-1, -1] == 255
    if min(shape) * scale > 4:
        assert image[size // 2, size // 2] == 0


def test_a_small_digit_stays_small_and_a_large_one_fills_what_a_usual_one_fills() -> None:
    heights = [box(place(np.ones((height, 4), bool), 64)) for height in (11, 33, 66)]
    # 11 px are a third of 33 px, which fill 46.08 of 64; half a pixel at either end.
    assert [bottom - top for top, bottom, _, _ in heights] == pytest.approx([15.4, 46.1, 46.1], abs=1.01)


def test_ink_is_averaged_not_picked() -> None:
    ink = np.random.default_rng(0).random((60, 60)) < 0.5
    small = place(ink, 32)
    assert len(np.unique(small)) > 50
    # The triangle filter keeps the amount of ink: the page is (60 / HEIGHT)^2 pixels, rounding is half a level at most.
    assert (255 - small.astype(float)).mean() / 255 == pytest.approx(ink.sum() / (60 / HEIGHT) ** 2, rel=0.01)


def test_an_image_is_neither_turned_nor_mirrored() -> None:
    image = place(np.pad(np.ones((8, 8), bool), ((0, 25), (0, 25))), 64)
    assert np.argwhere(image < 128).mean(0).tolist() == pytest.approx([14.2, 14.2], abs=1)
    wide = place(np.pad(np.ones((8, 8), bool), ((0, 25), (25, 0))), 64)
    assert np.array_equal(wide, image[:, ::-1])


def test_other_tones() -> None:
    image = place(np.ones((33, 33), bool), 32, dark=45, light=220)
    assert (image.min(), image.max()) == (45, 220)


# Reading


def test_files_without_the_published_split_are_divided_together(tmp_path: Path) -> None:
    one, two = scribbles(100), scribbles(150, seed=1)
    found = hoda.read(put(tmp_path / "raw", one=cdb(one), two=cdb(two)), size=16, **OPTIONS)
    assert found.class_names == list("۰۱۲۳۴۵۶۷۸۹")
    assert found.report["split"] == {"by": "pixels", "validation_share": 0.2, "test_share": 0.3, "seed": 0}
    for images, labels in found.splits.values():
        assert (images.dtype, images.shape[1:], labels.dtype) == (torch.uint8, (1, 16, 16), torch.int64)
        assert labels.unique().tolist() == list(range(10))
    there = [pair for images, labels in found.splits.values() for pair in zip(shown(images), labels.tolist(), strict=True)]
    assert sorted(there) == sorted((place(ink, 16).tobytes(), label) for label, ink in one + two)


def published(monkeypatch: pytest.MonkeyPatch, train: int, test: int) -> None:
    monkeypatch.setattr(hoda, "PUBLISHED", {"train": train, "test": test})


@pytest.mark.parametrize("names", [("Train_60000", "Test_20000"), ("TRAIN", "tEsT-set")])
def test_the_published_split_is_used_where_both_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]
) -> None:
    published(monkeypatch, 60, 20)
    train, test, rest = scribbles(60), scribbles(20, seed=1), scribbles(22, seed=2)
    folder = put(tmp_path / "raw", **{names[0]: cdb(train), names[1]: cdb(test), "RemainingSamples": cdb(rest)})
    half = OPTIONS | {"validation_share": 0.5}
    found = hoda.read(folder, size=16, **half)
    assert found.report["split"].startswith("published; 50% of the other images, by a hash of their pixels and seed 0")
    assert found.report["dropped"] == {}
    assert shown(found.test[0]) == [place(ink, 16).tobytes() for _, ink in test]
    assert found.test[1].tolist() == [label for label, _ in test]
    assert sorted(shown(found.train[0]) + shown(found.validation[0])) == sorted(place(ink, 16).tobytes() for _, ink in train + rest)
    assert len(found.validation[0]) == pytest.approx(41, abs=4 * (82 / 4) ** 0.5)  # binomial
    put(folder, Further=cdb(scribbles(40, seed=3)))
    assert set(shown(found.validation[0])) <= set(shown(hoda.read(folder, size=16, **half).validation[0]))


def test_train_images_that_are_among_the_test_images_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, 60, 20)
    train, test, rest = scribbles(60), scribbles(20, seed=1), scribbles(22, seed=2)
    train[7], rest[3] = test[5], test[6]
    folder = put(tmp_path / "raw", train=cdb(train), test=cdb(test), more=cdb(rest), test_2=cdb(test))
    found = hoda.read(folder, size=16, **OPTIONS)
    assert (len(found.train[0]) + len(found.validation[0]), len(found.test[0])) == (80, 20)
    assert sum(found.report["dropped"].values()) == 22
    assert not set(shown(found.train[0]) + shown(found.validation[0])) & set(shown(found.test[0]))


@pytest.mark.parametrize("counts", [(60, 21), (61, 20), (20, 60)])
def test_a_split_is_the_published_one_only_by_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, int]
) -> None:
    published(monkeypatch, *counts)
    folder = put(tmp_path / "raw", train=cdb(scribbles(60)), test=cdb(scribbles(20, seed=1)))
    assert hoda.read(folder, size=16, **OPTIONS).report["split"]["test_share"] == 0.3


def test_read_says_what_is_missing_or_wrong_by_the_file(tmp_path: Path) -> None:
    folder = put(tmp_path / "raw")
    with pytest.raises(UserError, match=r"raw holds no \.cdb file$"):
        hoda.read(folder, size=16, **OPTIONS)
    with pytest.raises(UserError, match="gone: there is no such file or folder"):
        hoda.read(tmp_path / "gone", size=16, **OPTIONS)
    put(folder, one=cdb(scribbles(50)), two=cdb(scribbles(50))[:-1])
    with pytest.raises(UserError, match=r"raw/two\.cdb: record 50 of 50 is cut off"):
        hoda.read(folder, size=16, **OPTIONS)
    put(folder, one=cdb([image for image in scribbles(50) if image[0] != 5]), two=cdb([(3, drawing("#"))]))
    with pytest.raises(UserError, match="class '۵' has 0 images"):
        hoda.read(folder, size=16, **OPTIONS)


# Fetching


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_fetch_copies_a_file_or_those_of_a_folder_and_nothing_else(tmp_path: Path, raw: Path) -> None:
    one, two = cdb(scribbles(10)), cdb(scribbles(10, seed=1))
    mine = put(tmp_path / "mine", Train_60000=one)
    (mine / "TEST.CDB").write_bytes(two)
    (mine / "._Train 60000.cdb").write_bytes(b"of a Mac")
    (mine / "read me.txt").write_text("please")
    (mine / "folder.cdb").mkdir()
    hoda.fetch(raw, path=str(mine), size=16)
    assert content_of(raw) == {"Train 60000.cdb": one, "TEST.CDB": two}
    (tmp_path / "single").mkdir()
    hoda.fetch(tmp_path / "single", path=str(mine / "TEST.CDB"))
    assert content_of(tmp_path / "single") == {"TEST.CDB": two}


def test_fetch_without_a_path_says_where_the_digits_come_from(raw: Path) -> None:
    with pytest.raises(
        UserError, match=r"^path = null: .* are not downloaded; get the \.cdb files from their authors' site .*name one"
    ):
        hoda.fetch(raw, path=None)


def test_fetch_says_what_is_wrong_with_path(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, says: str) -> None:
        with pytest.raises(UserError, match=f"^path = {path}{says}") as caught:
            hoda.fetch(raw, path=str(path))
        assert "\n" not in str(caught.value)
        assert not content_of(raw)

    mine = put(tmp_path / "mine")
    refuses(tmp_path / "gone", ": there is no such file or folder$")
    refuses(mine, r" holds no \.cdb file$")
    (mine / "digits.rar").write_bytes(b"Rar!")
    refuses(mine / "digits.rar", r" is no \.cdb file, nor a folder of some; an archive must be unpacked first$")
    refuses(tmp_path / ("x" * 300), ": File name too long$")
    put(mine, half=cdb(scribbles(5))[:-1])
    with pytest.raises(UserError, match=rf"^path = {mine}/half\.cdb: record 5 of 5 is cut off"):
        hoda.fetch(raw, path=str(mine))
    monkeypatch.setattr(hoda, "LARGEST", 1000)
    refuses(mine / "half.cdb", r" is too large: \d+ bytes; a \.cdb file may have 1000$")


def test_fetch_says_in_one_line_that_a_disk_cannot_read_or_is_full(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = put(tmp_path / "mine", digits=cdb(scribbles(5)))

    def failing(number: int) -> Any:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", failing(errno.ENOSPC))
        with pytest.raises(UserError, match=rf"^{raw}/digits\.cdb: No space left on device$"):
            hoda.fetch(raw, path=str(mine))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing(errno.EACCES))
        with pytest.raises(UserError, match=rf"^path = {mine}/digits\.cdb: Permission denied$"):
            hoda.fetch(raw, path=str(mine))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", failing(errno.EACCES))
        with pytest.raises(UserError, match=rf"^path = {mine}: Permission denied$"):
            hoda.fetch(raw, path=str(mine))


# The real test file


@pytest.fixture(scope="module")
def real() -> Path:
    """The folder of the published files; at least the test file is in it."""
    if not (folder := os.environ.get("NAQSH_HODA")):
        pytest.skip("NAQSH_HODA names no folder with the published 'Test 20000.cdb'")
    return Path(folder)


def test_the_published_test_file_is_read_to_its_last_byte(real: Path) -> None:
    records = list(digits((real / "Test 20000.cdb").read_bytes(), "f"))
    assert len(records) == 20000
    assert np.bincount([label for label, _ in records]).tolist() == [2000] * 10
    heights = [len(ink) for _, ink in records]
    assert (min(heights), max(heights)) == (5, 64)
    # The scans were cut out along the ink: an image read at a wrong width has empty rows or columns at its border.
    assert all(ink[[0, -1]].any(1).all() and ink[:, [0, -1]].any(0).all() for _, ink in records)


def test_the_published_test_file_makes_a_dataset(real: Path, tmp_path: Path) -> None:
    hoda.fetch(tmp_path, path=str(real / "Test 20000.cdb"))
    found = hoda.read(tmp_path, size=32, **OPTIONS)
    images, labels = (torch.cat(parts) for parts in zip(*found.splits.values(), strict=True))
    assert images.shape == (20000, 1, 32, 32)
    assert labels.bincount().tolist() == [2000] * 10
    # A class of 2,000 at a share of 0.3: 600 with a standard deviation of 20.5; four of them.
    assert all(abs(count - 600) < 82 for count in found.test[1].bincount().tolist())
    assert found.report["duplicates"] < 100
    ink = 1 - images.float().mean((0, 1)) / 255
    assert (images[:, 0, ::31, ::31] == 255).all()
    assert ink[8:24, 8:24].mean() > 2 * ink.mean()
    assert 0.03 < ink.mean() < 0.15
    zeros, ones = (1 - images[labels == y].float().mean().item() / 255 for y in (0, 5))
    assert zeros < 0.5 * ones
