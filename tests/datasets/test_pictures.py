"""Pictures: every kind of PNG, JPEG and TIFF to grey, and everything that is none; then many of them at once."""

import io
import os
import random
import signal
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import damaged
from PIL import Image
from test_zips import CRC, SIZE, listed, patched, zipped

from stages.datasets import pictures, zips
from stages.datasets.pictures import Pixels, Unreadable, decode
from stages.errors import UserError

PLAIN = {"size": 8, "invert": False, "pad": False}
RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
RAMP_16 = (RAMP.astype(np.uint16) << 8) + 128  # in the middle of what is to be rounded to RAMP, but at its ends


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def drawn(i: int, *, grey: int = 200) -> Pixels:
    """Ink on grey paper: the i-th of many pictures of various sizes."""
    rng = np.random.default_rng(i)
    height, width = rng.integers(10, 40, 2)
    pixels = rng.integers(grey - 10, grey + 10, (height, width), dtype=np.uint8)
    pixels[height // 4 : height // 2, width // 4 : -width // 4] = 30
    return pixels


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def grey(content: bytes, **options: object) -> Pixels:
    return decode(content, **{**PLAIN, **options})


def named(value: object) -> str | None:
    """A short name of a test's argument."""
    return f"{len(value)}_bytes_{zlib.crc32(value):08x}" if isinstance(value, bytes) else None


# Kinds


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "tiff_deflate"})],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA"])
def test_pixels_come_back_as_they_were(kind, options, mode):
    assert (grey(encoded(Image.fromarray(RAMP).convert(mode), kind, **options)) == RAMP).all()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_comes_back_nearly(mode):
    found = grey(encoded(Image.fromarray(RAMP).convert(mode), "JPEG", quality=100))
    assert np.abs(found.astype(int) - RAMP).max() <= 2


@pytest.mark.parametrize(
    "content",
    [
        encoded(RAMP_16),
        encoded(RAMP_16, "TIFF"),
        encoded(RAMP_16.astype(">u2"), "TIFF"),
        encoded(RAMP_16, "TIFF", compression="tiff_lzw"),
        encoded(65535 - RAMP_16, "TIFF", tiffinfo={262: 0}),  # white is zero
    ],
    ids=named,
)
def test_16_bits_are_scaled_and_not_clipped(content):
    assert np.abs(grey(content).astype(int) - RAMP).max() <= 1
    assert grey(content).min() == 0
    assert grey(content).max() == 255


def test_16_bits_are_rounded_to_the_nearest():
    values = np.arange(0, 65536, 13, dtype=np.uint16)[: 71 * 71].reshape(71, 71)
    assert (grey(encoded(values), size=71) == np.rint(values / 257)).all()


def palette(**options: object) -> bytes:
    image = Image.fromarray(np.array([[0, 1], [2, 2]], np.uint8), "P")
    image.putpalette([0, 0, 0, 100, 100, 100, 200, 200, 200])
    return encoded(image, **options)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (palette(), [[0, 100], [200, 200]]),
        (palette(transparency=0), [[255, 100], [200, 200]]),
        (palette(transparency=bytes([0, 255, 51])), [[255, 100], [244, 244]]),
        (encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), [[255, 255], [255, 255]]),
        (encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 51))), [[204, 204], [204, 204]]),
        (encoded(Image.new("LA", (2, 2), (0, 51))), [[204, 204], [204, 204]]),
        (encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "TIFF"), [[204, 204], [204, 204]]),
        (encoded(Image.new("L", (2, 2), 7), transparency=7), [[255, 255], [255, 255]]),
        (encoded(Image.new("RGB", (2, 2), (7, 7, 7)), transparency=(7, 7, 7)), [[255, 255], [255, 255]]),
        (encoded(np.array([[7, 0], [0, 7]], np.uint16), transparency=7), [[255, 0], [0, 255]]),
        (encoded(Image.new("1", (2, 2), 1)), [[255, 255], [255, 255]]),
        (encoded(Image.new("1", (2, 2), 1), "TIFF", compression="group4"), [[255, 255], [255, 255]]),
        (encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 255)), "TIFF"), [[0, 0], [0, 0]]),
        (encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "JPEG"), [[255, 255], [255, 255]]),
        (encoded(Image.new("LAB", (2, 2), (90, 0, 0)), "TIFF"), [[90, 90], [90, 90]]),
    ],
    ids=named,
)
def test_colours_and_transparency_become_grey_on_white_paper(content, expected):
    assert grey(content, size=2).tolist() == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_picture_is_turned_as_its_orientation_says(kind):
    pixels = np.full((16, 16), 200, np.uint8)
    pixels[:, :8] = 0  # ink on the left; a camera held on its side
    exif = Image.Exif()
    exif[0x112] = 6
    found = grey(encoded(pixels, kind, exif=exif), size=16)
    assert found[:6].max() < 20
    assert found[-6:].min() > 180


