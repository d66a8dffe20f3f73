"""The frame around every stage: arguments, checked sections of params.yaml, timing, who hears of it, one-line errors."""

import argparse
import contextlib
import inspect
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from stages.errors import ChangedError, UserError, in_one_line, masked
from stages.pipeline import clocks, inputs, params, processes
from stages.pipeline.files import alone

SUBJECTS = ("dataset", "training", "cell")  # what a stage works on: one of a sweep's datasets, networks or cells


class Listener:
    """Hears how a stage goes; this one does nothing with it. What a listener does never fails a stage.

    `cells`: those that the stage works for, one, or all that a training serves; none where it works for a dataset, or for all.
    """

    def __init__(self, stage: str, cells: Sequence[params.Cell]) -> None:
        self.stage, self.cells = stage, cells

    def start(self) -> None:
        """The stage begins to work."""

    def point(self, numbers: dict[str, float], picture: Path, share: float, seconds_left: float) -> None:
        """It stands here.

        Args:
            numbers: `step`, and the numbers of that step.
            picture: a PNG named by a number. It may be gone when the stage is over.
            share: of the work that is done, in [0, 1].
            seconds_left: until its end.
        """

    def end(self, error: BaseException | None) -> None:
        """It is over, and its outputs are whole; or an error ended it."""


def run(main: Callable[..., dict[str, Any] | None], listens: type[Listener] = Listener) -> None:
    """Run a stage from the command line: `python -m stages.NAME [DATASET | TRAINING | CELL] [--dry-run]`.

    The signature of `main` says what the stage reads. A first parameter `dataset`, `training` or `cell` comes from the command
    line, or from DVC, which tells it in DVC_STAGE, where no shell has a part. `data` is that dataset's section of params.yaml;
    every other parameter is the section of its name, and `a__b` is the key `a.b`; `listener` is who hears of it. What `main`
    returns was measured with a clock and goes to the clocks of the workspace, beside seconds, memory and device.
    """
    stage = Path(sys.argv[0]).stem
    wanted = inspect.signature(main).parameters
    subject = next((kind for kind in SUBJECTS if kind in wanted), None)
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}", description=inspect.getdoc(inspect.getmodule(main)))
    if subject:
        known = told_by_dvc(stage)
        parser.add_argument("name", metavar=subject.upper(), nargs="?" if known else None, default=known)
    parser.add_argument("--dry-run", action="store_true", help="print the checked parameters and stop")
    args = parser.parse_args()
    with in_one_line(stage), _ended_by_ctrl_c():
        loaded = params.load()
        arguments = _arguments(loaded, wanted, getattr(args, "name", None))
        if args.dry_run:
            print(masked(json.dumps(arguments, default=_plain, indent=2)))
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _end)
        if "DVC_STAGE" in os.environ:
            processes.end_with_parents()
        inputs.STARTED.look()
        listener = listens(stage, cells_of(arguments, loaded))
        with alone(Path(f".state/locks/{stage}-{getattr(args, 'name', '')}.lock")), _heard_by(listener):
            start = time.perf_counter()
            measured = main(**arguments, **({"listener": listener} if "listener" in wanted else {}))
            seconds = time.perf_counter() - start
            check_unchanged()
            if subject:
                clocks.write(stage, args.name, {**_machine(seconds), **(measured or {})})


@contextlib.contextmanager
def _heard_by(listener: Listener) -> Iterator[None]:
    listener.start()
    try:
        yield
    except BaseException as error:
        listener.end(error)
        raise
    listener.end(None)


def _end(*_: object) -> NoReturn:
    """End in good order; asked once more meanwhile, go on with that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)


def cells_of(arguments: dict[str, Any], loaded: params.Params) -> list[params.Cell]:
    """The cells that a stage works for."""
    if "cell" in arguments:
        return [arguments["cell"]]
    return [cell for cell in loaded.sweep.cells() if cell.training == arguments.get("training")]


def told_by_dvc(stage: str) -> str | None:
    """The dataset, training or cell that DVC runs a stage for; None where DVC does not run it."""
    name, item = processes.dvc_stage()
    return item if name == stage and item else None


def check_unchanged() -> None:
    """Refuse to end well where an input of this stage is no longer what it started with. Raises ChangedError, naming each."""
    if changed := inputs.STARTED.changed():
        raise ChangedError(
            f"while this ran, {', '.join(changed)} changed: nothing is recorded; `make repro` runs it with what is there now"
        )


def _arguments(loaded: params.Params, wanted: Iterable[str], name: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for key in wanted:
        if key == "listener":
            continue
        if key == "dataset":
            if name not in loaded.data:
                raise UserError(f"params.yaml: data has no section {name!r}; it has: {', '.join(loaded.data)}")
            arguments[key] = name
        elif key == "cell":
            arguments[key] = params.find_cell(loaded, str(name))
        elif key == "training":
            arguments[key] = params.find_training(loaded, str(name))
        elif key == "data":
            arguments[key] = loaded.data[arguments["dataset"]]
        else:
            value: Any = loaded
            for part in key.split("__"):
                value = getattr(value, part)
            arguments[key] = value
    return arguments


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, params.Section) else str(value)


def peak_memory() -> dict[str, int]:
    """The most memory that this process has held so far, in MiB, under the name that the records give it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {"peak_memory_mib": round(peak)}


def _machine(seconds: float) -> dict[str, Any]:
    machine: dict[str, Any] = {"seconds": round(seconds, 2), **peak_memory()}
    if "torch" in sys.modules:
        import torch

        cuda = torch.cuda.is_available()
        machine["device"] = torch.cuda.get_device_name() if cuda else "cpu"
        machine["threads"] = torch.get_num_threads()
        machine["torch"] = torch.__version__
    return machine


def progress(items: Iterable[Any] = (), *, total: int, unit: str, label: str, initial: int = 0) -> "tqdm[Any]":
    """A bar with a rate and a time left, around the items or updated by hand; silent when stderr is no terminal."""
    return tqdm(items, total=total, initial=initial, unit=unit, desc=label, disable=None, unit_scale=True, leave=False)
