"""`make data`: what it says of a person's images, what it writes, and what it refuses without writing."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from stages.errors import UserError
from stages.pipeline import own_data, params

ROOT = Path(__file__).parents[2]
NO_WORDS = ["null", "true", "123", "1e5", "1_000", "0x1f"]
OWN = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's graph and parameters."""
    (tmp_path / "naqsh").mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / "naqsh" / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path / "naqsh")
    return tmp_path / "naqsh"


def commit(folder: Path) -> None:
    """Commit all that is in a folder to a repository of its own."""
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def letters(
    folder: Path, classes: Sequence[str] = "ابپ", N: int = 30, *, paper: int = 240, size: tuple[int, int] = (40, 52)
) -> Path:
    """A folder for each class, of different pictures of one size."""
    rng = np.random.default_rng(0)
    for y in classes:
        (folder / y).mkdir(parents=True)
        for i in range(N):
            pixels = np.full(size[::-1], paper, np.uint8)
            pixels[8:-8, 8:-8] = rng.integers(0, 256, (size[1] - 16, size[0] - 16))
            Image.fromarray(pixels).save(folder / y / f"{i}.png")
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The facts told, by what they are of; several of one are joined."""
    facts: dict[str, str] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            what, value = line[2:13].strip(), line[14:]
            facts[what] = f"{facts[what]}; {value}" if what in facts else value
    return facts


def test_what_is_there_is_told_and_added_and_the_next_command_is_of_a_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = letters(tmp_path / "mine")
    for name in ("ا/notes.txt", "ب/1.BMP", "ب/2.bmp", "Thumbs.db"):
        (mine / name).write_bytes(b"x")
    (mine / "پ/0.png").write_bytes(b"no picture")
    (mine / "پ/again.png").write_bytes((mine / "پ/1.png").read_bytes())
    commit(Path.cwd())
    own_data.main("my_letters", str(mine))
    out = capsys.readouterr().out
    assert out.startswith(f"my_letters: {mine}\n")
    for line in (
        "layout      a folder for each class",
        "images      91",
        "classes     3: ا (30), ب (30), پ (31)",
        "pixels      40 x 52, the longer side 52 in the median",
        "left out    1 × hidden, or left by a system, such as 'Thumbs.db'",
        "left out    1 × no .png .jpg .jpeg .tif .tiff but .txt, such as 'ا/notes.txt'",
        "left out    2 × no .png .jpg .jpeg .tif .tiff but .bmp, such as 'ب/1.BMP'",
        "left out    1 × no PNG, JPEG or TIFF image, such as 'پ/0.png'",
        "equal       1 equal to another image",
        "background  light in 90 of 90",
        "size        48 x 48, of 16, 28, 32, 48, 64 the nearest",
        "invert      false",
        "pad         true: 90 of 90 are not square; they keep their proportions, on their own background",
    ):
        assert f"\n  {line}" in out
    assert "data/looked/my_letters.png\n" in out
    assert out.endswith("`git checkout params.yaml` undoes it.\nNext: make repro CELL=my_letters-cosine-100-0\n")
    loaded = params.load()
    assert "my_letters-cosine-100-0" in map(str, loaded.sweep.cells())
    assert loaded.data["my_letters"] == params.AutoData(reader="auto", path=str(mine), size=48, invert=False, pad=True)
    with Image.open("data/looked/my_letters.png") as sheet:
        assert sheet.height == 3 * (2 * 49 + 2)
    assert not list(Path(".state/scratch").iterdir())


def test_how_many_there_will_be_is_what_prepare_divides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_data.main("mine", str(letters(tmp_path / "mine")))
    train, validation, test = (int(part.split()[0]) for part in said(capsys)["splits"].split(", "))
    assert train + validation + test == 90
    assert min(validation, test) > 0


def test_light_ink_on_dark_square_pictures_is_inverted_and_not_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_data.main("mine", str(letters(tmp_path / "mine", paper=20, size=(28, 28))))
    facts = said(capsys)
    assert facts["background"] == "dark in 90 of 90"
    assert facts["invert"] == "true: dark and light change places, so that paper is light"
    assert facts["pad"] == "false: all are square"
    section = params.load().data["mine"]
    assert isinstance(section, params.AutoData)
    assert (section.size, section.invert, section.pad) == (28, True, False)
    with Image.open("data/looked/mine.png") as sheet:
        assert np.asarray(sheet)[4, -6] == 235, "as after preparation: the paper is light"


def test_a_zip_with_a_path_in_quotes_is_added(tmp_path: Path) -> None:
    mine = letters(tmp_path / "mine")
    path = tmp_path / 'it\'s "best" # ا.zip'
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(mine.rglob("*.png")):
            archive.write(file, f"letters/{file.relative_to(mine)}")
    own_data.main("mine", str(path))
    assert params.load().data["mine"].path == str(path)  # type: ignore[union-attr]


def test_the_same_again_says_that_there_is_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = letters(tmp_path / "mine")
    own_data.main("mine", str(mine))
    edited = Path("params.yaml").read_text().replace("    size: 48\n", "    size: 32 # less\n    licence: CC0\n")
    Path("params.yaml").write_text(edited)
    capsys.readouterr()
    own_data.main("mine", f"{mine}/")
    out = capsys.readouterr().out
    assert Path("params.yaml").read_text() == edited
    assert "params.yaml names it already: nothing to do.\nNext: make repro CELL=mine-cosine-100-0\n" in out
    assert "size        32 x 32\n" in out


@pytest.mark.parametrize("name", ["My_letters", "a-b", "../x", "a b", "ا", "a\n", "a" * 65])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^NAME = .* must be of a-z, 0-9 and _"):
        own_data.main(name, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "path", "says"),
    [
        ("mnist", "mine", r"params\.yaml has a section data\.mnist already, of other images; choose another NAME"),
        ("", "mine", r"NAME must say what to call them: make data NAME=my_letters PATH=…"),
        *((name, "mine", rf"NAME = '{name}' is no word for YAML; take one such as set_{name}") for name in NO_WORDS),
        ("x", "", r"PATH must say where the images are: make data NAME=x PATH="),
        ("x", "a\udcff", r"PATH = 'a\\udcff' is no UTF-8 text; rename what is called so"),
        ("x", "nowhere", r"path = .*/nowhere: there is no such file or folder"),
        ("x", "empty", r"path = .*/empty holds no image"),
        ("x", "params.yaml", r"PATH must be a folder or a zip; /.*/params\.yaml is neither"),
        ("x", "few/a/0.png", r"PATH must be a folder or a zip; /.*/0\.png is neither"),
        ("x", "cut.zip", r"path = /.*/cut\.zip is cut off"),
        ("x", "data", r"data\.x\.path = data contains data/raw/"),
        ("x", "few", r"1 of 2 classes have too few images: 'b' \(19\); the least that works is 20"),
        ("x", "equal", r"1 of 2 classes have too few images: 'b' \(19\); the least that works is 20"),
    ],
)
def test_what_is_refused_leaves_params_yaml_as_it_is(name: str, path: str, says: str) -> None:
    Path("empty").mkdir()
    Path("cut.zip").write_bytes(b"PK\3\4 and no more")
    letters(Path("few"), "a")
    letters(Path("few"), "b", N=19)
    letters(Path("equal"), "ab", N=20)
    Path("equal/b/0.png").write_bytes(b"no picture")  # one less than the names tell
    with pytest.raises(UserError, match=rf"^{says}") as refused:
        own_data.main(name, path)
    assert "\n" not in str(refused.value)
    assert Path("params.yaml").read_text(encoding="utf-8") == OWN


def test_many_classes_are_folded_and_stand_side_by_side() -> None:
    names = [f"class {i:02d}" for i in range(40)]
    told = own_data.classes(names, [20 + i for i in range(40)])
    assert told.startswith("40: class 00 (20), class 01 (21)")
    assert told.endswith("class 11 (31) and 28 more; 20 (class 00) to 59 (class 39) images each")
    images = torch.zeros(400, 1, 28, 28, dtype=torch.uint8)
    sheet = own_data.contact_sheet(images, torch.arange(400) % 40, names)
    assert sheet.shape[0] <= own_data.TALLEST < 40 * 58
    assert (sheet == 0).sum() > 400 * 56 * 56, "every image, beside the ink of the names"


@pytest.mark.parametrize("edit", ["# mine\n", None])
def test_a_checkout_is_no_way_back_where_it_would_take_more_back(
    tmp_path: Path, edit: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if edit:
        commit(Path.cwd())
        with Path("params.yaml").open("a") as file:
            file.write(edit)
    own_data.main("mine", str(letters(tmp_path / "mine")))
    out = capsys.readouterr().out
    assert "names it.\nTo undo it, remove data.mine and the name in sweep.datasets.\nNext: " in out
    assert "git" not in out


def test_only_what_the_last_commit_holds_is_committed(tmp_path: Path) -> None:
    assert not params.is_committed(), "there is no repository"
    commit(Path.cwd())
    assert params.is_committed()
    Path("params.yaml").write_text(OWN + "# mine\n")
    subprocess.run(["git", "add", "params.yaml"], check=True)
    assert not params.is_committed(), "a checkout brings back what is staged"
    Path("params.yaml").rename(tmp_path / "elsewhere.yaml")
    Path("params.yaml").symlink_to("../elsewhere.yaml")
    commit(Path.cwd())
    assert not params.is_committed(), "git has the link, not the file"
    subprocess.run(["git", "rm", "-q", "--cached", "params.yaml"], check=True)
    Path("params.yaml").unlink()
    Path("params.yaml").write_text(OWN)
    for ignored in ("", "*.yaml\n"):
        Path(".gitignore").write_text(ignored)
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "b", "--allow-empty"], check=True)
        assert not params.is_committed(), "git does not have it"


def test_a_section_of_before_is_not_to_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = letters(tmp_path / "mine")
    Path("params.yaml").write_text(OWN.replace("\ndata:", f"\ndata:\n  mine: {{reader: auto, path: {mine}}}", 1))
    own_data.main("mine", str(mine))
    assert "To undo it, remove the name in sweep.datasets.\n" in capsys.readouterr().out


def test_nothing_is_written_while_make_repro_works_here(tmp_path: Path) -> None:
    mine = letters(tmp_path / "mine")
    says = r"^`make repro` works in this folder and reads params\.yaml; type this when it has ended$"
    params.REPRO_LOCK.parent.mkdir(parents=True)
    with FileLock(params.REPRO_LOCK):
        with pytest.raises(UserError, match=says):
            own_data.main("mine", str(mine))
        with pytest.raises(UserError, match=says):
            params.write(OWN + "# more\n")
        assert not Path("data/looked").exists(), "told before the images are looked at"
    assert Path("params.yaml").read_text() == OWN
    own_data.main("mine", str(mine))
    assert "mine" in params.load().data


def test_a_link_stays_one_and_a_mode_stays_and_what_is_read_only_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.yaml"
    shutil.move("params.yaml", target)
    Path("params.yaml").symlink_to("../elsewhere.yaml")
    target.chmod(0o600)
    own_data.main("mine", str(letters(tmp_path / "mine")))
    assert Path("params.yaml").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert "mine" in params.load(target).data
    target.chmod(0o444)
    before = target.read_bytes()
    with pytest.raises(UserError, match=r"^params\.yaml is read-only; `chmod u\+w params\.yaml`, then type this again$"):
        own_data.main("more", str(tmp_path / "mine"))
    assert target.read_bytes() == before
    assert target.stat().st_mode & 0o777 == 0o444


def test_mixed_backgrounds_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters(tmp_path / "mine", "a", 29, size=(28, 28))
    own_data.main("mine", str(letters(tmp_path / "mine", "b", 31, paper=20, size=(28, 28))))
    facts = said(capsys)
    assert facts["background"] == "dark in 31 of 60; 29 of 60 have the other background and will stand out; sort them"
    assert facts["invert"] == "true: dark and light change places, so that paper is light"


def test_errors_name_the_path(tmp_path: Path) -> None:
    mine = letters(tmp_path / "mine")
    for i in range(20):
        (mine / f"ب/{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=rf"^path = {mine}: 20 of 90 images are unreadable \([^/]*, the first is 'ب/0.png'[^/]*$"):
        own_data.main("mine", str(mine))
    (mine / "train").mkdir()
    (mine / "ا/0.png").rename(mine / "0.png")
    with pytest.raises(UserError, match=rf"^path = {mine}: '0.png' lies in no folder"):
        own_data.main("mine", str(mine))


def test_one_folder_is_one_however_it_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = letters(tmp_path / "mine")
    (tmp_path / "link").symlink_to(mine)
    for path in ("../mine", str(mine), "../naqsh/../mine/", "../link"):
        own_data.main("mine", path)
        assert capsys.readouterr().out.startswith(f"mine: {mine}\n")


def test_what_breaks_a_line_or_is_no_text_is_written_as_python_does(tmp_path: Path) -> None:
    mine = letters(tmp_path / "mine", ["a\nb", "می\u200cم"])
    Path(os.fsdecode(os.fsencode(mine) + b"/a.\xff")).write_bytes(b"x")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "stages.pipeline.own_data", "mine", str(mine)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    assert "\n  classes     2: a\\nb, می\u200cم; 30 images each\n" in done.stdout
    assert r" but .\udcff, such as 'a.\udcff'" in done.stdout


def test_one_image_of_each_class_is_told_as_one() -> None:
    assert own_data.classes(["a", "b"], [1, 1]) == "2: a, b; 1 image each"
    assert own_data.classes(list(map(str, range(2000))), [20] * 2000).startswith("2,000: 0, 1, ")
    assert own_data.classes(list(map(str, range(2000))), [20] * 2000).endswith(" 11 and 1,988 more; 20 images each")


def test_more_classes_than_fit_are_not_on_the_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    N = own_data.ON_SHEET
    images, labels = torch.zeros(N + 60, 1, 28, 28, dtype=torch.uint8), torch.arange(N + 60)
    sheets = [own_data.contact_sheet(images[:n], labels[:n], [str(y) for y in range(100, 100 + n)]) for n in (N, N + 60)]
    np.testing.assert_array_equal(*sheets)
    assert max(sheets[0].shape) < 4000
    monkeypatch.setattr(own_data, "ON_SHEET", 1)
    own_data.main("mine", str(letters(tmp_path / "mine")))
    assert "\nSome images of each of the first 1 classes (2 are left out), as the network" in capsys.readouterr().out
    with Image.open("data/looked/mine.png") as sheet:
        assert sheet.height == 2 * 49 + 2


@pytest.mark.parametrize(
    ("schedules", "timesteps", "seeds", "cell"),
    [
        (["linear", "cosine"], [1000, 25, 100], [0], "x-cosine-100-0"),
        (["sigmoid"], [50], [3, 4], "x-sigmoid-50-3"),
        (["linear"], [100, 1000], [0], "x-linear-1000-0"),
    ],
)
def test_the_next_cell_is_one_of_the_sweep(schedules: list[str], timesteps: list[int], seeds: list[int], cell: str) -> None:
    sweep = params.Sweep(datasets=["x"], schedules=schedules, timesteps=timesteps, seeds=seeds)
    assert str(own_data.next_cell(sweep, "x")) == cell
    assert own_data.next_cell(sweep, "x") in sweep.cells()


@pytest.mark.parametrize("path", ["/tmp/a", "~/letters", 'it\'s my "best" $HOME $$ #1 `id`', "ا ب", "-x", "", None])
def test_make_takes_path_for_the_images_and_finds_its_programs_all_the_same(tmp_path: Path, path: str | None) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    (venv / "bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"; date >/dev/null && printf "%s\\n" "$PATH"\n')
    (venv / "bin/python").chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt", "venv/.installed"):
        (tmp_path / name).touch()
    given = [] if path is None else [f"PATH={path}"]
    command = ["make", "-s", "-f", str(ROOT / "Makefile"), "data", f"VENV={venv}", "NAME=my_letters", *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    *arguments, programs = done.stdout.split("\n")[:-1]
    assert arguments == ["-m", "stages.pipeline.own_data", "--", "my_letters", path or ""]
    assert programs == f"{venv}/bin:{os.environ['PATH']}"
