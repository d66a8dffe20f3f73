"""The MLflow mirror of the cells' files: one run for each run key, written as often as wanted. Nothing else imports mlflow.

python -m stages.pipeline.tracking         publish every finished cell of the sweep (`make sync`)
python -m stages.pipeline.tracking ui      the same, then open the MLflow UI (`make ui`)
python -m stages.pipeline.tracking restore  restore the experiment that somebody deleted, then the same
"""

import argparse
import contextlib
import datetime
import io
import itertools
import json
import os
import queue
import re
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout
from PIL import Image

from stages import UserError, masked
from stages.pipeline import inputs, params, paths, patience, provenance, results, sources, store, view
from stages.pipeline.params import Cell
from stages.pipeline.patience import Watch
from stages.pipeline.provenance import Tree, content_hash, workspace
from stages.pipeline.stage import damaged, in_one_line

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
BY_STEP = ("lr", "train_loss", "val_loss", *results.OVER_TRAINING, *CLOCKED)


_Work = Callable[["MlflowClient", str], str | None]
_followed: dict[tuple[str, Cell], str] = {}  # the run that this process follows, by store and cell
_trouble: str | None = None


def publish(cell: Cell) -> None:
    """Mirror one cell whose files are whole. Trouble with the store is one line on stderr, never an error nor a long wait.

    Nothing is done where dvc.lock says that the stages before `evaluate` were run with other code, parameters or data than are
    here now: the run key would be that of other results.
    """

    def work(client: "MlflowClient", experiment: str) -> str | None:
        tree = Tree.read()
        if inputs.STARTED.changed():  # the stage will say so
            return None
        if not tree.is_recorded(cell, before="evaluate"):
            why = "params.yaml, the code or the data changed since it was trained"
            print(f"MLflow: {cell} not recorded yet: {why}; `make repro` brings it up to date", file=sys.stderr, flush=True)
            return None
        _write(client, _read(tree, cell), _claim(client, experiment, tree, cell))
        return f"recorded {cell}"

    _with_store(work)


def fail(cell: Cell, error: str) -> None:
    """Mark the run of a cell as failed, with the error; where there is none yet, make it."""

    def work(client: "MlflowClient", experiment: str) -> str:
        followed = _followed.get((store_uri(), cell))  # its key is that of when it began
        run_id = followed or _claim(client, experiment, Tree.read(), cell).info.run_id
        client.set_tag(run_id, "error", error[-5000:])
        client.set_terminated(run_id, "FAILED")
        return f"recorded that {cell} failed"

    _with_store(work)


class Live:
    """Tells MLflow of a training from a thread of its own: it neither fails nor stalls it. What it could not say, sync says."""

    def __init__(self, cell: Cell) -> None:
        self._cell, self._reports = cell, queue.Queue[_Report | str](maxsize=100)
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._work, daemon=True)
        self._watch = Watch(store_uri())

    def __enter__(self) -> "Live":
        """Open the store, for at most 5 s: beside a training on all cores it would take both of them several times longer."""
        self._thread.start()
        self._ready.wait(min(5, patience.left(store_uri())))
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
        began = time.monotonic()
        self._thread.join(min(5, patience.left(store_uri())))
        if self._watch.under_way() > patience.QUICK:
            patience.note(store_uri(), time.monotonic() - began, _tell(self._watch.late()))
        self._watch.give_up()

    def _work(self) -> None:
        def work(client: "MlflowClient", experiment: str) -> str:
            run = _claim(client, experiment, Tree.read(), self._cell)
            client.update_run(run.info.run_id, "RUNNING")
            opened.append((store.watched(client, self._watch), run))
            return f"following {self._cell}"

        opened: list[tuple[MlflowClient, Run]] = []
        try:
            _with_store(work)
        finally:
            self._ready.set()
        for client, run in opened:
            _followed[store_uri(), self._cell] = run.info.run_id
            try:
                self._follow(client, run)
            except Exception as error:  # a training goes on, whatever it is
                if not self._watch.given_up:  # else it is told already
                    _tell(error)

    def _follow(self, client: "MlflowClient", run: "Run") -> None:
        run_id = run.info.run_id
        with FileLock(_pulse(run_id)):
            known = _known_steps(client, run_id)
            while isinstance(report := self._reports.get(), _Report):
                _log_steps(client, run, [report.metrics], known)
                _log_previews(client, run_id, {int(report.preview.stem): report.preview.read_bytes()})
                client.set_tag(run_id, "progress", report.progress)
            client.set_tag(run_id, "progress", "trained" if report == "FINISHED" else "stopped")
            client.set_terminated(run_id, report)


class _Report(NamedTuple):
    metrics: dict[str, float]
    preview: Path
    progress: str


