"""`make draw`: which cell, which labels, where the pictures go, that they are whole, and that a set goes on after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cells import make_files, make_network
from PIL import Image

from stages.datasets import folder
from stages.drawing.model import Model, load
from stages.errors import UserError
from stages.pipeline import grids, paths, processes
from stages.pipeline.params import Cell
from stages.sweep import draw, drawings

ROOT = Path(__file__).parents[2]
CELL, OTHER = Cell("mnist", "cosine", 25, 0), Cell("mnist", "linear", 25, 0)
GLYPHS = Cell("persian_glyphs", "linear", 25, 0)
DIGITS = tuple("0123456789")


@pytest.fixture
def tree(bare_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default sweep, of which the networks of mnist-cosine and of persian_glyphs-linear are trained."""
    monkeypatch.setattr(processes, "cores", lambda: 2)
    make_network(CELL, *DIGITS)
    make_network(GLYPHS, "۰", "۵", "ب", "ا")
    return bare_tree


def run(**asked: object) -> list[str]:
    return list(draw.draw({name: str(value) for name, value in asked.items()}))


def pictures(below: Path | str) -> dict[str, np.ndarray]:
    """The pixels of each image below a folder, but those of grids."""
    found = sorted(Path(below).rglob("[!g.]*.png"))
    return {str(path.relative_to(below)): np.asarray(Image.open(path)) for path in found}


def pixels(cell: Cell, labels: list[str], **settings: object) -> list[np.ndarray]:
    return list(load(str(cell)).draw(labels, **settings)[:, 0].numpy())


@pytest.mark.usefixtures("tree")
def test_writes_single_pictures_and_a_grid_and_tells_where() -> None:
    lines = run(CELL=CELL, LABELS="3,1", N=5)
    place = Path(lines[0].partition(" to ")[0]).parent
    assert place.parent == Path("drawings") / str(CELL)
    assert place.name.startswith("3-1-seed0-")
    assert lines[0].startswith(f"{place}/000000-3.png to 000004-3.png: 5 drawn in ")
    assert lines[1:] == [f"Grid: {place}/grid-5.png"]
    drawn = pictures(place)
    assert list(drawn) == [f"{i:06d}-{label}.png" for i, label in enumerate("31313")]
    assert np.array_equal(list(drawn.values()), pixels(CELL, list("31313")))
    assert np.array_equal(np.asarray(Image.open(place / "grid-5.png"))[2:18:2, 2:18:2], drawn["000000-3.png"])
    assert {path.name for path in place.iterdir()} == {*drawn, "grid-5.png", "drawing.json"}

    # More of them are the same, and nothing of another call is overwritten.
    before = {path: path.read_bytes() for path in Path("drawings").rglob("*.*")}
    assert re.search(r": 2 drawn in [\d.]+ s, 5 were there$", run(CELL=CELL, LABELS="3,1", N=7)[0])
    for more in ({"SEED": 1}, {"STEPS": 5}, {"SAMPLER": "ddim"}, {"GUIDANCE": 0}, {"LABELS": "1,3"}, {"LABELS": "3"}):
        run(**{"CELL": CELL, "LABELS": "3,1", "N": 5, **more})
    make_network(CELL, *DIGITS, images=128)
    run(CELL=CELL, LABELS="3,1", N=5)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(place.parent.iterdir())) == 8


@pytest.mark.usefixtures("tree")
def test_what_is_asked_for_is_drawn() -> None:
    run(CELL=CELL, N=3, STEPS=5, SAMPLER="ddim", GUIDANCE=0.2, SEED=7)
    ddim = pixels(CELL, ["0", "1", "2"], seed=7, steps=5, sampler="ddim", guidance=0.2)
    assert np.array_equal(list(pictures("drawings").values()), ddim)
    run(CELL=CELL, N=3, STEPS=25, SAMPLER="ddpm", OUT="ancestral")
    ancestral = pixels(CELL, ["0", "1", "2"], steps=25, sampler="ddpm", spacing="trailing")
    assert np.array_equal(list(pictures("ancestral").values()), ancestral)


def scored(cell: Cell, fid: float) -> None:
    make_files(cell)
    path = paths.scores("evaluate", str(cell))
    scores = json.loads(path.read_text())
    scores["fast"]["validation_fid"] = {"value": fid, "error": 0.1, "floor": None}
    path.write_text(json.dumps(scores))


