"""Run keys, and what MLflow holds after publishing, publishing again, changing, losing and breaking things; files are made up."""

import base64
import contextlib
import json
import re
import sqlite3
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import CELL, OTHER, ROOT, edit, followed, make_files, publish, record, runs, write_clocks
from dvc.utils.serialize import load_yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Run

from stages.errors import UserError
from stages.pipeline import dvc_forms, grids, params, paths
from stages.pipeline.params import Cell
from stages.tracking import mirror, mlflow_forms, provenance, store
from stages.tracking.runs import pulse

HERE = provenance.here()


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("stages/networks/unet.py", lambda text: text + "# changed\n"),
        ("stages/fidelity/frechet.py", lambda text: text + "# changed\n"),
        ("stages/diffusion/schedules/cosine.py", lambda text: text + "# changed\n"),
        ("stages/diffusion/samplers/sde_dpm_solver_pp_2m.py", lambda text: text + "# changed\n"),
        ("stages/diffusion/samplers/ddpm.py", lambda text: text + "# changed\n"),
        ("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0")),
        ("params.yaml", lambda text: text.replace("longer: {persian_glyphs: 2}", "longer: {mnist: 3, persian_glyphs: 2}")),
        ("params.yaml", lambda text: text.replace("min_scored: 500", "min_scored: 501")),
        ("dvc.lock", lambda text: text.replace("0" * 32, "1" * 32)),
    ],
)
@pytest.mark.usefixtures("tree")
def test_key_changes_with_what_decides_the_results(path: str, change: Callable[[str], str]) -> None:
    before = provenance.Tree.read().key(CELL, HERE)
    edit(path, change)
    assert provenance.Tree.read().key(CELL, HERE) != before


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("stages/networks/unet.py", lambda text: text.replace("\n", "\r\n")),
        ("stages/tracking/mirror.py", lambda text: text + "# changed\n"),
        ("stages/diffusion/schedules/linear.py", lambda text: text + "# changed\n"),
        ("stages/diffusion/samplers/heun.py", lambda text: text + "# changed\n"),
        ("params.yaml", lambda text: text.replace("experiment: naqsh", "experiment: other")),
        ("params.yaml", lambda text: text.replace("train_images: 20000", "train_images: 20001")),
        ("params.yaml", lambda text: text.replace("schedules: [linear, cosine]", "schedules: [cosine]")),
        ("params.yaml", lambda text: text.replace("# lengths are counted", "# they are counted")),
        ("params.yaml", lambda text: text.replace("longer: {persian_glyphs: 2}", "longer: {persian_glyphs: 3}")),
    ],
)
@pytest.mark.usefixtures("tree")
def test_key_ignores_what_decides_nothing(path: str, change: Callable[[str], str]) -> None:
    before = provenance.Tree.read().key(CELL, HERE)
    with Path(path).open(newline="") as file:
        text = file.read()
    with Path(path).open("w", newline="") as file:
        file.write(change(text))
    assert Path(path).read_bytes() != text.encode()
    assert provenance.Tree.read().key(CELL, HERE) == before


def test_entries_of_the_lock_parse_alone_as_they_do_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    whole = load_yaml("dvc.lock")["stages"]  # larger than any file of ours may be
    tree = provenance.Tree.read()
    assert {name: dvc_forms.recorded(tree.lock, name) for name in tree.lock} == whole
    assert dvc_forms.recorded(tree.lock, "train@no-such-cell") == {}


@pytest.mark.usefixtures("tree")
def test_key_differs_between_cells_and_needs_raw_data() -> None:
    cells = [CELL, OTHER, Cell("mnist", "cosine", 1000, 0), Cell("mnist", "cosine", 100, 1)]
    assert len({provenance.Tree.read().key(cell, HERE) for cell in cells}) == len(cells)
    elsewhere = HERE | {"train": [*HERE["train"], HERE["train"][0] | {"processor": "another"}]}
    assert provenance.Tree.read().key(CELL, elsewhere) != provenance.Tree.read().key(CELL, HERE)
    with pytest.raises(UserError, match="dvc repro fetch@persian_glyphs"):
        provenance.Tree.read().key(Cell("persian_glyphs", "cosine", 100, 0), HERE)


