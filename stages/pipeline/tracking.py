"""The MLflow mirror of the cells' files: one run for each run key, written as often as wanted. Nothing else imports mlflow.

python -m stages.pipeline.tracking         publish every finished cell of the sweep (`make sync`)
python -m stages.pipeline.tracking ui      the same, then open the MLflow UI (`make ui`)
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import queue
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout
from PIL import Image

from stages import UserError
from stages.pipeline import params, paths, provenance, results, sources, view, warm
from stages.pipeline.params import Cell
from stages.pipeline.provenance import Tree, content_hash, workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Known = dict[tuple[str, int], float]
"""(name, step) -> value."""

SQLITE = "sqlite:///"
PATIENCE = 20  # seconds to wait for another process that writes
# Sections of the charts, and which numbers stand there; the headline scores are in none.
SECTIONS = {
    "set in T steps": r"ancestral_(?!seconds)",
    "over log-SNR": r".*_at_",
    "time and memory": r"(train|sample|evaluate)_|.*seconds_per_image",
    "standard errors": r".*_error$",
    "real images": r".*_floor$",
}
CLOCKED = ("images_per_sec", "peak_memory_mib", "cuda_memory_mib")  # not the same when measured again
BY_STEP = ("lr", "train_loss", "val_loss", *results.OVER_TRAINING, *CLOCKED)


def publish(cell: Cell) -> None:
    """Mirror one cell whose files are whole. Trouble with the store is one line on stderr, never an error nor a long wait."""

    def work(client: "MlflowClient", experiment: str) -> str:
        tree = Tree.read()
        _write(client, _read(tree, cell), _claim(client, experiment, tree, cell))
        return f"recorded {cell}"

    _with_store(work)


def fail(cell: Cell, error: str) -> None:
    """Mark the run of a cell as failed, with the error; where there is none yet, make it."""

    def work(client: "MlflowClient", experiment: str) -> str:
        run = _claim(client, experiment, Tree.read(), cell)
        client.set_tag(run.info.run_id, "error", error[-5000:])
        client.set_terminated(run.info.run_id, "FAILED")
        return f"recorded that {cell} failed"

    _with_store(work)


class Live:
    """Tells MLflow of a training from a thread of its own: it neither fails nor stalls it. What it could not say, sync says."""

    def __init__(self, cell: Cell) -> None:
        self._cell, self._reports = cell, queue.Queue[_Report | str](maxsize=100)
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Live":
        """Open the store, for at most 5 s: beside a training on all cores it would take both of them several times longer."""
        self._thread.start()
        self._ready.wait(5)
        return self

    def report(self, metrics: dict[str, float], preview: Path, share: float, seconds_left: float) -> None:
        """Put on record how things stand.

        Args:
            metrics: `step`, and the numbers of that step.
            preview: a PNG that stays for as long as the run.
            share: of the training that is done, in [0, 1].
        """
        progress = f"{share:.0%}, {datetime.timedelta(seconds=round(seconds_left))} left"
        with contextlib.suppress(queue.Full):
            self._reports.put_nowait(_Report(metrics, preview, progress))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the run; at most 5 s late."""
        with contextlib.suppress(queue.Full):
            self._reports.put_nowait("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")
        self._thread.join(5)

    def _work(self) -> None:
        def work(client: "MlflowClient", experiment: str) -> str:
            run = _claim(client, experiment, Tree.read(), self._cell)
            client.update_run(run.info.run_id, "RUNNING")
            opened.append((client, run))
            return f"following {self._cell}"

        opened: list[tuple[MlflowClient, Run]] = []
        followed = _with_store(work)
        self._ready.set()
        if not followed:
            return
        client, run = opened[0]
        run_id = run.info.run_id
        with contextlib.suppress(*_store_errors()), FileLock(_pulse(run_id)):
            known = _known_steps(client, run_id)
            while isinstance(report := self._reports.get(), _Report):
                _log_steps(client, run, [report.metrics], known)
                _log_previews(client, run_id, [report.preview])
                client.set_tag(run_id, "progress", report.progress)
            client.set_tag(run_id, "progress", "trained" if report == "FINISHED" else "stopped")
            client.set_terminated(run_id, report)