@pytest.mark.usefixtures("tree")
def test_the_best_cell_is_the_one_with_the_lowest_fid_on_validation() -> None:
    assert run(N=1)[0] == "mnist-cosine-25-0: the first trained cell of mnist; none is scored on validation yet"
    make_files(CELL)  # has a score, but on test
    assert run(CELL="mnist", N=1)[0].startswith("mnist-cosine-25-0: the first trained cell")
    scored(Cell("mnist", "cosine", 100, 0), 0.5)
    scored(Cell("mnist", "cosine", 1000, 0), 0.4)
    scored(OTHER, 0.1)  # it is not trained here
    best = "mnist-cosine-1000-0: the lowest FID on validation, 0.4, of 3 trained cells of mnist"
    assert run(N=1)[0] == run(CELL="mnist", N=1)[0] == best
    assert run(CELL=CELL, N=1)[0].startswith("drawings/mnist-cosine-25-0/")


@pytest.mark.usefixtures("tree")
def test_labels_say_which_dataset() -> None:
    def dataset(labels: str) -> str:
        return run(LABELS=labels, N=2)[0].partition("-")[0]

    assert dataset("7") == dataset("5,0") == dataset("٧") == "mnist"
    assert dataset("ب") == dataset("۵") == dataset("ب, ۵") == dataset("3,ا") == "persian_glyphs"
    with pytest.raises(UserError, match=r"no dataset has all of LABELS=7,ب; mnist has 0, 1, .*; persian_glyphs has ۰ \(0\), "):
        run(LABELS="7,ب")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"CELL": "mnist-linear-25-0"},
            "mnist-linear-25-0 has no trained network yet; `make repro CELL=mnist-linear-25-0` makes one",
        ),
        ({"CELL": "emnist"}, "the sweep has no cell or dataset 'emnist'; trained here: mnist-cosine-25-0, mnist-cosine-100-0"),
        ({"CELL": "mnist-cosine-7-0"}, "the sweep has no cell or dataset 'mnist-cosine-7-0'; trained here"),
        ({"CELL": "mnist", "LABELS": "x"}, "there is no class 'x'; there are: 0, 1, 2"),
        ({"SAMPLER": "euler"}, r"sample\.fast\.sampler = 'euler': input should be one of ddim, ddpm, "),
        ({"STEPS": "many"}, r"sample\.fast\.steps = 'many': input should be a valid integer"),
        ({"STEPS": "26"}, r"steps = 26 must lie in 1\.\.25, the T of mnist-cosine-25-0"),
        ({"SEED": "-1"}, r"sample\.seed = -1: input should be greater than or equal to 0"),
        ({"GUIDANCE": "nan"}, r"sample\.guidance = nan: input should be a finite number"),
        ({"N": "0"}, r"N = 0 must be a whole number of images in 1\.\."),
        ({"N": "2.5"}, r"N = 2\.5 must be a whole number"),
    ],
)
@pytest.mark.usefixtures("tree")
def test_what_is_not_there_is_told_and_nothing_is_written(asked: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        run(**{"OUT": "out", **asked})
    assert not Path("drawings").exists()
    assert not Path("out").exists()


@pytest.mark.usefixtures("bare_tree")
def test_where_nothing_is_trained_it_says_what_trains() -> None:
    with pytest.raises(UserError, match="the sweep has no trained network yet; `make repro CELL=mnist-linear-25-0` makes one"):
        run()


@pytest.mark.usefixtures("tree")
def test_images_without_labels_take_none() -> None:
    make_network(OTHER, "unlabelled")
    run(CELL=OTHER, N=2, OUT="out")
    assert list(pictures("out")) == ["unlabelled/000000.png", "unlabelled/000001.png"]
    network = json.loads(json.dumps(load(str(CELL)).about["network"])) | {"conditional": False}
    make_network(CELL, *DIGITS, network=network)
    run(CELL=CELL, N=2, GUIDANCE=0, OUT="untold")
    assert list(pictures("untold")) == ["unlabelled/000000.png", "unlabelled/000001.png"]
    for cell in (CELL, OTHER):
        with pytest.raises(UserError, match=f"{cell} draws images without labels; leave LABELS out"):
            run(CELL=cell, LABELS="0", GUIDANCE=0)
    assert run(LABELS="۵", N=1)[0].startswith("persian_glyphs")  # the others have no labels to choose by


@pytest.mark.usefixtures("tree")
def test_a_set_is_a_dataset(tmp_path: Path) -> None:
    lines = run(CELL=GLYPHS, N=100, OUT="out")
    assert lines[0].startswith("out: 100 images, a folder for each class; 100 drawn in ")
    assert lines[1] == "`reader: folder` with `path: out` takes it as a dataset"
    (raw := tmp_path / "raw").mkdir()
    folder.fetch(raw, path="out")
    how = {"group": None, "validation_share": 0.2, "test_share": 0.2, "seed": 0}
    found = folder.read(raw, path="out", licence="mine", size=8, invert=False, pad=True, strict=True, **how)
    assert found.class_names == sorted(["۰", "۵", "ب", "ا"])
    read = {
        (image.numpy().tobytes(), found.class_names[y]) for split in found.splits.values() for image, y in zip(*split, strict=True)
    }
    labels = ["۰", "۵", "ب", "ا"] * 25
    assert read == {(image.tobytes(), label) for image, label in zip(pixels(GLYPHS, labels), labels, strict=True)}


def interrupted_after(saved: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let somebody press Ctrl-C after so many images; what takes that back."""
    save, count = grids.save_png, iter(range(10**6))

    def interrupted(path: Path, image: np.ndarray) -> None:
        if next(count) == saved:
            raise KeyboardInterrupt
        save(path, image)

    monkeypatch.setattr(grids, "save_png", interrupted)
    return lambda: monkeypatch.setattr(grids, "save_png", save)


@pytest.mark.usefixtures("tree")
def test_a_set_goes_on_where_it_stopped_in_parts_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"CELL": CELL, "LABELS": "3,1,4", "STEPS": 2, "N": 150}
    run(**asked, OUT="whole")
    go_on = interrupted_after(70, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(**asked, OUT="out")
    go_on()
    before = pictures("out")
    assert len(before) == 70
    Path("out/3/000003.png").unlink()

    parts, unwatched = [], Model.draw
    monkeypatch.setattr(
        Model, "draw", lambda self, labels, **more: parts.append((more["first"], len(labels))) or unwatched(self, labels, **more)
    )
    assert "; 81 drawn in " in run(**asked, OUT="out")[0]
    assert parts == [(3, 1), (70, 58), (128, 22)]  # two chunks of 32 at a time
    after = pictures("out")
    assert after.keys() == pictures("whole").keys()
    assert all(np.array_equal(after[name], image) for name, image in pictures("whole").items())
    assert run(**asked, OUT="out")[0].startswith("out: 150 images, a folder for each class; 0 drawn in ")
    assert "; 10 drawn in " in run(**{**asked, "N": 160}, OUT="out")[0]


@pytest.mark.usefixtures("tree")
def test_a_kill_leaves_whole_images_alone(tree: Path) -> None:
    command = [sys.executable, "-m", "stages.sweep.draw", f"CELL={CELL}", "STEPS=1", "N=100000", "OUT=out"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    until = time.monotonic() + 60
    while not (started := list(Path("out").rglob("0*.png"))) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started
    killed = pictures("out")  # opens each
    n = len(killed)
    run(CELL=CELL, STEPS=1, N=n + 5, OUT="out")
    assert len(pictures("out")) == n + 5
    drawn = pixels(CELL, [DIGITS[i % 10] for i in range(n + 5)], steps=1)
    assert all(np.array_equal(image, drawn[int(Path(name).stem)]) for name, image in pictures("out").items())
    assert not list(Path("out").rglob(".*.png"))


@pytest.mark.parametrize(
    "out",
    [".", "..", "/", "data", "data/mine", "models/networks/x", "samples", "metrics/x", ".git/x", ".dvc", "stages/new", "linked/x"],
)
def test_a_folder_of_the_project_is_no_place_for_a_set(tree: Path, out: str) -> None:
    (tree / "linked").symlink_to("models")
    with pytest.raises(UserError, match=f"OUT={out} belongs to the project or to a stage; name a folder of your own"):
        run(CELL=CELL, N=1, OUT=out)


@pytest.mark.usefixtures("tree")
def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OUT=params\.yaml is a file"):
        run(CELL=CELL, N=1, OUT="params.yaml")
    asked = {"CELL": CELL, "N": 3, "OUT": "out"}
    run(**asked)
    before = {path: path.read_bytes() for path in Path("out").rglob("*.*")}
    for more, told in (
        ({"SEED": 1}, "seed: 0, now 1"),
        ({"STEPS": 5}, "steps: 14, now 5"),
        ({"CELL": GLYPHS}, f"cell: {CELL}, now {GLYPHS}; network: "),
        ({"LABELS": "3"}, r"labels: \['0', '1', '\.\.\., now \['3'\]"),
    ):
        with pytest.raises(UserError, match=rf"out has images of other settings \({told}.*\); name another folder"):
            run(**{**asked, **more})
    for strange in ("out/notes.txt", "full/notes.txt"):
        Path(strange).parent.mkdir(exist_ok=True)
        Path(strange).touch()
        with pytest.raises(UserError, match=r"has other things in it, such as 'notes\.txt'; name an empty or a new folder"):
            run(**{**asked, "OUT": Path(strange).parent})
    assert all(path.read_bytes() == content for path, content in before.items())


ODD = [
    "a/b",
    "..",
    ".",
    ".hidden",
    "a\\b",
    "x" * 300,
    "ب" * 90 + "1",
    "ب" * 90 + "2",
    "50%",
    "",
    "a b",
    "A-1",
    "__MACOSX",
    "tab\t",
    "a.b",
    "end.",
]


@pytest.mark.usefixtures("tree")
def test_odd_class_names_stay_inside_and_apart(tmp_path: Path) -> None:
    make_network(OTHER, *ODD)
    run(CELL=OTHER, N=2 * len(ODD), STEPS=1, OUT="deep/er/out")
    run(CELL=OTHER, N=2 * len(ODD), STEPS=1)
    folders = {path.name for path in Path("deep/er/out").iterdir() if path.is_dir()}
    assert len(folders) == len(ODD)
    assert {path.name for path in Path("deep/er").iterdir()} == {"out"}
    assert {"a b", "A-1", "a.b", "50%25", "a%2Fb", "%2E%2E", "%2E"} <= folders
    (raw := tmp_path / "raw").mkdir()
    folder.fetch(raw, path="deep/er/out")
    assert len(pictures("deep/er/out")) == len(pictures("drawings")) == 2 * len(ODD)
    assert {path.name for path in Path("drawings").iterdir()} == {str(OTHER)}


@pytest.mark.parametrize(
    ("n", "labels", "size"),
    [(16, 1, (4, 4)), (16, 3, (6, 3)), (20, 10, (10, 2)), (3, 10, (3, 1)), (42, 42, (7, 6)), (441, 2, (20, 20))],
)
def test_a_grid_has_equal_labels_below_each_other(tree: Path, n: int, labels: int, size: tuple[int, int]) -> None:
    for i in range(n):
        grids.save_png(tree / f"{i:06d}-x.png", np.full((2, 2), i % 256, np.uint8))
    todo = drawings.Set(load(str(CELL)), tree, n, range(labels), dict.fromkeys(range(labels), "x"), False, {"seed": 0}, {})
    grid = np.asarray(Image.open(drawings.save_grid(todo)))
    assert grid.shape == (2 * (3 * size[1] + 1), 2 * (3 * size[0] + 1))
    assert grid[2, 2:-1:6].tolist() == [i % 256 for i in range(size[0])]


def test_make_hands_over_what_stands_on_its_command_line_and_no_shell_reads_it(tmp_path: Path) -> None:
    for file, text in (
        (".installed", ""),
        ("bin/activate", f'PATH="{tmp_path}/bin:$PATH"'),
        ("bin/python", '#!/bin/sh\nprintf "<%s>" "$@"'),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    (tmp_path / "bin/python").chmod(0o755)
    os.utime(tmp_path / ".installed", (2**31, 2**31))
    labels = "a\"b,'c',`id`,ب;"
    command = ["make", "-s", "-C", str(ROOT), "draw", f"VENV={tmp_path}", f"LABELS={labels}", "N=3", "LABEL=x"]
    done = subprocess.run(
        command, env=os.environ | {"OUT": "elsewhere", "MAKEFLAGS": ""}, capture_output=True, text=True, check=True
    )
    handed_over = re.findall("<([^>]*)>", done.stdout)
    assert handed_over[:2] == ["-m", "stages.sweep.draw"]
    assert sorted(handed_over[2:]) == ["LABEL=x", f"LABELS={labels}", "N=3"]


@pytest.mark.usefixtures("tree")
def test_a_name_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw", "LABEL=7"])
    with pytest.raises(
        SystemExit, match="draw: LABEL is not known; there are CELL, LABELS, N, SEED, STEPS, SAMPLER, GUIDANCE, OUT"
    ):
        draw.main()
