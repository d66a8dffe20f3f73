"""The MLflow mirror of the cells' files: one run for each run key, written as often as wanted. Nothing else imports mlflow.

python -m stages.pipeline.tracking         publish every finished cell of the sweep (`make sync`)
python -m stages.pipeline.tracking ui      the same, then open the MLflow UI (`make ui`)
"""

import argparse
import contextlib
import itertools
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from stages import UserError
from stages.pipeline import figures, params, paths, provenance, results
from stages.pipeline.params import Cell
from stages.pipeline.provenance import Tree, content_hash, workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

SQLITE = "sqlite:///"
PATIENCE = 20  # seconds to wait for another process that writes


def publish(cell: Cell) -> None:
    """Mirror one cell whose files are whole. Trouble with the store is one line on stderr, never an error nor a long wait."""

    def work(client: "MlflowClient", experiment: str) -> str:
        runs = client.search_runs([experiment], f"tags.`naqsh.cell` = '{cell}'")
        _write(client, experiment, _read(Tree.read(), cell), list(runs))
        return f"recorded {cell}"

    _with_store(work)


def sync() -> bool:
    """Mirror every cell of the sweep whose files are those that dvc.lock records, healing what is missing; False on trouble."""

    def work(client: "MlflowClient", experiment: str) -> str:
        tree, runs = Tree.read(), _runs_by_cell(client, experiment)
        cells = list(tree.params.sweep.cells())
        finished = [cell for cell in cells if tree.is_recorded(cell)]
        written = [_write(client, experiment, _read(tree, cell), runs.get(str(cell), [])) for cell in finished]
        _write_origins(client, experiment)
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
    key: str
    raw_digest: str
    params: dict[str, Any]
    numbers: dict[str, float]
    curve: list[dict[str, float]]
    files: list[tuple[Path, str]]  # with the folder among the run's artifacts

    def fingerprint(self) -> str:
        """A hash of all of it."""
        return content_hash([self.key, self.numbers, self.curve, [(provenance.md5(path), to) for path, to in self.files]])


def _read(tree: Tree, cell: Cell) -> _Record:
    drawn, previews = paths.samples(str(cell)), paths.weights(str(cell)) / "previews"
    files = [(drawn / "grid.png", "samples"), (drawn / "denoising.gif", "samples")]
    files += [(path, "previews") for path in sorted(previews.glob("*.png"))]
    files += [(path, "data") for path in sorted(paths.data_figures(cell.dataset).glob("*.png"))]
    files += [(paths.prepared(cell.dataset) / "dataset.json", "data")]
    raw, flat, curve = tree.raw_digest(cell.dataset), tree.chain_params(cell), results.loss_curve(cell)
    numbers = {name: value for name, value in results.row(cell).items() if name not in results.IDENTITY}
    return _Record(cell, tree.key(cell), raw, flat, numbers, curve, files)


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
    silence = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
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


def _write(client: "MlflowClient", experiment: str, record: _Record, runs: list["Run"]) -> bool:
    """Make the run of the record's key hold the record and be the current one of its cell; False where it was so already."""
    from mlflow.entities import Param, RunTag

    for other in runs:
        if other.data.tags["naqsh.key"] != record.key and other.data.tags.get("current") != "false":
            client.set_tag(other.info.run_id, "current", "false")
    scores = provenance.md5(paths.scores("evaluate", str(record.cell)))
    tags = {"current": "true", "naqsh.scores": scores, "naqsh.fingerprint": record.fingerprint()}
    run = next((run for run in runs if run.data.tags["naqsh.key"] == record.key), None)
    if run and run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
        return False
    run = run or _create(client, experiment, record)
    run_id = run.info.run_id
    if run.data.tags.get("naqsh.fingerprint") != tags["naqsh.fingerprint"]:
        client.log_batch(run_id, _metrics(record, run), [Param(name, str(value)) for name, value in record.params.items()])
        _write_files(client, run_id, record)
    client.set_terminated(run_id, "FINISHED", run.info.end_time or _now())
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])  # last: now it is whole
    return True


def _write_origins(client: "MlflowClient", experiment: str) -> None:
    """Tell every run, of experiments and of former sweeps too, which commit holds its results."""
    from mlflow.entities import RunTag

    origins = provenance.origins()
    for run in itertools.chain(*_runs_by_cell(client, experiment).values()):
        tags = origins.get(run.data.tags.get("naqsh.scores", ""), {})
        if not tags.items() <= run.data.tags.items():
            client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _create(client: "MlflowClient", experiment: str, record: _Record) -> "Run":
    """A run that knows what it is of, and the code that made it; as long as its stages took."""
    cell, commit, patch = record.cell, provenance.git("rev-parse", "HEAD").strip(), provenance.uncommitted()
    tags = {"naqsh.key": record.key, "naqsh.cell": str(cell), "dirty": str(bool(patch)).lower()}
    tags |= {"dataset": cell.dataset, "schedule": cell.schedule, "T": str(cell.T), "seed": str(cell.seed)}
    tags |= {"commit": commit, "mlflow.source.git.commit": commit} if commit else {}
    if experiment_name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment_name
    seconds = sum(record.numbers.get(f"{stage}_seconds", 0) for stage in results.CLOCKED)
    run = client.create_run(experiment, start_time=_now() - round(1000 * seconds), tags=tags, run_name=str(cell))
    if patch:
        client.log_text(run.info.run_id, patch, "diff.patch")
    return run


def _metrics(record: _Record, run: "Run") -> list["Metric"]:
    """The numbers that the run does not hold yet, and the curve; the times of its points never change, so none is kept twice."""
    from mlflow.entities import Metric

    held, now = run.data.metrics, _now()
    metrics = [Metric(name, value, now, 0) for name, value in record.numbers.items() if held.get(name) != value]
    for row in record.curve:
        step = int(row["step"])
        values = {name: value for name, value in row.items() if name not in ("step", "images")}
        metrics += [Metric(name, value, run.info.start_time + step, step) for name, value in values.items()]
    return metrics


def _write_files(client: "MlflowClient", run_id: str, record: _Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for path, folder in record.files:
        client.log_artifact(run_id, str(path), folder)
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "loss.png"
        figures.save_lines(picture, {str(record.cell): results.loss_lines(record.curve)}, x="images", y="loss", log_y=True)
        client.log_artifact(run_id, str(picture))
    raw = Dataset(record.cell.dataset, record.raw_digest, "local", json.dumps({"uri": str(paths.raw(record.cell.dataset))}))
    client.log_inputs(run_id, [DatasetInput(raw, [InputTag("mlflow.data.context", "training")])])


def _now() -> int:
    return time.time_ns() // 1_000_000


def _serve(port: str) -> None:
    """Open the UI, on this machine only, with one worker; of a store that is a server already, say where it is."""
    uri = store_uri()
    if uri.startswith("http"):
        print(f"MLflow: the store is a server; open {uri}")
        return
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    print(f"MLflow: http://127.0.0.1:{port} shows {uri}; Ctrl-C stops it", flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [*server, "--backend-store-uri", uri])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.tracking", description="Mirror finished cells in MLflow.")
    parser.add_argument("command", nargs="?", choices=["sync", "ui"], default="sync")
    parser.add_argument("--port", default="5000", help="of the UI (default: 5000)")
    args = parser.parse_args()
    complete = sync()
    if args.command == "ui":
        _serve(args.port)
    sys.exit(not complete)