class _Report(NamedTuple):
    metrics: dict[str, float]
    preview: Path
    progress: str


def sync() -> bool:
    """Mirror every cell of the sweep whose files are those that dvc.lock records, healing what is missing; False on trouble."""

    def work(client: "MlflowClient", experiment: str) -> str:
        tree, runs = Tree.read(), _runs_by_cell(client, experiment)
        cells = list(tree.params.sweep.cells())
        finished = [cell for cell in cells if tree.is_recorded(cell)]
        claimed = [(cell, _claim(client, experiment, tree, cell, runs.get(str(cell), []))) for cell in finished]
        written = [_write(client, _read(tree, cell), run) for cell, run in claimed]
        _end_the_dead(client, itertools.chain(*runs.values()))
        _write_origins(client, experiment)
        _offer_view(client, experiment, tree.params)
        return f"{len(finished)} of {len(cells)} cells have results, {sum(written)} of them written now"

    return _with_store(work)


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the workspace; the path of a sqlite store is made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return f"{SQLITE}{workspace() / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


@dataclass(frozen=True)
class _Record:
    """A cell as its files tell it: what its run is to hold."""

    cell: Cell
    raw_digest: str
    numbers: dict[str, float]
    by_step: list[dict[str, float]]
    files: list[tuple[Path, str]]  # with the folder among the run's artifacts
    previews: list[Path]

    def fingerprint(self) -> str:
        """A hash of all of it."""
        files = [*self.files, *((path, "") for path in self.previews)]
        return content_hash([self.raw_digest, self.numbers, self.by_step, [(provenance.md5(path), to) for path, to in files]])