def sync(*, asked: bool = False) -> bool:
    """Mirror every cell of the sweep whose files are those that dvc.lock records, healing what is missing; False on trouble.

    `asked`: a person waits for it, so a store that was down a short time ago is tried again.
    """

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

    return _with_store(work, asked=asked)


def restore() -> bool:
    """Restore the experiment and its runs where somebody deleted it; False on trouble."""
    return _with_store(lambda client, _: "the experiment is there", prepare=store.restore, asked=True)


def last_trouble() -> str | None:
    """Why the last use of the store in this process failed; None where it did not."""
    return _trouble


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the workspace; the path of a sqlite store is made absolute."""
    return store.uri()


@dataclass(frozen=True)
class _Record:
    """A cell as its files tell it: what its run is to hold."""

    cell: Cell
    raw_digest: str
    numbers: dict[str, float]
    by_step: list[dict[str, float]]
    files: list[tuple[Path, str]]  # with the folder among the run's artifacts
    previews: Path  # archive of PNGs, by report

    def fingerprint(self) -> str:
        """A hash of all of it."""
        files = [*self.files, (self.previews, "")]
        return content_hash([self.raw_digest, self.numbers, self.by_step, [(provenance.md5(path), to) for path, to in files]])


def _read(tree: Tree, cell: Cell) -> _Record:
    drawn, previews = paths.samples(str(cell)), paths.weights(str(cell)) / "previews.zip"
    files = [(drawn / name, "samples") for name in ("grid.png", "chain.png", "denoising.gif")]
    files += [(path, "data") for path in sorted(paths.data_figures(cell.dataset).glob("*.png"))]
    files += [(paths.prepared(cell.dataset) / "dataset.json", "data")]
    numbers = {name: value for name, value in results.row(cell).items() if name not in results.IDENTITY}
    batch = tree.params.train.batch
    scored = [{"step": row["images"] // batch, **row} for row in results.over_training(cell)]
    by_step = [*results.loss_curve(cell), *scored, *results.clocked_by_step(cell)]
    return _Record(cell, tree.raw_digest(cell.dataset), numbers, by_step, files, previews)


def _with_store(work: _Work, *, prepare: Callable[["MlflowClient"], None] = lambda _: None, asked: bool = False) -> bool:
    """Do something with the store, and print what `work` returns; trouble of any kind is one line on stderr, and False."""
    global _trouble
    try:
        with patience.watch(store_uri(), asked=asked) as watch:
            store.load()
            with store.alone(watch):
                if done := watch.run(lambda: _opened(watch, prepare, work)):
                    print(f"MLflow: {done}", flush=True)
        _trouble = None
    except Exception as error:  # a stage never fails for its mirror
        _tell(error)
    return _trouble is None


def _opened(watch: Watch, prepare: Callable[["MlflowClient"], None], work: _Work) -> str | None:
    client = store.client(watch)
    prepare(client)
    return work(client, store.experiment(client))


def _tell(error: Exception) -> str:
    """Say on stderr that something was not recorded, and return why."""
    global _trouble
    _trouble = patience.reason(error)
    print(f"MLflow: not recorded: {_trouble}; the files are kept, `make sync` catches up", file=sys.stderr, flush=True)
    return _trouble


def _runs_by_cell(client: "MlflowClient", experiment: str) -> dict[str, list["Run"]]:
    runs: dict[str, list[Run]] = {}
    page = client.search_runs([experiment], "tags.`naqsh.key` != ''")
    while page:
        for run in page:
            runs.setdefault(run.data.tags.get("naqsh.cell", ""), []).append(run)
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
        current = "true" if run.data.tags.get("naqsh.key") == key else "false"
        if run.data.tags.get("current") != current:
            client.set_tag(run.info.run_id, "current", current)
    return next((run for run in runs if run.data.tags.get("naqsh.key") == key), None) or _create(client, experiment, tree, cell)


def _write(client: "MlflowClient", record: _Record, run: "Run") -> bool:
    """Make a run hold the record, and be finished; False where it was so already."""
    from mlflow.entities import RunTag

    scores = provenance.md5(paths.scores("evaluate", str(record.cell)))
    tags = {"current": "true", "progress": "complete", "naqsh.scores": scores, "naqsh.fingerprint": record.fingerprint()}
    run_id = run.info.run_id
    whole = run.data.tags.get("naqsh.fingerprint") == tags["naqsh.fingerprint"] and _holds_files(client, run_id, record)
    if whole and run.info.status == "FINISHED" and tags.items() <= run.data.tags.items():
        return False
    if not whole:
        _log_numbers(client, run, record.numbers)
        _log_steps(client, run, record.by_step, _known_steps(client, run_id))
        _log_previews(client, run_id, _packed(record.previews))
        _write_files(client, run_id, record)
    if "error" in run.data.tags:
        client.delete_tag(run_id, "error")
    client.set_terminated(run_id, "FINISHED", run.info.end_time or _now())
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])  # last: now it is whole
    return True


def _end_the_dead(client: "MlflowClient", runs: Iterable["Run"]) -> None:
    """Say KILLED of runs of this workspace that still count as running although their process is gone."""
    for run in runs:
        if run.info.status == "RUNNING" and run.data.tags.get(store.WORKSPACE) == store.here():
            with contextlib.suppress(Timeout), FileLock(_pulse(run.info.run_id), timeout=0):
                client.set_terminated(run.info.run_id, "KILLED")


def _pulse(run_id: str) -> Path:
    """The lock file that the process behind a running run holds for as long as it lives."""
    folder = workspace() / ".state" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{run_id}.lock"


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
    tags = {"naqsh.key": tree.key(cell), "naqsh.cell": str(cell), store.WORKSPACE: store.here(), "dirty": dirty}
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


def _packed(previews: Path) -> dict[int, bytes]:
    """The PNG files of an archive of previews, by report; none where there is no archive."""
    if not previews.exists():
        return {}
    try:
        with zipfile.ZipFile(previews) as archive:
            return {int(Path(name).stem): archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError) as error:
        raise damaged(previews, error) from None


def _log_previews(client: "MlflowClient", run_id: str, previews: dict[int, bytes]) -> None:
    """Log the preview grids, PNG files by report, that a run does not hold yet, for the slider of the UI."""
    held = _pictured(client, run_id)
    for report, content in previews.items():
        if report not in held:
            with Image.open(io.BytesIO(content)) as picture:
                client.log_image(run_id, picture.convert("L"), key="preview", step=report, synchronous=True)


def _pictured(client: "MlflowClient", run_id: str) -> set[int]:
    """The steps whose preview a run holds: as MLflow names it, once as a PNG and then once more, smaller, as a WebP."""
    names = (re.fullmatch(r"images/preview\+step\+(\d+)\+.*\.webp", file.path) for file in client.list_artifacts(run_id, "images"))
    return {int(name[1]) for name in names if name}


def _holds_files(client: "MlflowClient", run_id: str, record: _Record) -> bool:
    """Whether every file of a run is still there: somebody may have removed mlruns/."""
    held = {file.path for folder in {to for _, to in record.files} for file in client.list_artifacts(run_id, folder)}
    wanted = {f"{to}/{path.name}" for path, to in record.files}
    return wanted <= held and _packed(record.previews).keys() <= _pictured(client, run_id)


def _write_files(client: "MlflowClient", run_id: str, record: _Record) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for path, folder in record.files:
        client.log_artifact(run_id, str(path), folder)
    raw = Dataset(record.cell.dataset, record.raw_digest, "local", json.dumps({"uri": str(paths.raw(record.cell.dataset))}))
    client.log_inputs(run_id, [DatasetInput(raw, [InputTag("mlflow.data.context", "training")])])


def _now() -> int:
    return time.time_ns() // 1_000_000


def _serve(port: int) -> None:
    """Open the UI, on this machine only, with one worker; of a store that is a server already, say where it is."""
    uri = store_uri()
    pages: list[str] = []

    def work(client: "MlflowClient", experiment: str) -> str:
        pages.append(f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&{view.LINK}")
        return masked(uri)

    if not _with_store(work, asked=True):
        sys.exit(1)
    if uri.startswith("http"):
        print(f"MLflow: the store is a server; open {masked(uri)}{pages[0]}")
        return
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not among the arguments, which everybody can read: it may hold a password
    print(f"MLflow: Ctrl-C stops the server. The cells side by side:\nhttp://127.0.0.1:{port}{pages[0]}", flush=True)
    server = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, server)


def _free_port(text: str) -> int:
    """The number of a port that a server may take. Raises UserError where there is no such port, or another server has it."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise UserError(f"port {text} is no number from 1 to 65535; `make ui PORT=5001`")
    port = int(text)
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except PermissionError:
        raise UserError(f"port {port} is not for everybody; `make ui PORT=5001`") from None
    except OSError:
        raise UserError(f"port {port} is in use; `make ui PORT={port % 65535 + 1}`") from None
    return port


def _main() -> int:
    """Do what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.tracking", description="Mirror finished cells in MLflow.")
    parser.add_argument("command", nargs="?", choices=["sync", "ui", "restore"], default="sync")
    parser.add_argument("--port", default="5000", help="of the UI (default: 5000)")
    args = parser.parse_args()
    with in_one_line("MLflow"):
        port = _free_port(args.port) if args.command == "ui" and not store_uri().startswith("http") else 0
        for line in sources.changed(params.load()):
            print(line, file=sys.stderr)
    complete = (args.command != "restore" or restore()) and sync(asked=True)
    if args.command == "ui" and complete:
        _serve(port)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(_main())
