"""A workspace of an earlier version, with its results and its runs, goes on under the present code."""

import contextlib
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks import kills

EARLIER = "5434e3e"  # one network for each T, folders as outputs, clocks in git
CELL = kills.CELL
SMALL = """\
sweep: {datasets: [persian_glyphs], schedules: [cosine], timesteps: [8], seeds: [0]}
data:
  persian_glyphs: {size: 16, train_images: 256, test_images: 64}
extractor: {images: 256, batch: 32}
network: {channel_mult: [1, 2]}
train: {images: 800, longer: {persian_glyphs: 1}, batch: 16, warmup_images: 32, validation_images: 32, curve_points: 4}
sample: {images: 64, ancestral_images: 8, snapshot_images: 32, chunk: 32, fast: {steps: 4}}
evaluate: {images: 32, draws: 2, min_scored: 32}
runtime: {checkpoint_seconds: 0.2}
"""
KEPT = (".state", "data", "metrics", "mlruns", "models", "samples")  # where an update removes nothing
MINE = ("notes.txt", "data/mine.txt", "metrics/mine.json", "models.txt")  # a person's own


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A workspace of the earlier version: one cell made, another training of it killed, a person's files beside them."""
    archive = subprocess.run(["git", "archive", EARLIER], cwd=kills.ROOT, capture_output=True)
    if archive.returncode:
        pytest.skip(f"commit {EARLIER} is not there; `git fetch --unshallow` brings it")
    folder = tmp_path / "naqsh"
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    shutil.rmtree(folder / "metrics")
    (folder / "dvc.lock").unlink()
    (folder / "profiles/small.yaml").write_text(SMALL)
    kills.call(folder, sys.executable, "-m", "stages.pipeline.plan", "profile", "small")
    kills.call(folder, "git", "init", "-q")
    kills.call(folder, sys.executable, "-m", "stages.pipeline.warm", "dvc", "repro")
    for name in MINE:
        (folder / name).write_text("mine")
    kills.commit(folder, "Results")
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    leave_unfinished(folder)
    (folder / "params.yaml").write_text(params)
    return folder


def leave_unfinished(folder: Path) -> None:
    """Kill a training of the earlier version as soon as it can go on, and MLflow knows of it."""

    def is_followed() -> bool:
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db", timeout=60)) as store:
            return bool(store.execute("SELECT 1 FROM runs WHERE status = 'RUNNING'").fetchall())

    command = [sys.executable, "-m", "stages.train", CELL]
    with subprocess.Popen(command, cwd=folder, env=kills.environment(), stderr=subprocess.DEVNULL) as training:
        while training.poll() is None and not (list(folder.glob(".state/checkpoints/*/*")) and is_followed()):
            time.sleep(0.05)
        os.kill(training.pid, signal.SIGKILL)
    assert training.returncode == -signal.SIGKILL


def update(folder: Path) -> None:
    """Put the present code in the place of the earlier."""
    for name in kills.call(folder, "git", "ls-files").stdout.splitlines():
        if not name.startswith("metrics/") and name not in ("dvc.lock", *MINE):
            (folder / name).unlink()
    kills.copy_tree(folder, kills.PROFILE)


@pytest.mark.slow
def test_a_workspace_of_an_earlier_version_survives_the_update(earlier: Path) -> None:
    def runs() -> dict[str, tuple[str, dict[str, str], dict[str, float]]]:
        client = MlflowClient(f"sqlite:///{earlier / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("naqsh")
        assert experiment
        found = client.search_runs([experiment.experiment_id])
        return {run.info.run_id: (run.info.status, run.data.tags, run.data.metrics) for run in found}

    before = runs()
    lay = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file() and path.parts[len(earlier.parts)] in KEPT}
    made = next(run_id for run_id, (status, *_) in before.items() if status == "FINISHED")
    killed = next(run_id for run_id, (status, *_) in before.items() if status == "RUNNING")
    assert len(before) == 2
    update(earlier)
    kills.call(earlier, sys.executable, "-m", "stages.sweep.runner")

    after = runs()
    assert {run_id: (status, tags["current"]) for run_id, (status, tags, _) in after.items() if run_id in before} == {
        made: ("FINISHED", "false"),
        killed: ("KILLED", "false"),
    }
    assert after[made][2] == before[made][2]
    assert len(before[made][2]) > 50
    (new,) = after.keys() - before.keys()
    assert (after[new][0], after[new][1]["current"], after[new][1]["naqsh.cell"]) == ("FINISHED", "true", CELL)

    assert kills.call(earlier, "dvc", "status", "--json").stdout.strip() == "{}"
    told = kills.call(earlier, sys.executable, "-m", "stages.sweep.plan", "prune").stdout.splitlines()
    (unfinished,) = earlier.glob(".state/checkpoints/*")
    stages = ("evaluate", "extractor", "fetch", "prepare", "reference", "sample", "train")
    left = {
        str(unfinished.relative_to(earlier)),
        "models/cells",
        f"samples/{CELL}/snapshots.safetensors",
        f"metrics/train/{CELL}.csv",
        *(f"metrics/figures/{name}.png" for name in ("cost", "over_training", "samples-persian_glyphs")),
        *(f"metrics/timing/{stage}" for stage in stages),
    }
    assert {line.removeprefix("left over: ") for line in told[:-1]} == left
    assert not [path for path in lay if not path.exists()]
    assert all(path.read_bytes() == content for path, content in lay.items() if earlier / "mlruns" in path.parents)

    kills.call(earlier, sys.executable, "-m", "stages.sweep.plan", "prune", "--yes")
    assert not [name for name in left if (earlier / name).exists()]
    assert all((earlier / name).read_text() == "mine" for name in MINE)
    again = kills.call(earlier, sys.executable, "-m", "stages.sweep.runner").stdout
    assert again.startswith("To run: compare\n")  # which reads whole folders; no cell runs again
    assert runs().keys() == after.keys()
