"""What the readers of results say of damaged files: one line, and nothing at all where only a clock is missing."""

import json
from pathlib import Path

import pytest

from stages.errors import UserError
from stages.pipeline import paths
from stages.pipeline.params import Cell
from stages.sweep import plan
from stages.tracking import results

CELL = Cell("mnist", "cosine", 200, 0)
CURVE = "step,images,lr,train_loss,val_loss\n1,64,0.1,0.9,\n2,128,0.1,0.8,0.85\n"
SCORES = {
    "fast": {"images": 8, "fid": {"value": 2.0, "error": 0.5, "floor": 1.0}, "sampling": {"steps": 14}},
    "ancestral": {"images": 8},
    "over_training": [{"trained_images": 128, "fid": {"value": 2.0, "error": None, "floor": None}}],
    "logsnr_grid": [{"logsnr": -2.0, "eps_mse": {"value": 0.1, "error": None, "floor": None}}],
}
TIMING = {"seconds": 7.0, "by_step": [{"step": 2, "images_per_sec": 5.0}]}


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of one cell in an empty folder."""
    monkeypatch.chdir(tmp_path)
    results._tell.cache_clear()
    write(paths.scores("evaluate", str(CELL)), json.dumps(SCORES))
    write(paths.timing("train", str(CELL)), json.dumps(TIMING))
    write(paths.loss_curve(str(CELL)), CURVE)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_whole_files_are_read() -> None:
    assert results.row(CELL)["train_seconds"] == 7
    assert results.loss_curve(CELL)[0] == {"step": 1, "images": 64, "lr": 0.1, "train_loss": 0.9}
    assert results.clocked_by_step(CELL) == TIMING["by_step"]
    assert plan.expected(f"train@{CELL}", "seconds") == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"seconds": 7',
        '<<<<<<< HEAD\n{"seconds": 7}\n=======\n{"seconds": 8}\n>>>>>>> other\n',
        "[7]",
        '{"seconds": "long"}',
        '{"seconds": 7, "by_step": 3}',
        '{"seconds": 7, "by_step": [3]}',
        '{"seconds": 7, "by_step": [{"images_per_sec": 5}]}',
        '{"seconds": 7, "by_step": [{"step": "two"}]}',
        '{"seconds": 7, "by_step": [[["step", 1]], "x"]}',
    ],
)
def test_a_damaged_timing_counts_as_not_recorded_and_is_told_once(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(paths.timing("train", str(CELL)), text)
    row = results.row(CELL)
    assert row["fid"] == 2
    assert "train_seconds" not in row
    assert results.clocked_by_step(CELL) == []
    assert plan.expected(f"train@{CELL}", "seconds") is None
    assert "-" in results.table([row])
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{paths.timing('train', str(CELL))} is damaged" in told


@pytest.mark.parametrize(
    "text",
    [
        "",
        CURVE[:-1],
        CURVE[: CURVE.index("64,") + 2],
        CURVE.partition("\n")[0] + "\n",
        CURVE.partition("\n")[2],
        CURVE.replace("2,128", "<<<<<<< HEAD\n2,128"),
        "<<<<<<< HEAD\n" + CURVE,
        CURVE.replace("0.8,", "none,"),
        CURVE.replace("0.8,", "nan,"),
        CURVE.replace("0.85", "0.85,0.9"),
        CURVE.replace("2,128", ",128"),
        CURVE.replace("0.8,", '"0.8,'),
        CURVE.replace("0.8,", "0\0"),
    ],
)
def test_a_damaged_curve_is_told_in_one_line(text: str) -> None:
    write(paths.loss_curve(str(CELL)), text)
    with pytest.raises(UserError, match=r"^metrics/train/mnist-cosine-200-0\.csv is damaged \(.*\); `git checkout .*`$"):
        results.loss_curve(CELL)


def test_a_curve_that_is_no_utf_8_is_told_in_one_line() -> None:
    paths.loss_curve(str(CELL)).write_bytes(CURVE.encode("utf-16"))
    with pytest.raises(UserError, match="is damaged"):
        results.loss_curve(CELL)


@pytest.mark.parametrize(
    "changes",
    [
        {"fast": [1]},
        {"fast": None},
        {"logsnr_grid": {"a": 1}},
        {"logsnr_grid": [{"eps_mse": {"value": 1}}]},
        {"logsnr_grid": [{"logsnr": "low", "eps_mse": {"value": 1}}]},
        {"over_training": []},
        {"over_training": [7]},
    ],
)
def test_scores_of_another_form_are_told_in_one_line(changes: dict) -> None:
    write(paths.scores("evaluate", str(CELL)), json.dumps({**SCORES, **changes}))
    with pytest.raises(UserError, match=r"^metrics/evaluate/mnist-cosine-200-0\.json is damaged"):
        results.row(CELL), results.over_training(CELL)


@pytest.mark.parametrize("name", SCORES)
def test_scores_without_a_part_are_told_in_one_line(name: str) -> None:
    write(paths.scores("evaluate", str(CELL)), json.dumps({key: value for key, value in SCORES.items() if key != name}))
    if name == "ancestral":  # nothing reads it by name
        assert results.row(CELL)
    else:
        with pytest.raises(UserError, match=f"is damaged .*{name}"):
            results.row(CELL)
