"""What `make repro` and `make prune` say before they do anything."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from stages.errors import UserError
from stages.pipeline import dvc_forms, graph, params, paths
from stages.sweep import estimates, plan

ROOT = Path(__file__).parents[2]
CELL = "mnist-cosine-100-0"


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.usefixtures("bare_tree")
def test_leftovers_are_what_the_sweep_does_not_name_and_trainings_nobody_works_on() -> None:
    kept = [
        paths.weights("mnist-cosine-0") / "ema.safetensors",
        paths.loss_curve("mnist-cosine-0"),
        paths.scores("reference", "mnist"),
    ]
    files = [paths.loss_curve("mnist-cosine-7"), paths.scores("reference", "emnist"), Path("metrics/figures/cost.png")]
    files += [paths.samples("mnist-cosine-100-0") / "snapshots.safetensors"]
    folders = [
        paths.weights("mnist-cosine-7"),
        paths.samples("mnist-cosine-7-0"),
        Path("models/cells"),
        Path("metrics/timing/train"),
    ]
    kept += [Path("metrics/notes.md"), Path("data/raw/letters/a.png"), Path("models/.gitignore")]
    touch(*kept, *files, *(folder / "deeper/x.json" for folder in folders))
    for name in ("held", "abandoned"):
        touch(Path(".state/checkpoints", name, "state.safetensors"), Path(".state/finished", name, "state.safetensors"))
    Path(".state/locks").mkdir()
    with FileLock(".state/locks/held.lock"):
        found = plan.leftovers(params.load())
    assert set(found) == {*files, *folders, Path(".state/checkpoints/abandoned")}


@pytest.mark.usefixtures("bare_tree")
def test_a_changed_stage_is_followed_by_what_reads_its_outputs() -> None:
    needs, cell = graph.needs(dvc_forms.stages(), params.load()), f"sample@{CELL}"
    assert plan.with_followers({cell}, needs) == [cell, f"evaluate@{CELL}", "compare"]
    assert plan.with_followers(set(), needs) == []
    assert len(plan.with_followers({"prepare@mnist"}, needs)) == 3 + 2 + 6 * 2 + 1


def answer(monkeypatch: pytest.MonkeyPatch, said: str, error: str = "") -> None:
    """Let `dvc status` say so."""
    done = subprocess.CompletedProcess[str]([], int(bool(error)), said, error)
    monkeypatch.setattr(dvc_forms, "status", lambda: done)


@pytest.mark.usefixtures("bare_tree")
def test_a_second_repro_is_told_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "", "ERROR: '/x/m.json' is busy, it is being blocked by:\n  (PID 4711): dvc repro\n")
    with pytest.raises(UserError, match=r"another `dvc repro` \(process 4711\) works in this folder"):
        plan.plan(1)


@pytest.mark.usefixtures("bare_tree")
def test_the_plan_tells_when_the_first_cell_is_done_and_when_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, json.dumps({f"train@mnist-{schedule}-0": [] for schedule in ("linear", "cosine")}))
    assert [unit.name for unit in plan.plan(2)] == [
        "train@mnist-linear-0", "mnist-linear-25-0", "mnist-linear-100-0", "mnist-linear-1000-0",
        "train@mnist-cosine-0", "mnist-cosine-25-0", CELL, "mnist-cosine-1000-0", "compare",
    ]  # fmt: skip
    assert re.search(r"\nGoing by what a server CPU takes, the first cell is .* all in .*, 2 at a time\n$", capsys.readouterr().out)
    for stage, seconds in (("train", 240), ("sample", 60), ("evaluate", 60)):
        touch(path := Path(f".state/clocks/{stage}/{CELL}.0.json"))
        path.write_text(json.dumps({"seconds": seconds}))
    for jobs, ends in ((2, "all in about 15 min, 2 at a time"), (1, "all in about 26 min, 1 at a time")):
        plan.plan(jobs)
        assert capsys.readouterr().out.endswith(f"the first cell is done in about 6 min, {ends}\n")
    assert [unit.name for unit in plan.plan(1, CELL)] == ["train@mnist-cosine-0", CELL]
    assert capsys.readouterr().out.startswith("To run: train, sample, evaluate\n")
    assert plan.plan(1, "persian_glyphs-cosine-1000-0") == []
    assert capsys.readouterr().out == "Nothing to run: persian_glyphs-cosine-1000-0 is up to date.\n"
    with pytest.raises(UserError, match="the sweep has no cell 'mnist-x-1-0'; it has: mnist-linear-25-0, mnist-linear-100-0"):
        plan.plan(1, "mnist-x-1-0")


def test_a_path_that_does_not_exist_is_told_before_dvc_is_asked(bare_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (bare_tree / "params.yaml").read_text()
    text = text.replace("\n  mnist:\n", "\n  mine: {reader: auto, path: nowhere}\n  mnist:\n").replace("[mnist, ", "[mine, mnist, ")
    (bare_tree / "params.yaml").write_text(text)
    monkeypatch.setattr(dvc_forms, "status", lambda: pytest.fail("asked"))
    with pytest.raises(UserError, match=r"^data\.mine\.path = nowhere: there is no such file or folder$"):
        plan.plan(1)
    answer(monkeypatch, "{}")
    assert plan.plan(1, CELL) == [], "the other datasets can be made"


SCORED: dict[str, Any] = {
    "images": 2000,
    "fid": {"value": 0.8304, "error": 0.156, "floor": 0.2122},
    "accuracy": {"value": 0.95, "error": 0.005, "floor": 0.9947},
    "precision": {"value": 0.71, "error": 0.04, "floor": None},
    "sampling": {"network_evaluations": 17},
    "not_measured": {},
}


def write_scores(**changes: Any) -> None:
    fast = {name: value for name, value in (SCORED | changes).items() if value is not None}
    scores = {"fast": fast, "ancestral": {"sampling": {"network_evaluations": 139}}, "logsnr_grid": []}
    touch(path := paths.scores("evaluate", CELL), prepared := paths.prepared("mnist") / "dataset.json")
    path.write_text(json.dumps(scores))
    prepared.write_text(json.dumps({"class_names": ["0", "1"]}))


@pytest.mark.usefixtures("bare_tree")
def test_a_cell_is_told_by_its_score_or_by_what_there_is_instead() -> None:
    write_scores()
    assert plan.score(CELL) == "FID 0.83 ± 0.16 (floor 0.212)"
    write_scores(fid=None, not_measured={"fid": "the test split has 36 images"})
    assert plan.score(CELL) == "accuracy 95.0% ± 0.5%, precision 71.0% ± 4.0%, no FID: the test split has 36 images"
    write_scores(fid={"value": 2.0, "error": 0.5, "floor": None}, not_measured={"fid_floor": "18 images are too few"})
    assert plan.score(CELL) == "FID 2 ± 0.5 (no floor: 18 images are too few)"
    paths.scores("evaluate", CELL).unlink()
    assert plan.score(CELL) == f"cell {CELL} has no metrics/evaluate/{CELL}.json; `dvc repro evaluate@{CELL}` makes it"


@pytest.mark.usefixtures("bare_tree")
def test_a_cell_alone_ends_with_its_score_what_it_means_its_picture_and_what_to_type_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan.Tree, "is_recorded", lambda *_: True)
    monkeypatch.setattr(plan.committed, "lines", lambda *_: ["1 of 1 cells have the committed bits."])
    write_scores()
    plan.tell(CELL)
    assert capsys.readouterr().out.splitlines() == [
        f"{CELL}  FID 0.83 ± 0.16 (floor 0.212)",
        "FID is how far 2,000 drawn images are from the real test images, lower is better; as many real images have 0.212, "
        "the floor. A classifier recognises 95.0% of the drawn images as what was asked for, and 99.5% of real ones.",
        f"Picture: samples/{CELL}/grid.png",
        "1 of 1 cells have the committed bits.",
        "Next:",
        f"  make draw CELL={CELL}  draws pictures with its network",
        "  make repro                         makes all 12 cells of the sweep and compares them",
        "  make ui                            shows the runs in MLflow",
    ]
    write_scores(fid=None)
    (paths.prepared("mnist") / "dataset.json").write_text(json.dumps({"class_names": ["unlabelled"]}))
    plan.tell(CELL)
    assert "\nA classifier sees 95.0% of the drawn images upright, and 99.5% of real ones.\n" in capsys.readouterr().out
    write_scores(fid=None, accuracy=None)
    plan.tell(CELL)
    assert "measured\nPicture: " in capsys.readouterr().out


@pytest.mark.usefixtures("bare_tree")
def test_a_cell_whose_results_are_of_something_else_is_not_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scores()
    monkeypatch.setattr(plan.Tree, "is_recorded", lambda *_: False)
    plan.tell(CELL)
    assert capsys.readouterr().out == f"Without results of the present code, parameters and data: {CELL}\n"


def test_a_time_is_told_as_a_person_does() -> None:
    assert [estimates.span(seconds) for seconds in (0, 44, 89, 91, 5300, 6000)] == [
        "about 10 s", "about 40 s", "about 90 s", "about 2 min", "about 88 min", "about 1.7 h",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../params", "/etc/passwd", "../../etc/passwd", "", ".", "gpu.yaml", "*", "no\0"])
def test_a_profile_is_one_of_the_folder(bare_tree: Path, name: str) -> None:
    (bare_tree / "profiles").mkdir()
    (bare_tree / "profiles/gpu.yaml").write_text("train: {batch: 32}\n")
    before = (bare_tree / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=r"there is no profile .*; there are: gpu"):
        plan.profile(name)
    assert (bare_tree / "params.yaml").read_bytes() == before
    plan.profile("gpu")
    assert params.load().train.batch == 32


@pytest.mark.parametrize(
    ("edit", "ends"), [("", "undoes it."), ("# mine\n", "undoes it, and takes back the edits that were there before.")]
)
def test_a_profile_says_what_a_checkout_takes_back(
    bare_tree: Path, edit: str, ends: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare_tree / "profiles").mkdir()
    (bare_tree / "profiles/gpu.yaml").write_text("train: {batch: 32}\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], check=True)
    text = (bare_tree / "params.yaml").read_text() + edit
    (bare_tree / "params.yaml").write_text(text)
    (bare_tree / "params.yaml").chmod(0o444)
    with pytest.raises(UserError, match=r"^params\.yaml is read-only"):
        plan.profile("gpu")
    assert (bare_tree / "params.yaml").read_text() == text
    (bare_tree / "params.yaml").chmod(0o640)
    plan.profile("gpu")
    said = "params.yaml now holds profiles/gpu.yaml. `git diff params.yaml` shows it, `git checkout params.yaml` "
    assert capsys.readouterr().out == f"{said}{ends}\n"
    assert (bare_tree / "params.yaml").stat().st_mode & 0o777 == 0o640
