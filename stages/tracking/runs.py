"""One MLflow run for each run key: found or made, and made to hold what a cell's files say."""

import contextlib
import io
import itertools
import json
import os
import re
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from PIL import Image

from stages.errors import damaged
from stages.pipeline import paths
from stages.pipeline.dvc_forms import workspace
from stages.pipeline.files import content_hash, md5
from stages.pipeline.params import Cell
from stages.tracking import git, mlflow_forms, results, store
from stages.tracking.provenance import Machines, Tree

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Known = dict[tuple[str, int], float]
"""(name, step) -> value."""

# Sections of the charts, and which numbers stand there; the headline scores are in none.
SECTIONS = {
    "set in T steps": r"ancestral_(?!seconds)",
    "over log-SNR": r".*_at_",
    "time and memory": r"(train|sample|evaluate)_|.*seconds_per_image",
    "standard errors": r".*_error$",
    "real images": r".*_floor$",
}
CLOCKED = ("images_per_sec", "peak_memory_mib", "cuda_memory_mib")  # not the same when measured again
BY_STEP = ("lr", "train_loss", "val_loss", *CLOCKED)


@dataclass(frozen=True)
class Record:
    """A cell as its files tell it: what its run is to hold."""

    cell: Cell
    machines: Machines
    raw_digest: str
    numbers: dict[str, float]
    by_step: list[dict[str, float]]
    clocks: dict[str, float]
    clocks_by_step: list[dict[str, float]]
    files: list[tuple[Path, str]]  # with the folder among the run's artifacts
    previews: Path  # archive of PNGs, by report

    def fingerprint(self) -> str:
        """A hash of all of it but the clocks, which not every clone knows."""
        files = [*self.files, (self.previews, "")]
        return content_hash([self.raw_digest, self.numbers, self.by_step, [(md5(path), to) for path, to in files]])


def read_record(tree: Tree, cell: Cell, *, fresh: str = "") -> Record:
    """What a cell's files say now. Raises UserError where one is missing or damaged.

    `fresh`: a stage that ended just now, so that dvc.lock does not know it yet.
    """
    *drawn, about = _needed(cell)
    previews = paths.weights(str(cell.training)) / "previews.zip"
    files = [(path, "samples") for path in drawn]
    files += [(path, "data") for path in (*sorted(paths.data_figures(cell.dataset).glob("*.png")), about)]
    numbers = {name: value for name, value in results.row(cell).items() if name not in results.IDENTITY}
    clocks, clocks_by_step = results.clocks(tree, cell, fresh=fresh)
    raw, curve = tree.raw_digest(cell.dataset), results.loss_curve(cell)
    return Record(cell, results.machines(cell), raw, numbers, curve, clocks, clocks_by_step, files, previews)


def are_files_here(cell: Cell) -> bool:
    """Whether all files that a run shows of a cell are here. A fresh clone has the scores, which are in git, and nothing else."""
    return all(path.exists() for path in _needed(cell))


def _needed(cell: Cell) -> list[Path]:
    """Pictures of the samples, and what is said of the dataset."""
    drawn = [paths.samples(str(cell)) / name for name in ("grid.png", "chain.png", "denoising.gif")]
    return [*drawn, paths.prepared(cell.dataset) / "dataset.json"]


def runs_by_cell(client: "MlflowClient", experiment: str) -> dict[str, list["Run"]]:
    """All runs of cells, by the name of the cell."""
    runs: dict[str, list[Run]] = {}
    page = client.search_runs([experiment], "tags.`naqsh.key` != ''")
    while page:
        for run in page:
            runs.setdefault(run.data.tags.get("naqsh.cell", ""), []).append(run)
        if not page.token:
            break
        page = client.search_runs([experiment], "tags.`naqsh.key` != ''", page_token=page.token)
    return runs