def test_photo_with_a_preview_is_its_first_picture():
    photo, preview = (Image.new("RGB", (8, 8), (value,) * 3) for value in (50, 200))
    assert (grey(encoded(photo, "MPO", save_all=True, append_images=[preview])) == 50).all()


# Shape


def test_shrinking_averages_and_enlarging_interpolates():
    lines = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert np.abs(grey(encoded(lines), size=8)[:, 1:-1].astype(int) - 127).max() <= 3, "no aliasing"
    step = grey(encoded(np.array([[0, 200], [0, 200]], np.uint8)), size=16)[0].astype(int)
    assert (np.diff(step) >= 0).all()
    assert (step.min(), step.max()) == (0, 200), "no ringing"


def test_stretched_or_in_proportion():
    wide = np.full((10, 40), 220, np.uint8)
    wide[3:7, 10:30] = 0
    stretched, padded = (grey(encoded(wide), size=40, pad=pad) for pad in (False, True))
    assert (stretched[:, 20] < 128).sum() == 16
    assert (padded[:, 20] < 128).sum() == 4
    assert (padded[15:25] == wide).all(), "at its own size, in the middle"
    assert (padded[:15] == 220).all()
    assert (padded[25:] == 220).all(), "the paper goes on"


def test_a_picture_is_looked_at_as_it_is_upright_with_its_paper():
    pixels = np.full((5, 9), 220, np.uint8)
    pixels[1:4, 1:8] = 10
    assert pictures.look(encoded(pixels)) == pictures.Look(9, 5, 220)
    turned = Image.Exif()
    turned[0x112] = 6  # a quarter
    assert pictures.look(encoded(pixels, exif=turned)) == pictures.Look(5, 9, 220)
    with pytest.raises(Unreadable, match=pictures.CUT_OFF):
        pictures.look(encoded(pixels)[:-20])


def test_paper_is_the_median_of_the_border():
    tall = np.full((30, 10), 210, np.uint8)
    tall[:, 4:6] = 0  # a stroke that reaches the border
    assert grey(encoded(tall), size=30, pad=True)[0, 0] == 210


@pytest.mark.parametrize("pad", [False, True])
def test_inverted_is_255_less(pad):
    content = encoded(drawn(0))
    assert (grey(content, pad=pad, invert=True) == 255 - grey(content, pad=pad)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (7, 9)])
@pytest.mark.parametrize("pad", [False, True])
def test_any_shape_becomes_a_square(shape, pad):
    found = grey(encoded(np.full(shape, 77, np.uint8)), size=9, pad=pad)
    assert found.shape == (9, 9)
    assert found.dtype == np.uint8
    assert (found == 77).all()


# What is none