def _read(tree: Tree, cell: Cell) -> _Record:
    drawn, previews = paths.samples(str(cell)), paths.weights(str(cell)) / "previews"
    files = [(drawn / name, "samples") for name in ("grid.png", "chain.png", "denoising.gif")]
    files += [(path, "data") for path in sorted(paths.data_figures(cell.dataset).glob("*.png"))]
    files += [(paths.prepared(cell.dataset) / "dataset.json", "data")]
    numbers = {name: value for name, value in results.row(cell).items() if name not in results.IDENTITY}
    batch = tree.params.train.batch
    scored = [{"step": row["images"] // batch, **row} for row in results.over_training(cell)]
    by_step = [*results.loss_curve(cell), *scored, *results.clocked_by_step(cell)]
    return _Record(cell, tree.raw_digest(cell.dataset), numbers, by_step, files, sorted(previews.glob("*.png")))


def _with_store(work: Callable[["MlflowClient", str], str]) -> bool:
    local = store_uri().removeprefix(SQLITE) if store_uri().startswith(SQLITE) else None
    try:
        with FileLock(f"{local or workspace() / 'mlflow.db'}.lock", timeout=PATIENCE):
            print(f"MLflow: {work(*_open(local))}", flush=True)
        return True
    except _store_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"MLflow: not recorded: {reason}; the files are kept, `make sync` catches up", file=sys.stderr, flush=True)
        return False


def _store_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return UserError, OSError, sqlite3.Error, MlflowException, SQLAlchemyError


def _open(local: str | None) -> tuple["MlflowClient", str]:
    """A client and the id of the experiment, made where missing; call it under the lock, for two creators break a new database."""
    silence = {**warm.QUIET, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    for name, value in {**silence, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    if local:  # a database that cannot be written fails here at once; MLflow would try for minutes
        with contextlib.closing(sqlite3.connect(local, timeout=PATIENCE, isolation_level=None)) as database:
            database.execute("pragma journal_mode=wal")
            database.execute("begin immediate")
            database.execute("rollback")
    name = params.load().runtime.experiment
    client = MlflowClient(store_uri())
    experiment = client.get_experiment_by_name(name)
    if experiment:
        return client, experiment.experiment_id
    return client, client.create_experiment(name, artifact_location=str(workspace() / "mlruns") if local else None)


def _runs_by_cell(client: "MlflowClient", experiment: str) -> dict[str, list["Run"]]:
    runs: dict[str, list[Run]] = {}
    page = client.search_runs([experiment], "tags.`naqsh.key` != ''")
    while page:
        for run in page:
            runs.setdefault(run.data.tags["naqsh.cell"], []).append(run)
        if not page.token:
            break
        page = client.search_runs([experiment], "tags.`naqsh.key` != ''", page_token=page.token)
    return runs


def _claim(client: "MlflowClient", experiment: str, tree: Tree, cell: Cell, runs: list["Run"] | None = None) -> "Run":
    """The run of what the tree makes of a cell, made where it is missing: the only one of the cell that is current."""
    if runs is None:
        runs = list(client.search_runs([experiment], f"tags.`naqsh.cell` = '{cell}'"))
    key = tree.key(cell)
    for run in runs:
        current = "true" if run.data.tags["naqsh.key"] == key else "false"
        if run.data.tags.get("current") != current:
            client.set_tag(run.info.run_id, "current", current)
    return next((run for run in runs if run.data.tags["naqsh.key"] == key), None) or _create(client, experiment, tree, cell)


def _write(client: "MlflowClient", record: _Record, run: "Run") -> bool:
    """Make a run hold the record, and be finished; False where it was so already."""
    from mlflow.entities import RunTag

    scores = provenance.md5(paths.scores("evaluate", str(record.cell)))
    tags = {"current": "true", "progress": "complete", "naqsh.scores": scores, "naqsh.fingerprint": record.fingerprint()}
    if run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
        return False
    run_id = run.info.run_id
    if run.data.tags.get("naqsh.fingerprint") != tags["naqsh.fingerprint"]:
        _log_numbers(client, run, record.numbers)
        _log_steps(client, run, record.by_step, _known_steps(client, run_id))
        _log_previews(client, run_id, record.previews)
        _write_files(client, run_id, record)
    if "error" in run.data.tags:
        client.delete_tag(run_id, "error")
    client.set_terminated(run_id, "FINISHED", run.info.end_time or _now())
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])  # last: now it is whole
    return True


def _end_the_dead(client: "MlflowClient", runs: Iterable["Run"]) -> None:
    """Say KILLED of runs of this workspace that still count as running although their process is gone."""
    for run in runs:
        if run.info.status == "RUNNING" and run.data.tags.get("naqsh.workspace") == _here():
            with contextlib.suppress(Timeout), FileLock(_pulse(run.info.run_id), timeout=0):
                client.set_terminated(run.info.run_id, "KILLED")


def _pulse(run_id: str) -> Path:
    """The lock file that the process behind a running run holds for as long as it lives."""
    folder = workspace() / ".state" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run_id}.lock"


def _here() -> str:
    return f"{platform.node()}:{workspace()}"