def claim(
    client: "MlflowClient", experiment: str, tree: Tree, cell: Cell, machines: Machines, runs: list["Run"] | None = None
) -> "Run":
    """The run of what the tree makes of a cell on such machines, made where it is missing: the only one of it that is current."""
    if runs is None:
        runs = list(client.search_runs([experiment], f"tags.`naqsh.cell` = '{cell}'"))
    key = tree.key(cell, machines)
    for run in runs:
        current = "true" if run.data.tags.get("naqsh.key") == key else "false"
        if run.data.tags.get("current") != current:
            client.set_tag(run.info.run_id, "current", current)
    known = next((run for run in runs if run.data.tags.get("naqsh.key") == key), None)
    return known or _create(client, experiment, tree, cell, machines)


def disclaim(client: "MlflowClient", runs: list["Run"]) -> None:
    """Say of runs of this workspace that they are not current."""
    for run in runs:
        if run.data.tags.get("current") == "true" and run.data.tags.get(store.WORKSPACE) == store.here():
            client.set_tag(run.info.run_id, "current", "false")


def write_run(client: "MlflowClient", record: Record, run: "Run") -> bool:
    """Make a run hold the record, and be finished; False where it was so already."""
    from mlflow.entities import RunTag

    scores = md5(paths.scores("evaluate", str(record.cell)))
    tags = {"current": "true", "progress": "complete", "naqsh.scores": scores, "naqsh.fingerprint": record.fingerprint()}
    run_id = run.info.run_id
    whole = run.data.tags.get("naqsh.fingerprint") == tags["naqsh.fingerprint"] and _holds_files(client, run_id, record)
    whole = whole and {_in_section(name) for name in record.clocks} <= run.data.metrics.keys()
    if whole and run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
        return False
    if not whole:
        _log_numbers(client, run, record.numbers | record.clocks)
        log_steps(client, run, [*record.by_step, *record.clocks_by_step], known_steps(client, run_id))
        log_previews(client, run_id, _packed(record.previews))
        _write_files(client, run_id, record)
    if "error" in run.data.tags:
        client.delete_tag(run_id, "error")
    client.set_terminated(run_id, "FINISHED", run.info.end_time or _now())
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])  # last: now it is whole
    return True


def end_the_dead(client: "MlflowClient", runs: Iterable["Run"]) -> None:
    """Say KILLED of runs of this workspace that still count as running although their process is gone."""
    for run in runs:
        if run.info.status == "RUNNING" and run.data.tags.get(store.WORKSPACE) == store.here():
            with contextlib.suppress(Timeout), FileLock(pulse(run.info.run_id), timeout=0):
                client.set_terminated(run.info.run_id, "KILLED")


def pulse(run_id: str) -> Path:
    """The lock file that the process behind a running run holds for as long as it lives."""
    folder = workspace() / ".state" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run_id}.lock"


def write_origins(client: "MlflowClient", experiment: str) -> None:
    """Tell every run, of experiments and of former sweeps too, which commit holds its results."""
    from mlflow.entities import RunTag

    origins = git.origins()
    for run in itertools.chain(*runs_by_cell(client, experiment).values()):
        tags = origins.get(run.data.tags.get("naqsh.scores", ""), {})
        if not tags.items() <= run.data.tags.items():
            client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _create(client: "MlflowClient", experiment: str, tree: Tree, cell: Cell, machines: Machines) -> "Run":
    """A run that knows what it is of, and the code and the parameters that make it."""
    from mlflow.entities import Param

    commit, patch, dirty = git.commit(), git.uncommitted(), git.dirty()
    tags = {"naqsh.key": tree.key(cell, machines), "naqsh.cell": str(cell), store.WORKSPACE: store.here(), "dirty": dirty}
    tags |= {"dataset": cell.dataset, "schedule": cell.schedule, "T": str(cell.T), "seed": str(cell.seed), "current": "true"}
    tags |= {"commit": commit, "mlflow.source.git.commit": commit} if commit else {}
    tags |= {"mlflow.runColor": mlflow_forms.color(cell, tree.params.sweep)}
    if experiment_name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment_name
    if shorter := tree.without_last_phase():
        tags["continues"] = shorter.key(cell, machines)
    tags |= {"processor": ", ".join({machine["processor"]: "" for stage in machines.values() for machine in stage})}
    run = client.create_run(experiment, start_time=_now(), tags=tags, run_name=str(cell))
    client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in tree.chain_params(cell).items()])
    if patch:
        client.log_text(run.info.run_id, patch, "diff.patch")
    return run