FRAMES = [Image.new("L", (8, 8), value) for value in (0, 100)]
GOOD = encoded(RAMP)
JPEG = encoded(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8), "JPEG")
TIFF = encoded(RAMP, "TIFF")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", pictures.EMPTY),
        (b"this is a text in a file named 1.png\n", pictures.UNKNOWN),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", pictures.UNKNOWN),
        (bytes(1000), pictures.UNKNOWN),
        (encoded(FRAMES[0], "GIF"), pictures.UNKNOWN),
        (encoded(FRAMES[0], "BMP"), pictures.UNKNOWN),
        (encoded(FRAMES[0], "WEBP"), pictures.UNKNOWN),
        (GOOD[:10], pictures.CUT_OFF),
        (GOOD[:40], pictures.CUT_OFF),
        (GOOD[:-20], pictures.CUT_OFF),
        (GOOD[:-1], pictures.CUT_OFF),
        (GOOD[:50] + bytes([GOOD[50] ^ 1]) + GOOD[51:], pictures.DAMAGED),
        (GOOD[:20] + bytes([GOOD[20] ^ 1]) + GOOD[21:], pictures.DAMAGED),
        (png(8, 8), pictures.CUT_OFF),
        (png(8, 8, bytes(30)), pictures.CUT_OFF),
        (png(8, 8, b"\7" * 72), pictures.DAMAGED),
        (png(8, 8)[:33] + chunk(b"IEND", b""), pictures.DAMAGED),
        (JPEG[: len(JPEG) // 2], pictures.CUT_OFF),
        (JPEG[:-2], pictures.CUT_OFF),
        (JPEG[:100], pictures.DAMAGED),
        (TIFF[:-1], pictures.CUT_OFF),
        (TIFF[:20], pictures.DAMAGED),
        (png(40_000, 40_000), pictures.TOO_LARGE),
        (png(9_500, 9_500), pictures.TOO_LARGE),  # where Pillow would only warn
        (png(7_072, 7_072), pictures.TOO_LARGE),
        (png(2**31 - 1, 2**31 - 1), pictures.TOO_LARGE),
        (png(0, 8), pictures.NO_PIXELS),
        (png(8, 0), pictures.NO_PIXELS),
        (encoded(FRAMES[0], save_all=True, append_images=FRAMES[1:]), pictures.SEVERAL),
        (encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), pictures.SEVERAL),
        (encoded(RAMP.astype(np.int32), "TIFF"), pictures.DEPTH),
        (encoded(RAMP.astype(np.float32), "TIFF"), pictures.DEPTH),
        (png(8, 8, bytes(72), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))), pictures.DAMAGED),
    ],
    ids=named,
)
def test_what_is_no_whole_picture_is_unreadable_for_a_reason(content, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unreadable, match=f"^{reason}$"):
            grey(content)


def test_every_reason_is_an_outcome():
    reasons = [value for name, value in vars(pictures).items() if name.isupper() and isinstance(value, str) and name[0] != "_"]
    assert {*reasons, zips.DAMAGED, zips.SWOLLEN} == set(pictures.OUTCOMES) - {""}
    assert len(set(pictures.OUTCOMES[pictures.FINE :])) == len(pictures.OUTCOMES) - pictures.FINE


@pytest.mark.parametrize(
    "content", [GOOD, palette(transparency=0), JPEG, TIFF, encoded(RAMP, "TIFF", compression="tiff_lzw")], ids=named
)
def test_damage_of_any_kind_is_unreadable_or_a_picture(content, capfd):
    outcomes = set()
    for copy in damaged(content, seconds=0.4):
        try:
            assert grey(copy, pad=True).shape == (8, 8)
            outcomes.add("read")
        except Unreadable as error:
            outcomes.add("unreadable" if str(error) in pictures.OUTCOMES else str(error))
    assert "unreadable" in outcomes
    assert outcomes <= {"read", "unreadable"}
    assert capfd.readouterr() == ("", "")


# Many


READ = {"size": 16, "invert": False, "pad": True}