def _offer_view(client: "MlflowClient", experiment: str, loaded: params.Params) -> None:
    before = client.get_experiment(experiment).tags.get(view.TAG)
    trainings = [loaded.train.of(dataset) for dataset in loaded.sweep.datasets]
    reports = max(sum(min(train.curve_points, -(-n // train.batch)) for n in train.images) for train in trainings)
    wanted = view.tag(list(SECTIONS), reports, before)
    if wanted != before:
        client.set_experiment_tag(experiment, view.TAG, wanted)


def _write_origins(client: "MlflowClient", experiment: str) -> None:
    """Tell every run, of experiments and of former sweeps too, which commit holds its results."""
    from mlflow.entities import RunTag

    origins = provenance.origins()
    for run in itertools.chain(*_runs_by_cell(client, experiment).values()):
        tags = origins.get(run.data.tags.get("naqsh.scores", ""), {})
        if not tags.items() <= run.data.tags.items():
            client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _create(client: "MlflowClient", experiment: str, tree: Tree, cell: Cell) -> "Run":
    """A run that knows what it is of, and the code and the parameters that make it."""
    from mlflow.entities import Param

    commit, patch, dirty = provenance.commit(), provenance.uncommitted(), provenance.dirty()
    tags = {"naqsh.key": tree.key(cell), "naqsh.cell": str(cell), "naqsh.workspace": _here(), "dirty": dirty}
    tags |= {"dataset": cell.dataset, "schedule": cell.schedule, "T": str(cell.T), "seed": str(cell.seed), "current": "true"}
    tags |= {"commit": commit, "mlflow.source.git.commit": commit} if commit else {}
    tags |= {"mlflow.runColor": view.color(cell, tree.params.sweep)}
    if experiment_name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment_name
    if shorter := tree.without_last_phase():
        tags["continues"] = shorter.key(cell)
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


def _known_steps(client: "MlflowClient", run_id: str) -> Known:
    """What a run holds of the numbers that are logged by step."""
    held = client.get_run(run_id).data.metrics
    return {
        (name, point.step): point.value for name in BY_STEP if name in held for point in client.get_metric_history(run_id, name)
    }


def _log_steps(client: "MlflowClient", run: "Run", rows: list[dict[str, float]], known: Known) -> None:
    """Log what a run does not hold yet of rows, each a `step` and numbers; the time of a point depends on its step alone."""
    from mlflow.entities import Metric

    points = [(name, int(row["step"]), value) for row in rows for name, value in row.items() if name in BY_STEP]
    new = [p for p in points if p[:2] not in known or (p[0] not in CLOCKED and known[p[:2]] != p[2])]
    start = run.info.start_time
    client.log_batch(run.info.run_id, [Metric(name, value, start + step, step) for name, step, value in new])


def _log_previews(client: "MlflowClient", run_id: str, previews: list[Path]) -> None:
    """Log the preview grids that a run does not hold yet, by report, for the slider of the UI."""
    held = {file.path.split("+")[2] for file in client.list_artifacts(run_id, "images") if file.path.endswith(".webp")}
    for path in previews:
        if str(int(path.stem)) not in held:
            with Image.open(path) as picture:
                client.log_image(run_id, picture.convert("L"), key="preview", step=int(path.stem), synchronous=True)


def _write_files(client: "MlflowClient", run_id: str, record: _Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for path, folder in record.files:
        client.log_artifact(run_id, str(path), folder)
    raw = Dataset(record.cell.dataset, record.raw_digest, "local", json.dumps({"uri": str(paths.raw(record.cell.dataset))}))
    client.log_inputs(run_id, [DatasetInput(raw, [InputTag("mlflow.data.context", "training")])])


def _now() -> int:
    return time.time_ns() // 1_000_000


def _serve(port: str) -> None:
    """Open the UI, on this machine only, with one worker; of a store that is a server already, say where it is."""
    from mlflow import MlflowClient

    uri = store_uri()
    experiment = MlflowClient(uri).get_experiment_by_name(params.load().runtime.experiment)
    page = f"/#/experiments/{experiment.experiment_id}/runs?compareRunsMode=CHART&{view.LINK}" if experiment else ""
    if uri.startswith("http"):
        print(f"MLflow: the store is a server; open {uri}{page}")
        return
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"MLflow: {uri}; Ctrl-C stops the server. The cells side by side:\nhttp://127.0.0.1:{port}{page}", flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [*server, "--backend-store-uri", uri])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.tracking", description="Mirror finished cells in MLflow.")
    parser.add_argument("command", nargs="?", choices=["sync", "ui"], default="sync")
    parser.add_argument("--port", default="5000", help="of the UI (default: 5000)")
    args = parser.parse_args()
    for line in sources.changed(params.load()):
        print(line, file=sys.stderr)
    complete = sync()
    if args.command == "ui" and complete:
        _serve(args.port)
    sys.exit(not complete)