def _log_numbers(client: "MlflowClient", run: "Run", numbers: dict[str, float]) -> None:
    from mlflow.entities import Metric

    held, now = run.data.metrics, _now()
    named = {_in_section(name): value for name, value in numbers.items()}
    client.log_batch(run.info.run_id, [Metric(name, value, now, 0) for name, value in named.items() if held.get(name) != value])


def _in_section(name: str) -> str:
    return next((f"{section}/{name}" for section, pattern in SECTIONS.items() if re.match(pattern, name)), name)


def known_steps(client: "MlflowClient", run_id: str) -> Known:
    """What a run holds of the numbers that are logged by step."""
    held = client.get_run(run_id).data.metrics
    return {
        (name, point.step): point.value for name in BY_STEP if name in held for point in client.get_metric_history(run_id, name)
    }


def log_steps(client: "MlflowClient", run: "Run", rows: list[dict[str, float]], known: Known) -> None:
    """Log what a run does not hold yet of rows, each a `step` and numbers; the time of a point depends on its step alone."""
    from mlflow.entities import Metric

    points = [(name, int(row["step"]), value) for row in rows for name, value in row.items() if name in BY_STEP]
    new = [p for p in points if p[:2] not in known or (p[0] not in CLOCKED and known[p[:2]] != p[2])]
    start = run.info.start_time
    client.log_batch(run.info.run_id, [Metric(name, value, start + step, step) for name, step, value in new])


def _packed(previews: Path) -> dict[int, bytes]:
    """The PNG files of an archive of previews, by report; none where there is no archive."""
    if not previews.exists():
        return {}
    try:
        with zipfile.ZipFile(previews) as archive:
            return {int(Path(name).stem): archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError) as error:
        raise damaged(previews, error) from None


def log_previews(client: "MlflowClient", run_id: str, previews: dict[int, bytes]) -> None:
    """Log the preview grids, PNG files by report, that a run does not hold yet, for the slider of the UI."""
    held = _pictured(client, run_id)
    for report, content in previews.items():
        if report not in held:
            with Image.open(io.BytesIO(content)) as picture:
                client.log_image(run_id, picture.convert("L"), key="preview", step=report, synchronous=True)


def _pictured(client: "MlflowClient", run_id: str) -> set[int]:
    """The steps whose preview a run holds."""
    steps = (mlflow_forms.preview_step(file.path) for file in client.list_artifacts(run_id, "images"))
    return {step for step in steps if step is not None}


def _holds_files(client: "MlflowClient", run_id: str, record: Record) -> bool:
    """Whether every file of a run is still there: somebody may have removed mlruns/."""
    held = {file.path for folder in {to for _, to in record.files} for file in client.list_artifacts(run_id, folder)}
    wanted = {f"{to}/{path.name}" for path, to in record.files}
    return wanted <= held and _packed(record.previews).keys() <= _pictured(client, run_id)


def _write_files(client: "MlflowClient", run_id: str, record: Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for path, folder in record.files:
        client.log_artifact(run_id, str(path), folder)
    raw = Dataset(record.cell.dataset, record.raw_digest, "local", json.dumps({"uri": str(paths.raw(record.cell.dataset))}))
    client.log_inputs(run_id, [DatasetInput(raw, [InputTag("mlflow.data.context", "training")])])


def _now() -> int:
    return time.time_ns() // 1_000_000
