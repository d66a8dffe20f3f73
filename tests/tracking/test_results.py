"""What the readers of results say of damaged files: one line, and nothing at all where only a clock is missing."""

import json
import shutil
from pathlib import Path

import pytest
from cells import ROOT, edit, write_clocks

from stages.errors import UserError
from stages.pipeline import clocks, paths
from stages.pipeline.params import Cell
from stages.tracking import provenance, results

CELL = Cell("mnist", "cosine", 100, 0)
CURVE = "step,images,lr,train_loss,val_loss\n1,64,0.1,0.9,\n2,128,0.1,0.8,0.85\n"
SCORES = {
    "fast": {"images": 8, "fid": {"value": 2.0, "error": 0.5, "floor": 1.0}, "sampling": {"network_evaluations": 14}},
    "ancestral": {"images": 8, "sampling": {"network_evaluations": 100}},
    "train_images": 128,
    "logsnr_grid": [{"logsnr": -2.0, "eps_mse": {"value": 0.1, "error": None, "floor": None}}],
}
TIMING = {"seconds": 7.0, "by_step": [{"step": 2, "images_per_sec": 5.0}]}


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The results of one cell in an empty folder."""
    monkeypatch.chdir(tmp_path)
    clocks._tell.cache_clear()
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    write(paths.scores("evaluate", str(CELL)), json.dumps(SCORES))
    write_clocks("train", CELL, **TIMING)
    write(paths.loss_curve(str(CELL.training)), CURVE)
    return tmp_path


def clocked() -> tuple[dict[str, float], list[dict[str, float]]]:
    """What is read of the clocks of a cell whose training ended just now."""
    return results.clocks(provenance.Tree.read(), CELL, fresh="train")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_whole_files_are_read() -> None:
    assert results.row(CELL)["ancestral_evaluations"] == 100
    assert results.row(CELL)["train_images"] == 128
    assert clocked() == ({"train_seconds": 7}, TIMING["by_step"])
    assert results.loss_curve(CELL)[0] == {"step": 1, "images": 64, "lr": 0.1, "train_loss": 0.9}
    for training in ("mnist-cosine-0", "mnist-linear-0", "persian_glyphs-cosine-0"):  # another's is better than nothing
        assert clocks.expected(f"train@{training}", "seconds") == 7
    assert clocks.expected(f"sample@{CELL}", "seconds") is None


def test_a_clock_is_that_of_what_the_stage_was_run_with() -> None:
    entry = clocks.now("train", "mnist-cosine-0")
    assert clocks.read("train", "mnist-cosine-0", entry)["seconds"] == 7
    other = entry | {"params": {"params.yaml": {}}}
    assert clocks.read("train", "mnist-cosine-0", other) == clocks.read("train", "mnist-linear-0", entry) == {}
    write(clocks.path_of("train", "mnist-cosine-0", other), '{"seconds": 8}')
    assert clocks.read("train", "mnist-cosine-0", entry)["seconds"] == 7


def test_a_number_that_dvc_keeps_without_a_point_has_the_clock_of_the_same_with_one() -> None:
    edit("params.yaml", lambda text: text.replace("guidance: 0.8 #", "guidance: 1 #"))
    now = clocks.now("sample", str(CELL))
    assert now["params"]["params.yaml"]["sample"]["guidance"] == 1.0
    kept = json.loads(json.dumps(now).replace('"guidance": 1.0', '"guidance": 1'))
    assert json.dumps(kept) != json.dumps(now)
    clocks.write("sample", str(CELL), {"seconds": 3})
    assert clocks.read("sample", str(CELL), kept) == {"seconds": 3}
    more = json.loads(json.dumps(now).replace('"guidance": 1.0', '"guidance": 1.5'))
    assert clocks.read("sample", str(CELL), more) == {}


def test_what_is_missing_is_told_once_with_the_reason() -> None:
    few, none = "the test split has 36 images", "the validation split has 18 images"
    other = Cell("mnist", "cosine", 25, 0)
    for cell in (CELL, other):
        scores = json.loads(json.dumps(SCORES))
        scores["fast"]["not_measured"] = {"fid": few, "precision_floor": none, "class_tv_floor": none}
        write(paths.scores("evaluate", str(cell)), json.dumps(scores))
    assert results.not_measured(CELL)["fid"] == few
    assert results.why_missing([CELL, other]) == [
        f"mnist has no FID: {few}",
        f"mnist has no floor of precision, no floor of class_tv: {none}",
    ]


def test_scores_of_an_earlier_version_lack_nothing_by_their_own_word() -> None:
    assert results.why_missing([CELL]) == []


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
    (path,) = Path(".state/clocks/train").iterdir()
    write(path, text)
    row = results.row(CELL)
    assert row["fid"] == 2
    assert clocked() == ({}, [])
    assert clocks.expected("train@mnist-cosine-0", "seconds") is None
    write(path, '{"seconds": 7, "peak_memory_mib": "much"}')
    assert clocks.expected("train@mnist-cosine-0", "peak_memory_mib") is None
    assert "-" in results.table([row])
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{path} is damaged" in told


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
    write(paths.loss_curve(str(CELL.training)), text)
    with pytest.raises(UserError, match=r"^metrics/train/mnist-cosine-0\.csv is damaged \(.*\); `git checkout .*`$"):
        results.loss_curve(CELL)


def test_a_curve_that_is_no_utf_8_is_told_in_one_line() -> None:
    paths.loss_curve(str(CELL.training)).write_bytes(CURVE.encode("utf-16"))
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
    ],
)
def test_scores_of_another_form_are_told_in_one_line(changes: dict) -> None:
    write(paths.scores("evaluate", str(CELL)), json.dumps({**SCORES, **changes}))
    with pytest.raises(UserError, match=r"^metrics/evaluate/mnist-cosine-100-0\.json is damaged"):
        results.row(CELL)


@pytest.mark.parametrize("name", SCORES)
def test_scores_without_a_part_are_told_in_one_line(name: str) -> None:
    write(paths.scores("evaluate", str(CELL)), json.dumps({key: value for key, value in SCORES.items() if key != name}))
    if name == "train_images":  # nothing reads it by name
        assert results.row(CELL)
    else:
        with pytest.raises(UserError, match=f"is damaged .*{name}"):
            results.row(CELL)
