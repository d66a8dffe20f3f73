"""Zip archives: what is packed, and every way in which one of somebody else's can be wrong or meant to do harm."""

import errno
import os
import random
import resource
import struct
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import damaged

from stages.datasets import zips
from stages.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
FLAGS, METHOD, CRC, PACKED, SIZE, ATTRIBUTES, OFFSET = 8, 10, 16, 20, 24, 38, 42  # in an entry of the directory


def zipped(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    """An archive of these members, in this order."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return path


def patched(path: Path, field: int, value: int, *, wide: bool = True) -> Path:
    """An archive with a number changed in the first entry of its directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I" if wide else "<H", content, content.index(b"PK\1\2") + field, value)
    path.write_bytes(content)
    return path


def listed(path: Path, name: str | None = "mine") -> zips.Members:
    with zips.opened(path, name) as archive:
        return zips.members(archive, name or str(path))


def contents(path: Path) -> dict[str, bytes]:
    members = listed(path)
    file = os.open(path, os.O_RDONLY)
    try:
        return {name: zips.content(file, place) for name, place in zip(members.names, members.places, strict=True)}
    finally:
        os.close(file)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The folder of the user."""
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target.zip"


# Packing


def test_pack_takes_the_images_and_nothing_else(mine, target):
    images = {"b/2.PNG": b"b2", "a/deep/er/1.jpeg": b"a1", "a/2.tif": b"a2", "c.jpg": b"c", "ح/۵.tiff": b"5", "A/1.png": b"A1"}
    other = {"a/notes.txt": b"", ".DS_Store": b"", "a/._2.png": b"", "__MACOSX/a/1.png": b"", "Thumbs.db": b"", ".git/1.png": b""}
    other |= {"a/@eaDir/1.png": b"", "a/@eaDir/1.png@SynoEAStream": b""}
    zips.pack(put(mine, images | other), target, "mine")
    assert contents(target) == images
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == sorted(images)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_pack_gives_the_same_bytes_however_the_files_came_there(tmp_path, target):
    files = {f"{y}/{i}.png": bytes([i]) for y in "abc" for i in range(5)} | {"empty/readme.txt": b""}
    shuffled = random.Random(0).sample(sorted(files.items()), len(files))
    for folder, content in (("one", files), ("two", dict(shuffled))):
        zips.pack(put(tmp_path / folder, content), tmp_path / f"{folder}.zip", folder)
        os.utime(tmp_path / folder / "a" / "1.png", (0, 0))
        (tmp_path / folder / "a" / "1.png").chmod(0o400)
    zips.pack(tmp_path / "one", target, "one")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes() == target.read_bytes()


def test_pack_writes_names_in_nfc(mine, target):
    zips.pack(put(mine, {f"caf{NFD}/{NFD}.png": b"1"}), target, "mine")
    assert contents(target) == {f"caf{NFC}/{NFC}.png": b"1"}


def test_pack_keeps_folders_without_images_as_entries(mine, target):
    put(mine, {"full/deep/1.png": b"1", "notes/readme.txt": b""})
    (mine / "empty" / "below").mkdir(parents=True)
    zips.pack(mine, target, "mine")
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == ["empty/", "empty/below/", "full/deep/1.png", "notes/"]


def link_outside(mine: Path) -> None:
    (mine.parent / "secret.png").write_bytes(b"secret")
    (mine / "a.png").symlink_to(mine.parent / "secret.png")


def link_inside(mine: Path) -> None:
    (mine / "b.png").write_bytes(b"b")
    (mine / "a.png").symlink_to("b.png")


def link_to_folder(mine: Path) -> None:
    (mine / "class").symlink_to(mine.parent)


def link_to_itself(mine: Path) -> None:
    (mine / "a.png").symlink_to("a.png")


def pipe(mine: Path) -> None:
    os.mkfifo(mine / "a.png")


def no_utf8(mine: Path) -> None:
    Path(os.fsdecode(bytes(mine) + b"/caf\xe9.png")).write_bytes(b"")


def twin_files(mine: Path) -> None:
    put(mine, {f"{NFC}.png": b"1", f"{NFD}.png": b"2"})


def twin_folders(mine: Path) -> None:
    put(mine, {f"{NFC}/1.png": b"1", f"{NFD}/2.png": b"2"})


def large(mine: Path) -> None:
    with (mine / "a.png").open("wb") as file:
        file.truncate(zips.LARGEST + 1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (link_outside, r"mine: 'a\.png' is a symbolic link; put the file or folder itself there$"),
        (link_inside, "mine: 'a.png' is a symbolic link"),
        (link_to_folder, "mine: 'class' is a symbolic link"),
        (link_to_itself, "mine: 'a.png' is a symbolic link"),
        (pipe, "mine: 'a.png' is no regular file"),
        (no_utf8, r"mine: 'caf\\udce9.png': the name is no UTF-8; rename it"),
        (twin_files, r"mine: 'e\\u0301.png' and '\\xe9.png' are one name in Unicode"),
        (twin_folders, r"mine: .* are one name in Unicode \(NFC\); rename one"),
        (large, "mine: 'a.png' is too large; an image may have 67108864 bytes"),
        (lambda mine: put(mine, {"a\\b.png": b""}), r"mine: 'a\\\\b.png': the name has a backslash"),
        (lambda mine: put(mine, {"a/readme.txt": b""}), r"mine holds no image \(.png .jpg .jpeg .tif .tiff\)"),
        (lambda mine: mine.rmdir(), "mine: there is no such folder"),
        (lambda mine: (mine.rmdir(), mine.write_bytes(b"")), "mine is no folder"),
    ],
)
def test_folder_that_is_not_to_be_packed_is_refused_in_one_line(mine, target, make: Callable[[Path], object], reason):
    make(mine)
    with pytest.raises(UserError, match=f"^{reason}") as caught:
        zips.pack(mine, target, "mine")
    assert "\n" not in str(caught.value)
    assert caught.value.args[0].encode()


def test_unreadable_file_is_named(mine, target, monkeypatch):
    put(mine, {"a/1.png": b"1", "a/2.png": b"2"})
    opens = Path.open

    def refusing(self: Path, *args: object, **options: object) -> object:
        if self.name == "2.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opens(self, *args, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(UserError, match=r"^mine: 'a/2.png': Permission denied$"):
        zips.pack(mine, target, "mine")


def test_full_disk_is_one_line_that_names_the_archive(mine, target):
    put(mine, {"1.png": bytes(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a file that cannot grow is the nearest to a full disk
    try:
        with pytest.raises(UserError, match=r"target\.zip: File too large$"):
            zips.pack(mine, target, "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Names in an archive


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "a/../../b.png",
        "a/..",
        "/etc/a.png",
        "//server/a.png",
        "C:/a.png",
        "c:a.png",
        "C:\\a.png",
        "..\\a.png",
        "a\\..\\..\\b.png",
        "\\a.png",
        "\\\\server\\a.png",
        "../notes.txt",
        "../folder/",
    ],
)
def test_name_that_leads_outside_is_refused(target, name):
    zipped(target, {"ok.png": b"", name: b""})
    with pytest.raises(
        UserError,
        match=r"^mine: '.*' (leads outside of the archive; names must be relative paths without ..|begins like a drive .*)$",
    ):
        listed(target)


def test_name_is_quoted_so_that_the_message_stays_one_line(target):
    with pytest.raises(UserError, match=r"^mine: '\.\./a\\n\\u202eb\.png' leads"):
        listed(zipped(target, {"../a\n\u202eb.png": b""}))


def test_unusual_but_honest_names_work(target):
    names = {
        "a/1.png": b"a",
        "A/1.png": b"A",
        "a/1.PNG": b"P",
        "ح/۵.png": b"5",
        "\u202e\u200cی.png": b"r",
        "..a/b..c.png": b"h",
        "..a.png": b"h",
        "x..y/....png": b"h",
        "a b/c:d.png": b"c",
        f"{NFD}.png": b"e",
        "e.png": b"",
    }
    assert contents(zipped(target, names)) == {
        unicodedata.normalize("NFC", name): content for name, content in names.items() if content != b"h"
    }


def test_slashes_are_made_plain(target):
    assert listed(zipped(target, {"./a/1.png": b"", "a//2.png": b"", "b\\3.png": b"", "./": b""})).names == [
        "a/1.png",
        "a/2.png",
        "b/3.png",
    ]


def test_utf8_name_without_its_flag_is_read_as_macos_means_it(target):
    content = zipped(target, {"حرف/1.png": b"1"}).read_bytes()
    at = content.index(b"PK\1\2") + FLAGS
    target.write_bytes(content[:at] + bytes(2) + content[at + 2 :])
    assert listed(target).names == ["حرف/1.png"]


def test_name_in_an_old_code_page_stays(target):
    content = zipped(target, {"aa.png": b"1"}).read_bytes().replace(b"aa.png", b"\x82a.png")
    target.write_bytes(content)
    assert listed(target).names == ["éa.png"]


@pytest.mark.parametrize("names", [("a.png", "a.png"), (f"{NFC}.png", f"{NFD}.png"), ("a/b.png", "./a//b.png"), ("a.txt", "a.txt")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(target, names):
    zipped(target, [(name, b"") for name in names])
    with pytest.raises(UserError, match=r"^mine has two members of the name '.*'; each may appear once$"):
        listed(target)


# Members


@pytest.mark.parametrize(
    ("field", "value", "wide", "reason"),
    [
        (FLAGS, 0x1, False, "mine: 'a.png' is encrypted; pack it without a password"),
        (FLAGS, 0x41, False, "mine: 'a.png' is encrypted"),
        (METHOD, 12, False, "mine: 'a.png' is packed by method 12; allowed: stored, deflated"),
        (METHOD, 99, False, "mine: 'a.png' is packed by method 99"),
        (ATTRIBUTES, 0o120777 << 16, True, "mine: 'a.png' is a symbolic link; pack the file itself"),
        (SIZE, 2**31, True, "mine: 'a.png' is said to have 2147483648 bytes; an image may have 67108864"),
        (PACKED, 2**31, True, "mine: 'a.png' is said to have 2147483648 bytes"),
        (PACKED, 5000, True, "mine: 'a.png' is not all within the archive, which is cut off or damaged"),
        (OFFSET, 2**31, True, "mine: 'a.png' is not all within the archive"),
    ],
)
def test_member_that_is_not_to_be_read_is_refused(target, field, value, wide, reason):
    patched(zipped(target, {"a.png": bytes(100)}), field, value, wide=wide)
    with pytest.raises(UserError, match=f"^{reason}"):
        listed(target)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_slow_methods_are_refused(target, method):
    with pytest.raises(UserError, match=f"packed by method {method}; allowed: stored, deflated"):
        listed(zipped(target, {"a.png": b"1"}, method))


def test_what_is_no_image_may_be_whatever_it_is(target):
    patched(zipped(target, {"video.mp4": b"", "1.png": b"1"}), SIZE, 2**32 - 2)
    assert listed(target).names == ["1.png"]


def test_bomb_of_many_members_is_refused(target, tmp_path):
    zipped(target, {f"{i}.png": bytes(zips.LARGEST // 10) for i in range(11)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(
        UserError, match=r"^mine has \d+ bytes but says that its images have 73819746: this is a decompression bomb"
    ):
        listed(target)


def test_overlapping_members_are_a_bomb(target):
    """One deflated member of which a thousand entries of the directory speak."""
    zipped(target, {"0000.png": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    content = target.read_bytes()
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entries = b"".join(content[start:end].replace(b"0000", b"%04d" % i) for i in range(1000))
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1000, 1000, len(entries), start, 0)
    target.write_bytes(content[:start] + entries + tail)
    with pytest.raises(UserError, match="decompression bomb"):
        listed(target)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_content_is_what_was_packed(target, method):
    files = {"a.png": b"", "b.png": b"x" * 1000, "c.png": random.Random(0).randbytes(1000)}
    assert contents(zipped(target, files, method)) == files


def test_archive_behind_other_bytes_works(target):
    zipped(target, {"a.png": b"1"})
    target.write_bytes(b"#!/bin/sh\n" + target.read_bytes())
    assert contents(target) == {"a.png": b"1"}


@pytest.mark.parametrize(
    ("method", "field", "value", "reason"),
    [
        (zipfile.ZIP_DEFLATED, SIZE, 999, zips.SWOLLEN),
        (zipfile.ZIP_STORED, SIZE, 999, zips.SWOLLEN),
        (zipfile.ZIP_DEFLATED, SIZE, 1001, zips.DAMAGED),
        (zipfile.ZIP_DEFLATED, PACKED, 5, zips.DAMAGED),
        (zipfile.ZIP_DEFLATED, CRC, 0, zips.DAMAGED),
        (zipfile.ZIP_STORED, CRC, 0, zips.DAMAGED),
        (zipfile.ZIP_STORED, OFFSET, 2, zips.DAMAGED),
    ],
)
def test_member_that_is_not_what_the_archive_says_is_damaged(target, method, field, value, reason):
    patched(zipped(target, {"a.png": b"x" * 1000}, method), field, value)
    with pytest.raises(zips.Damaged, match=f"^{reason}$"):
        contents(target)


def test_member_is_not_inflated_beyond_what_it_says(target):
    patched(zipped(target, {"a.png": bytes(30_000_000)}, zipfile.ZIP_DEFLATED), SIZE, 10)
    with pytest.raises(zips.Damaged, match=zips.SWOLLEN):
        contents(target)


# Archives


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: b"<html>sign in</html>", "is no zip archive: it starts with b'<html>si'; copy or download it again"),
        (lambda content: b"", "is no zip archive: it is empty"),
        (lambda content: content[:-30], "is cut off: what a zip archive ends with is missing; copy or download it again"),
        (lambda content: content[:200], "is cut off"),
        (lambda content: content[:10] + content[-60:], "is a damaged zip archive"),
        (lambda content: content.replace(b"PK\1\2", b"PK\1\3"), "is a damaged zip archive"),
        (lambda content: content.replace(b"a.png", b"a\xff\xff\xffg"), "is a damaged zip archive"),
    ],
)
def test_what_is_no_whole_zip_archive_is_refused(target, spoil, reason):
    target.write_bytes(spoil(zipped(target, {"a.png": bytes(300), "حa.png": b""}).read_bytes()))
    with pytest.raises(UserError, match=f"^mine {reason}"):
        listed(target)


def test_missing_archive_is_refused_by_what_it_is_called(target):
    with pytest.raises(UserError, match=r"^mine: there is no such file or folder$"):
        listed(target)
    with pytest.raises(UserError, match=r"target.zip is missing; `dvc repro` makes it$"):
        listed(target, None)
    target.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"target.zip is cut off: .*; delete it and run `dvc repro`$"):
        listed(target, None)
    with pytest.raises(UserError, match=r"^mine: Is a directory$"):
        listed(target.parent)


def test_damage_of_any_kind_is_an_error_of_the_user(tmp_path, target):
    files = {"a.png": b"1" * 50, "ح/b.png": random.Random(0).randbytes(50), "c.txt": b"", "d/": b""}
    whole = zipped(target, files, zipfile.ZIP_DEFLATED).read_bytes()
    outcomes = set()
    for content in damaged(whole, seconds=1):
        target.write_bytes(content)
        try:
            contents(target)
            outcomes.add("read")
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else "told in two lines")
        except zips.Damaged:
            outcomes.add("damaged")
    assert outcomes == {"read", "refused", "damaged"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
def test_more_members_than_fit_into_an_old_zip_archive(mine, target):
    (mine / "a").mkdir()
    for i in range(66_000):
        (mine / "a" / f"{i}.png").write_bytes(b"%d" % i)
    zips.pack(mine, target, "mine")
    found = contents(target)
    assert len(found) == 66_000
    assert found["a/65999.png"] == b"65999"