def pictures_of(path: Path, *, strict: bool = False, **more: object) -> pictures.Read:
    return pictures.read_all(path, listed(path), **READ, strict=strict, **more)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """An archive of 300 pictures, some of them deflated."""
    zipped(tmp_path / "many.zip", {f"{i:03d}.png": encoded(drawn(i)) for i in range(200)})
    with zipfile.ZipFile(tmp_path / "many.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        for i in range(200, 300):
            archive.writestr(f"{i:03d}.tif", encoded(drawn(i), "TIFF"))
    return tmp_path / "many.zip"


def with_bad(tmp_path: Path, bad: dict[int, bytes], N: int = 200) -> Path:
    return zipped(tmp_path / "bad.zip", {f"{i:03d}.png": bad.get(i, encoded(drawn(i))) for i in range(N)})


@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_result_is_that_of_one_after_the_other_however_many_processes(many, monkeypatch, cores):
    monkeypatch.setattr(pictures, "_cores", lambda: cores)
    found = pictures_of(many)
    expected = np.stack([decode(encoded(drawn(i)), **READ) for i in range(300)])[:, None]
    assert found.images.dtype == torch.uint8
    assert np.array_equal(found.images.numpy(), expected)
    assert found.kept == list(range(300))
    assert found.report == {"dropped": {}, "dropped_files": []}


@pytest.mark.parametrize("cores", [1, 2])
def test_unreadable_images_are_dropped_counted_and_named(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(pictures, "_cores", lambda: cores)
    bad = {5: b"text", 70: GOOD[:-20], 71: b"text", 199: b""}
    found = pictures_of(with_bad(tmp_path, bad))
    assert found.kept == [i for i in range(200) if i not in bad]
    assert np.array_equal(found.images.numpy()[:, 0], [decode(encoded(drawn(i)), **READ) for i in found.kept])
    assert found.report == {
        "dropped": {pictures.CUT_OFF: 1, pictures.EMPTY: 1, pictures.UNKNOWN: 2},
        "dropped_files": [
            f"{i:03d}.png: {reason}"
            for i, reason in ((5, pictures.UNKNOWN), (70, pictures.CUT_OFF), (71, pictures.UNKNOWN), (199, pictures.EMPTY))
        ],
    }


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_strict_names_the_first_unreadable_image(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(pictures, "_cores", lambda: cores)
    path = with_bad(tmp_path, {100: b"text", 63: GOOD[:-20], 64: b"", 199: b""})
    with pytest.raises(UserError, match=r"bad.zip: '063.png': cut off; with strict: false it would be dropped$"):
        pictures_of(path, strict=True)


def test_a_tenth_may_be_unreadable_and_no_more(tmp_path):
    assert len(pictures_of(with_bad(tmp_path, dict.fromkeys(range(20), b"text"))).images) == 180
    assert len(pictures_of(with_bad(tmp_path, dict.fromkeys(range(20), b"text"))).report["dropped_files"]) == 20
    expected = (
        r"bad.zip: 21 of 200 images are unreadable \(empty file: 1, no PNG, JPEG or TIFF image: 20\), the first is '000.png'; "
        r"up to one in 10 would be dropped: are these the right files\?$"
    )
    with pytest.raises(UserError, match=expected):
        pictures_of(with_bad(tmp_path, {i: b"text" if i else b"" for i in range(21)}))


def test_what_the_caller_refuses_counts_too(tmp_path):
    path = with_bad(tmp_path, {5: b"text"})
    refused = [(f"{i}.png", "no label") for i in "ab"]
    found = pictures_of(path, refused=refused)
    assert found.report["dropped"] == {pictures.UNKNOWN: 1, "no label": 2}
    assert found.report["dropped_files"] == [f"005.png: {pictures.UNKNOWN}", "a.png: no label", "b.png: no label"]
    with pytest.raises(UserError, match="23 of 222 images are unreadable"):
        pictures_of(path, refused=refused[:1] * 22)
    with pytest.raises(UserError, match=r"'a.png': no label; with strict: false"):
        pictures_of(path, refused=refused[::-1], strict=True)


def test_no_image_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"empty.zip holds no image \(.png .jpg"):
        pictures_of(zipped(tmp_path / "empty.zip", {"readme.txt": b""}))


def test_member_damaged_in_the_archive_is_dropped(tmp_path):
    path = patched(with_bad(tmp_path, {}), CRC, 0)
    assert pictures_of(path).report == {"dropped": {zips.DAMAGED: 1}, "dropped_files": [f"000.png: {zips.DAMAGED}"]}


def test_member_larger_than_the_archive_says_is_never_dropped(tmp_path):
    path = patched(with_bad(tmp_path, {}), SIZE, 10)
    with pytest.raises(UserError, match=r"bad.zip: '000.png': larger than the archive says$"):
        pictures_of(path)


@pytest.mark.parametrize("cores", [1, 2])
def test_disk_that_fails_is_an_error(many, monkeypatch, cores):
    monkeypatch.setattr(pictures, "_cores", lambda: cores)
    real, broken = zips.content, listed(many).places[70][0]

    def failing(file: int, place: np.ndarray) -> bytes:
        if place[0] == broken:
            raise OSError(5, "Input/output error")
        return real(file, place)

    monkeypatch.setattr(zips, "content", failing)
    with pytest.raises(UserError, match=r"'070.png': the disk cannot read it$"):
        pictures_of(many)


def test_too_little_memory_is_an_error(many):
    with pytest.raises(UserError, match="300 images of 100000000 x 100000000 pixels: "):
        pictures.read_all(many, listed(many), size=10**8, invert=False, pad=False, strict=False)


def dies_at(monkeypatch: pytest.MonkeyPatch, death: object) -> None:
    monkeypatch.setattr(pictures, "_cores", lambda: 2)
    real = decode
    marked = encoded(drawn(100))
    monkeypatch.setattr(pictures, "decode", lambda content, **shape: death() if content == marked else real(content, **shape))


def test_decoder_that_crashes_is_told_with_its_image(many, monkeypatch):
    dies_at(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"many.zip: '100.png': the process that decoded it was killed by signal 9$"):
        pictures_of(many)


def test_bug_keeps_its_traceback(many, monkeypatch, capfd):
    dies_at(monkeypatch, lambda: 1 / 0)
    with pytest.raises(RuntimeError, match=r"'100.png': the process that decoded it ended with exit code 1"):
        pictures_of(many)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_processes_end_with_whoever_started_them(many, monkeypatch, tmp_path):
    """Killed by surprise, the parent leaves nobody at work."""
    dies_at(monkeypatch, lambda: time.sleep(0.5))  # so that the parent is killed first
    monkeypatch.setattr(pictures, "CHUNK", 1)
    real = pictures._outcome

    def noted(*arguments: object) -> int:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.01)
        return real(*arguments)

    monkeypatch.setattr(pictures, "_outcome", noted)
    parent = os.fork()
    if not parent:
        pictures_of(many)
        os._exit(0)
    while len(workers := [file for file in tmp_path.iterdir() if file.name.isdecimal()]) < 2:
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5
    while any(alive(int(worker.name)) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_archives_that_are_damaged_anyhow_give_errors_of_the_user_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_cores", lambda: 1)
    path = tmp_path / "a.zip"
    whole = zipped(path, {f"{i}.png": encoded(drawn(i)) for i in range(20)}).read_bytes()
    outcomes = set()
    rng = random.Random(0)
    for content in damaged(whole, seconds=1):
        path.write_bytes(content)
        try:
            pictures_of(path, strict=rng.random() < 0.5)
            outcomes.add("read")
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else "told in two lines")
    assert outcomes == {"read", "refused"}
    assert list(tmp_path.iterdir()) == [path]