def test_same_key_same_run_and_no_point_twice(tree: Path) -> None:
    publish(CELL)
    (first,) = runs(tree)
    publish(CELL)
    make_files(CELL, fid=21.0)
    write_clocks("evaluate", CELL, seconds=7.0)
    publish(CELL)
    (second,) = runs(tree)
    assert second.info.run_id == first.info.run_id
    assert (first.data.metrics["fid"], second.data.metrics["fid"]) == (20.0, 21.0)
    assert second.data.metrics["time and memory/evaluate_seconds"] == 7.0
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    points = {
        name: [(p.step, p.value) for p in client.get_metric_history(second.info.run_id, name)]
        for name in ("train_loss", "val_loss")
    }
    assert points == {"train_loss": [(1, 0.9), (2, 0.8)], "val_loss": [(2, 0.85)]}
    assert len(client.get_metric_history(second.info.run_id, "real images/fid_floor")) == 1
    assert len(second.inputs.dataset_inputs) == 1


def test_a_new_key_makes_a_new_run_and_an_old_one_comes_back(tree: Path) -> None:
    def flip(text: str) -> str:
        return text.replace("grad_clip: 1.0", "grad_clip: X").replace("grad_clip: 2.0", "grad_clip: 1.0").replace("X", "2.0")

    publish(CELL)
    (first,) = runs(tree)
    edit("params.yaml", flip)
    publish(CELL)
    assert {run.data.params["train.grad_clip"]: run.data.tags["current"] for run in runs(tree)} == {"1.0": "false", "2.0": "true"}
    edit("params.yaml", flip)
    publish(CELL)
    assert len(runs(tree)) == 2
    assert {run.data.params["train.grad_clip"]: run.data.tags["current"] for run in runs(tree)} == {"1.0": "true", "2.0": "false"}
    assert first.info.run_id in {run.info.run_id for run in runs(tree)}


def test_going_back_to_old_settings_shows_the_old_run_even_where_it_fails(tree: Path) -> None:
    publish(CELL)
    edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    publish(CELL)
    edit("params.yaml", lambda text: text.replace("grad_clip: 2.0", "grad_clip: 1.0"))
    mirror.fail([CELL], "no memory")
    shown = {run.data.params["train.grad_clip"]: (run.data.tags["current"], run.info.status) for run in runs(tree)}
    assert shown == {"1.0": ("true", "FAILED"), "2.0": ("false", "FINISHED")}


def test_a_half_written_run_is_healed(tree: Path) -> None:
    publish(CELL)
    (run,) = runs(tree)
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    client.delete_tag(run.info.run_id, "naqsh.fingerprint")
    client.update_run(run.info.run_id, status="RUNNING")
    (Path(run.info.artifact_uri) / "samples/grid.png").unlink()
    publish(CELL)
    (healed,) = runs(tree)
    assert (healed.info.status, "naqsh.fingerprint" in healed.data.tags) == ("FINISHED", True)
    assert (Path(run.info.artifact_uri) / "samples/grid.png").exists()


