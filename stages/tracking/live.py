"""Tells MLflow of a training while it works."""

import contextlib
import datetime
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock

from stages.pipeline.params import Cell
from stages.tracking import patience, store
from stages.tracking.mirror import Failing, tell, with_store
from stages.tracking.patience import Watch
from stages.tracking.provenance import Tree, here
from stages.tracking.runs import claim, known_steps, log_previews, log_steps, pulse

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Followed(Failing):
    """Tells MLflow of a training from a thread of its own: it neither fails nor stalls it. What it could not say, sync says.

    A network serves the cells of every T, so the run of each of them hears of it.
    """

    def __init__(self, stage: str, cells: Sequence[Cell]) -> None:
        super().__init__(stage, cells)
        self._reports = queue.Queue[_Report | str](maxsize=100)
        self._ready, self._thread = threading.Event(), threading.Thread(target=self._work, daemon=True)
        self._watch = Watch(store.uri())

    def start(self) -> None:
        """Open the store, for at most 5 s: beside a training on all cores it would take both of them several times longer."""
        self._thread.start()
        self._ready.wait(min(5, patience.left(store.uri())))

    def point(self, numbers: dict[str, float], picture: Path, share: float, seconds_left: float) -> None:
        """Put on record how things stand."""
        progress = f"{share:.0%}, {datetime.timedelta(seconds=round(seconds_left))} left"
        with contextlib.suppress(queue.Full, OSError):
            self._reports.put_nowait(_Report(numbers, int(picture.stem), picture.read_bytes(), progress))

    def end(self, error: BaseException | None) -> None:
        """End the run; at most 5 s late."""
        with contextlib.suppress(queue.Full):
            self._reports.put_nowait("FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED")
        began = time.monotonic()
        self._thread.join(min(5, patience.left(store.uri())))
        if self._watch.under_way() > patience.QUICK:
            patience.note(store.uri(), time.monotonic() - began, tell(self._watch.late()))
        self._watch.give_up()
        super().end(error)

    def _work(self) -> None:
        def work(client: "MlflowClient", experiment: str) -> str:
            tree, machines = Tree.read(), here()
            runs = [claim(client, experiment, tree, cell, machines) for cell in self.cells]
            for run in runs:
                client.update_run(run.info.run_id, "RUNNING")
            self.run_ids = [run.info.run_id for run in runs]
            opened.append((store.watched(client, self._watch), runs))
            return f"following {', '.join(map(str, self.cells))}"

        opened: list[tuple[MlflowClient, list[Run]]] = []
        try:
            with_store(work)
        finally:
            self._ready.set()
        for client, runs in opened:
            try:
                self._follow(client, runs)
            except Exception as error:  # a training goes on, whatever it is
                if not self._watch.given_up:  # else it is told already
                    tell(error)

    def _follow(self, client: "MlflowClient", runs: "list[Run]") -> None:
        with contextlib.ExitStack() as pulses:
            for run in runs:
                pulses.enter_context(FileLock(pulse(run.info.run_id)))
            known = [known_steps(client, run.info.run_id) for run in runs]
            while isinstance(report := self._reports.get(), _Report):
                for run, steps in zip(runs, known, strict=True):
                    log_steps(client, run, [report.metrics], steps)
                    log_previews(client, run.info.run_id, {report.number: report.preview})
                    client.set_tag(run.info.run_id, "progress", report.progress)
            for run in runs:
                client.set_tag(run.info.run_id, "progress", "trained" if report == "FINISHED" else "stopped")
                client.set_terminated(run.info.run_id, report)


class _Report(NamedTuple):
    metrics: dict[str, float]
    number: int
    preview: bytes  # the file may be gone when its turn comes: the training may be over
    progress: str
