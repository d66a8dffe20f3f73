"""The MLflow mirror of the cells' files: written as often as wanted. Trouble with the store is one line, never an error."""

import itertools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stages.errors import UserError, masked
from stages.pipeline import inputs, params
from stages.pipeline.params import Cell
from stages.pipeline.stage import Listener
from stages.tracking import mlflow_forms, patience, store
from stages.tracking.patience import Watch
from stages.tracking.provenance import Tree, here
from stages.tracking.runs import (
    SECTIONS,
    are_files_here,
    claim,
    disclaim,
    end_the_dead,
    read_record,
    runs_by_cell,
    write_origins,
    write_run,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_Work = Callable[["MlflowClient", str], str | None]
_trouble: str | None = None


class Failing(Listener):
    """Marks the runs of its cells as failed when a stage fails."""

    run_ids: Sequence[str] = ()  # of the runs that this process follows; their keys are those of when it began

    def end(self, error: BaseException | None) -> None:
        """Say why it failed; nothing where it was told to stop, or where its inputs changed: then the run would be another's."""
        if self.cells and isinstance(error, Exception) and not inputs.STARTED.changed():
            reason = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
            fail(self.cells, masked(f"{self.stage}: {reason}"), self.run_ids)


class Scored(Failing):
    """Publishes a cell when its last stage is over."""

    def end(self, error: BaseException | None) -> None:
        """Publish it, or say why it failed."""
        super().end(error)
        for cell in self.cells if error is None else ():
            publish(cell)


class Compared(Listener):
    """Brings MLflow up to date when all cells are compared."""

    def end(self, error: BaseException | None) -> None:
        """Mirror every cell."""
        if error is None:
            sync()


def publish(cell: Cell) -> None:
    """Mirror one cell whose files are whole. Trouble with the store is one line on stderr, never an error nor a long wait.

    Nothing is done where dvc.lock says that the stages before `evaluate` were run with other code, parameters or data than are
    here now: the run key would be that of other results.
    """

    def work(client: "MlflowClient", experiment: str) -> str | None:
        tree = Tree.read()
        if not tree.is_recorded(cell, before="evaluate"):
            why = "params.yaml, the code or the data changed since it was trained"
            print(f"MLflow: {cell} not recorded yet: {why}; `make repro` brings it up to date", file=sys.stderr, flush=True)
            return None
        record = read_record(tree, cell, fresh="evaluate")
        write_run(client, record, claim(client, experiment, tree, cell, record.machines))
        return f"recorded {cell}"

    with_store(work)


def fail(cells: Sequence[Cell], error: str, followed: Sequence[str] = ()) -> None:
    """Mark the runs of cells as failed, with the error: those that were followed, else those of what is here now."""

    def work(client: "MlflowClient", experiment: str) -> str:
        tree = Tree.read()
        for run_id in followed or [claim(client, experiment, tree, cell, here()).info.run_id for cell in cells]:
            client.set_tag(run_id, "error", error[-5000:])
            client.set_terminated(run_id, "FAILED")
        return f"recorded that {', '.join(map(str, cells))} failed"

    with_store(work)


def sync(*, asked: bool = False) -> bool:
    """Mirror every cell of the sweep whose files are here, as dvc.lock records them, healing what is missing; False on trouble.

    `asked`: a person waits for it, so a store that was down a short time ago is tried again.
    """

    def work(client: "MlflowClient", experiment: str) -> str:
        tree, runs = Tree.read(), runs_by_cell(client, experiment)
        cells = list(tree.params.sweep.cells())
        finished = [cell for cell in cells if tree.is_recorded(cell) and are_files_here(cell)]
        records = [read_record(tree, cell) for cell in finished]
        claimed = [claim(client, experiment, tree, it.cell, it.machines, runs.get(str(it.cell), [])) for it in records]
        written = [write_run(client, record, run) for record, run in zip(records, claimed, strict=True)]
        for name in runs.keys() - set(map(str, cells)):  # of former sweeps
            disclaim(client, runs[name])
        end_the_dead(client, itertools.chain(*runs.values()))
        write_origins(client, experiment)
        _offer_view(client, experiment, tree.params)
        return f"{len(finished)} of {len(cells)} cells have results, {sum(written)} of them written now"

    return with_store(work, asked=asked)


def restore() -> bool:
    """Restore the experiment and its runs where somebody deleted it; False on trouble."""
    return with_store(lambda client, _: "the experiment is there", prepare=store.restore, asked=True)


def last_trouble() -> str | None:
    """Why the last use of the store in this process failed; None where it did not."""
    return _trouble


def with_store(work: _Work, *, prepare: Callable[["MlflowClient"], None] = lambda _: None, asked: bool = False) -> bool:
    """Do something with the store, and print what `work` returns; trouble of any kind is one line on stderr, and False."""
    global _trouble
    try:
        with patience.watch(store.uri(), asked=asked) as watch:
            store.load()
            with store.alone(watch, asked=asked):
                if done := watch.run(lambda: _opened(watch, prepare, work)):
                    print(f"MLflow: {done}", flush=True)
        _trouble = None
    except Exception as error:  # a stage never fails for its mirror
        tell(error)
    return _trouble is None


def _opened(watch: Watch, prepare: Callable[["MlflowClient"], None], work: _Work) -> str | None:
    client = store.client(watch)
    prepare(client)
    return work(client, store.experiment(client))


def tell(error: Exception) -> str:
    """Say on stderr that something was not recorded, and return why."""
    global _trouble
    _trouble = patience.reason(error)
    print(f"MLflow: not recorded: {_trouble}; the files are kept, `make sync` catches up", file=sys.stderr, flush=True)
    return _trouble


def _offer_view(client: "MlflowClient", experiment: str, loaded: params.Params) -> None:
    before = client.get_experiment(experiment).tags.get(mlflow_forms.TAG)
    trainings = [loaded.train.of(dataset) for dataset in loaded.sweep.datasets]
    reports = max(sum(min(train.curve_points, -(-n // train.batch)) for n in train.images) for train in trainings)
    wanted = mlflow_forms.tag(list(SECTIONS), reports, before)
    if wanted != before:
        client.set_experiment_tag(experiment, mlflow_forms.TAG, wanted)
