"""The whole pipeline for real, in a copy of the working tree: one tiny cell of drawn glyphs, then what may and may not rerun."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from mlflow import MlflowClient
from mlflow.entities import Run

from stages.pipeline import params, tracking

ROOT = Path(__file__).parents[1]
CELL = "persian_glyphs-cosine-8-0"

TINY = """\
sweep: {datasets: [persian_glyphs], schedules: [cosine], timesteps: [8], seeds: [0]}
data:
  persian_glyphs: {size: 16, train_images: 128, test_images: 64}
extractor: {images: 64, batch: 32}
network: {channel_mult: [1, 2]}
train: {images: 128, longer: {persian_glyphs: 1}, batch: 16, warmup_images: 32, validation_images: 32, curve_points: 4}
sample: {images: 64, ancestral_images: 8, snapshot_images: 32, chunk: 32, fast: {steps: 2}}
evaluate: {images: 32, draws: 2, min_scored: 32}
"""


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command there as a user would, with the environment of these tests; its output where it fails."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    env = kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "", "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def repro(folder: Path, *options: str) -> str:
    return call(folder, "dvc", "repro", *options).stdout


def changed(folder: Path) -> set[str]:
    """The stages that DVC finds out of date."""
    with Repo(str(folder)) as repo:
        return {name.rpartition(":")[2] for name in repo.status()}  # it puts the file before the name, seen from elsewhere


def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("naqsh")
    assert experiment
    return list(client.search_runs([experiment.experiment_id]))


def contents(folder: Path) -> list[tuple[object, ...]]:
    """All that a second sync must leave as it is."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    every = []
    for run in sorted(runs(folder), key=lambda run: run.info.run_id):
        points = {name: len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics}
        every.append((run.info.run_id, run.info.status, run.data.params, run.data.metrics, run.data.tags, points))
    return every


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed copy of the working tree after its first run."""
    folder = tmp_path_factory.mktemp("work tree") / "naqsh"  # a path with a space
    listed = call(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "profiles/tiny.yaml").write_text(TINY)
    call(folder, sys.executable, "-m", "stages.pipeline.plan", "profile", "tiny")
    call(folder, "git", "init", "-q")
    commit(folder, "Start")
    repro(folder)
    return folder


def commit(folder: Path, message: str) -> None:
    call(folder, "git", "add", "-A")
    call(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", message)


def test_first_run_makes_everything(tree: Path) -> None:
    for stage in params.read_yaml(tree / "dvc.yaml")["stages"].values():
        for out in (out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])):
            path = out if isinstance(out, str) else next(iter(out))
            assert (tree / path.replace("${item.dataset}", "persian_glyphs").replace("${key}", CELL)).exists(), path
    summary = json.loads((tree / "metrics/summary.json").read_text())
    assert summary["persian_glyphs"]["fid"] > 0
    report = (tree / "metrics/report.md").read_text()
    assert "synthetic" in report
    for picture in [part.split(")")[0] for part in report.split("](")[1:]]:
        assert (tree / "metrics" / picture).stat().st_size > 1000


def test_second_run_does_nothing(tree: Path) -> None:
    assert "Data and pipelines are up to date." in repro(tree)


@pytest.mark.parametrize("share", [0.5, 0])
def test_a_lock_that_was_cut_off_costs_no_training(tree: Path, share: float) -> None:
    """It is in no commit yet: what its rest does not have comes from the run cache."""
    lock, results = tree / "dvc.lock", [tree / f"models/{CELL}/ema.safetensors", tree / f"metrics/evaluate/{CELL}.json"]
    whole, before = lock.read_bytes(), [path.read_bytes() for path in results]
    lock.write_bytes(whole[: int(share * len(whole))])
    assert "mended" in call(tree, sys.executable, "-m", "stages.pipeline.plan", "plan").stderr
    said = repro(tree)
    assert f"Stage 'train@{CELL}' is cached - skipping run" in said
    assert re.findall(r"Running stage '(.*)'", said) == ["compare"]
    assert lock.read_bytes() == whole
    assert [path.read_bytes() for path in results] == before


def test_mlflow_holds_the_cell(tree: Path) -> None:
    (run,) = runs(tree)
    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    assert run.info.run_name == CELL
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    named = {"dataset": "persian_glyphs", "schedule": "cosine", "T": "8", "seed": "0", "current": "true", "dirty": "false"}
    assert named.items() <= tags.items()
    assert tags["commit"] == call(tree, "git", "rev-parse", "HEAD").stdout.strip()
    wanted = {"train.images": "128", "data.persian_glyphs.size": "16", "network.channel_mult": "[1, 2]", "T": "8"}
    assert wanted.items() <= run.data.params.items()
    assert not any(name.startswith(("data.mnist", "runtime", "sweep")) for name in run.data.params)
    scores = json.loads((tree / f"metrics/evaluate/{CELL}.json").read_text())
    assert run.data.metrics["fid"] == scores["fast"]["fid"]["value"]
    assert run.data.metrics["real images/fid_floor"] == scores["fast"]["fid"]["floor"]
    clocked = {f"time and memory/{name}" for name in ("train_seconds", "sample_fast_images_per_sec", "evaluate_seconds")}
    assert {"eps_mse", "accuracy", "set in T steps/ancestral_accuracy", *clocked} <= run.data.metrics.keys()
    lines = (tree / f"metrics/train/{CELL}.csv").read_text().splitlines()
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [point.step for point in history] == [int(line.split(",")[0]) for line in lines[1:]]
    found = {item.path for name in ("samples", "data", "images") for item in client.list_artifacts(run.info.run_id, name)}
    assert {"samples/grid.png", "samples/chain.png", "samples/denoising.gif", "data/dataset.json"} <= found
    previews = sorted(int(path.split("+")[2]) for path in found if path.endswith(".webp"))
    assert previews == list(range(1 + len(history)))
    scored = client.get_metric_history(run.info.run_id, "snapshot_fid")
    assert [point.step for point in scored] == [2, 4, 6, 8]
    assert run.inputs.dataset_inputs[0].dataset.name == "persian_glyphs"


def test_second_sync_adds_nothing_and_committed_results_are_found(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = contents(tree)
    assert tracking.sync()
    assert contents(tree) == before
    commit(tree, "Results")
    assert tracking.sync()
    (run,) = runs(tree)
    assert run.data.tags["results_commit"] == call(tree, "git", "rev-parse", "HEAD").stdout.strip()
    assert f"git checkout {run.data.tags['results_commit']}" in run.data.tags["results_restore"]


@pytest.mark.parametrize(
    ("path", "reruns"),
    [
        ("stages/fidelity/frechet.py", {"reference@persian_glyphs", f"evaluate@{CELL}"}),
        ("stages/networks/unet.py", {f"train@{CELL}", f"sample@{CELL}", f"evaluate@{CELL}"}),
        ("stages/diffusion/samplers.py", {f"sample@{CELL}"}),
        ("stages/pipeline/tracking.py", set()),
    ],
)
def test_a_changed_file_reruns_what_depends_on_it(tree: Path, path: str, reruns: set[str]) -> None:
    before = (tree / path).read_bytes()
    try:
        (tree / path).write_bytes(before + b"\n# changed\n")
        assert changed(tree) == reruns
    finally:
        (tree / path).write_bytes(before)


def test_one_more_schedule_runs_only_the_new_cells(tree: Path) -> None:
    text = (tree / "params.yaml").read_text()
    assert "schedules: [cosine]" in text
    (tree / "params.yaml").write_text(text.replace("schedules: [cosine]", "schedules: [cosine, linear_unscaled]"))
    new = CELL.replace("cosine", "linear_unscaled")
    assert changed(tree) == {f"train@{new}", f"sample@{new}", f"evaluate@{new}", "compare"}
    repro(tree)
    first, second = sorted(runs(tree), key=lambda run: run.data.tags["schedule"])
    assert [first.data.tags["naqsh.cell"], second.data.tags["naqsh.cell"]] == [CELL, new]
    assert first.data.tags["current"] == second.data.tags["current"] == "true"
    assert second.data.tags["dirty"] == "true"
    patch = Path(second.info.artifact_uri.removeprefix("file://")) / "diff.patch"
    assert "linear_unscaled" in patch.read_text()
    rows = (tree / "metrics/summary.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["cell", CELL, new]