def history(tree: Path, run: Run, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def previews(tree: Path, run: Run) -> list[int]:
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    return sorted(int(file.path.split("+")[2]) for file in client.list_artifacts(run.info.run_id, "images") if "webp" in file.path)


def test_a_training_is_followed_live_and_every_step_is_there_once(tree: Path) -> None:
    pictures = {step: paths.weights(str(CELL.training)) / "previews" / f"{step:08d}.png" for step in (1, 2)}
    for path in pictures.values():
        grids.save_png(path, np.zeros((4, 4), np.uint8))
    rows = {1: {"step": 1, "train_loss": 0.9, "images_per_sec": 50.0}, 2: {"step": 2, "train_loss": 0.8, "images_per_sec": 51.0}}
    with contextlib.suppress(KeyboardInterrupt), followed(CELL) as live:
        live.point(rows[1], pictures[1], 0.5, 61.4)
        live.point(rows[2], pictures[2], 1.0, 0.0)
        raise KeyboardInterrupt
    (run,) = runs(tree)
    assert (run.info.status, run.data.tags["progress"]) == ("KILLED", "stopped")
    with followed(CELL) as live:  # goes on from the first step, the second is measured again
        live.point(rows[2] | {"images_per_sec": 40.0}, pictures[2], 1.0, 0.0)
        pictures[2].unlink()  # the training is over, and its folder gone, before this was told
    (run,) = runs(tree)
    assert (run.info.status, run.data.tags["progress"]) == ("FINISHED", "trained")
    record(CELL, last="sample")
    write_clocks("train", CELL, seconds=9.0, by_step=[rows[1], rows[2] | {"images_per_sec": 40.0}])
    publish(CELL)
    (run,) = runs(tree)
    assert run.data.tags["progress"] == "complete"
    assert history(tree, run, "train_loss") == [(1, 0.9), (2, 0.8)]
    assert [step for step, _ in history(tree, run, "images_per_sec")] == [1, 2]
    assert previews(tree, run) == [1, 2]
    assert run.data.params["train.lr"] == "0.018"


def test_a_view_of_the_cells_is_offered_and_a_persons_changes_to_it_are_kept(tree: Path) -> None:
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")

    def state() -> Any:
        tag = json.loads(client.get_experiment("1").tags[mlflow_forms.TAG])
        assert len(client.get_experiment("1").tags[mlflow_forms.TAG]) < 5000
        return json.loads(zlib.decompress(base64.b64decode(tag["state"].removeprefix("deflate;"))))

    mirror.sync()
    charts = state()["compareRunCharts"]
    assert [chart["step"] for chart in charts if chart["type"] == "IMAGE"] == [20]  # the last of the reports
    sections = {section["uuid"] for section in state()["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in charts} <= sections
    edit("params.yaml", lambda text: text.replace("images: 40000 #", "images: [40000, 20000] #"))
    mirror.sync()
    assert next(chart["step"] for chart in state()["compareRunCharts"] if chart["type"] == "IMAGE") == 40
    mine = json.loads(client.get_experiment("1").tags[mlflow_forms.TAG]) | {"updatedAt": 1, "name": "Mine"}
    client.set_experiment_tag("1", mlflow_forms.TAG, json.dumps(mine))
    mirror.sync()
    assert json.loads(client.get_experiment("1").tags[mlflow_forms.TAG]) == mine


@pytest.mark.parametrize("text", ["mine", "[]", "null", '"x"', "{}"])
def test_a_view_that_is_none_is_offered_again(tree: Path, text: str) -> None:
    assert mirror.sync()
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    offered = client.get_experiment("1").tags[mlflow_forms.TAG]
    client.set_experiment_tag("1", mlflow_forms.TAG, text)
    assert mirror.sync()
    assert client.get_experiment("1").tags[mlflow_forms.TAG] == offered


def test_every_cell_of_a_sweep_has_a_colour_of_its_own(tree: Path) -> None:
    sweep = params.load().sweep
    colors = [mlflow_forms.color(cell, sweep) for cell in sweep.cells()]
    assert len(set(colors)) == len(colors) == 12
    publish(CELL)
    (run,) = runs(tree)
    assert run.data.tags["mlflow.runColor"] == mlflow_forms.color(CELL, sweep)
    assert re.fullmatch("#[0-9a-f]{6}", mlflow_forms.color(CELL, sweep))


def test_progress_is_a_share_and_a_time_left(tree: Path) -> None:
    picture = paths.weights(str(CELL.training)) / "previews" / "00000001.png"
    grids.save_png(picture, np.zeros((4, 4), np.uint8))
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    with followed(CELL) as live:
        live.point({"step": 1, "train_loss": 0.9}, picture, 0.25, 75.2)
        for _ in range(600):
            if runs(tree) and "progress" in (run := runs(tree)[0]).data.tags:
                break
            time.sleep(0.1)
        assert run.data.tags["progress"] == "25%, 0:01:15 left"
        assert client.get_run(run.info.run_id).info.status == "RUNNING"


def test_a_failure_is_shown_with_its_error_until_the_cell_succeeds(tree: Path) -> None:
    mirror.fail([CELL], "train: the loss became nan")
    (run,) = runs(tree)
    assert (run.info.status, run.data.tags["error"]) == ("FAILED", "train: the loss became nan")
    publish(CELL)
    (run,) = runs(tree)
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags


def test_sync_ends_the_runs_of_processes_that_are_gone(tree: Path) -> None:
    mirror.fail([CELL], "x")
    mirror.fail([OTHER], "x")
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    dead, alive = runs(tree)
    for run in (dead, alive):
        client.update_run(run.info.run_id, "RUNNING")
    with FileLock(pulse(alive.info.run_id)):
        assert mirror.sync()
    assert [client.get_run(run.info.run_id).info.status for run in (dead, alive)] == ["KILLED", "RUNNING"]


def test_sync_leaves_out_cells_of_which_only_the_scores_are_here(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a fresh clone, where one cell is made."""
    make_files(OTHER)
    record(CELL, last="evaluate")
    lock = Path("dvc.lock").read_text()
    record(OTHER, last="evaluate")
    Path("dvc.lock").write_text(Path("dvc.lock").read_text() + lock.partition("stages:\n")[2])
    (paths.samples(str(OTHER)) / "grid.png").unlink()
    assert mirror.sync()
    assert "1 of 12 cells have results" in capsys.readouterr().out
    assert [run.info.run_name for run in runs(tree)] == [str(CELL)]


def test_cells_of_former_sweeps_are_not_current_until_they_are_back(tree: Path) -> None:
    def current() -> list[str]:
        return [run.data.tags["current"] for run in runs(tree)]

    record(CELL, last="evaluate")
    assert mirror.sync()
    edit("params.yaml", lambda text: text.replace("timesteps: [25, 100, 1000]", "timesteps: [25, 1000]"))
    client, (run,) = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}"), runs(tree)
    client.set_tag(run.info.run_id, store.WORKSPACE, "somebody:/elsewhere")
    assert mirror.sync()
    assert current() == ["true"], "another workspace may have it in its sweep"
    client.set_tag(run.info.run_id, store.WORKSPACE, store.here())
    assert mirror.sync()
    assert current() == ["false"]
    edit("params.yaml", lambda text: text.replace("timesteps: [25, 1000]", "timesteps: [25, 100, 1000]"))
    assert mirror.sync()
    assert current() == ["true"]


def test_a_longer_training_names_the_run_that_it_goes_on_from(tree: Path) -> None:
    publish(CELL)
    edit("params.yaml", lambda text: text.replace("images: 40000 #", "images: [40000, 20000] #"))
    publish(CELL)
    shorter, longer = runs(tree)
    assert "continues" not in shorter.data.tags
    assert longer.data.tags["continues"] == shorter.data.tags["naqsh.key"]


def test_sync_leaves_out_what_dvc_does_not_record(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mirror.sync()
    assert "0 of 12 cells have results" in capsys.readouterr().out
    assert not runs(tree)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:9", "127.0.0.1"),
        ("sqlite:///locked.db", "locked"),
        ("sqlite:////proc/none/x.db", "none"),
        ("gopher://x", "gopher"),
    ],
)
def test_trouble_with_the_store_is_one_line(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str, says: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with sqlite3.connect(tree / "locked.db") as other:
        other.execute("begin exclusive")
        publish(CELL)
        assert not mirror.sync()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("MLflow: not recorded") and says in line for line in lines)


def test_a_temporary_workspace_writes_to_the_original_store(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dvc_forms.workspace() == tree
    for inside in (".dvc/tmp/exps/standalone/tmpabc", ".dvc/tmp/exps/tmpabc"):
        (tree / inside).mkdir(parents=True)
        monkeypatch.chdir(tree / inside)
        assert dvc_forms.workspace() == tree
        assert store.uri() == f"sqlite:///{tree / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mine.db")
    assert store.uri() == f"sqlite:///{tree / 'mine.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert store.uri() == "http://server:5000"


def test_artifacts_lie_in_the_workspace(tree: Path) -> None:
    publish(CELL)
    (run,) = runs(tree)
    root = Path(run.info.artifact_uri)
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert tree / "mlruns" in root.parents
    assert {"samples/grid.png", "samples/denoising.gif", "data/dataset.json"} <= names
