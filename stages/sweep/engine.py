"""Makes what is out of date, several units at a time on this machine, then brings MLflow up to date and prints the table.

    python -m stages.sweep.engine [--jobs N] [--cell NAME]

Each unit is a `dvc repro` of its own, whose output goes to .state/logs/UNIT.log. One that fails stops those alone that need it.
`make repro` starts this process through stages/sweep/runner.py, which ends it with all that it started.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from stages.errors import UserError, in_one_line
from stages.pipeline import clocks, dvc_forms, params, processes
from stages.sweep import estimates, plan, repair, units
from stages.sweep.display import Display
from stages.sweep.units import Unit
from stages.tracking import mirror

LOGS = Path(".state/logs")
LEAST_MIB = 1536  # of memory for a unit of which no peak is known
PAUSE = 0.1  # seconds between two looks at what runs
NOTES = re.compile(
    r"^(?!MLflow: ).*(?:going on from|begins with the weights|begun on|starting over|takes the network|waiting for it to end"
    r"|emulates it).*$",
    re.MULTILINE,
)


class Job:
    """A unit that runs."""

    def __init__(self, unit: Unit, cores: int) -> None:
        """Start it. `cores`: its share of the CPUs."""
        self.unit, self.log = unit, LOGS / f"{unit.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(
                (*dvc_forms.REPRO, *unit.stages),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, processes.CORES: str(cores)},
                preexec_fn=processes.end_with_parent,
            )

    def code(self) -> int | None:
        """The return code of DVC; None while it runs."""
        return self._process.poll()

    def said(self) -> str:
        """The output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def run(todo: list[Unit], jobs: int, display: Display) -> list[str]:
    """Run units, `jobs` at a time; the names of those that failed or could not begin."""
    waiting, running, failed, mib = list(todo), list[Job](), list[str](), dict[str, float]()
    free = _free_mib()
    while waiting or running:
        undone = {unit.name for unit in waiting} | {job.unit.name for job in running}
        starting = units.ready(waiting, undone)[: jobs - len(running)]
        cores = max(1, processes.cores() // max(1, len(running) + len(starting)))
        for unit in starting:
            mib[unit.name] = mib.get(unit.name) or _mib(unit)
            left = min(_free_mib(), free - sum(mib[job.unit.name] for job in running))  # some have not taken theirs yet
            if running and left < mib[unit.name]:
                why = f"it may take {mib[unit.name]:.0f} MiB, {max(left, 0):.0f} are free"
                display.say_once(f"memory for {unit.name}", f"{unit.name} waits for memory: {why}")
                break
            waiting.remove(unit)
            running.append(Job(unit, cores))
            display.started(unit)
        time.sleep(PAUSE)
        for job in list(running):
            code, said = job.code(), job.said()
            display.looked(job.unit, dvc_forms.went(said), NOTES.findall(said))
            if code is None:
                continue
            running.remove(job)
            display.ended(job.unit, dvc_forms.went(said), well=code == 0)
            if code:
                skipped = _followers(job.unit, waiting)
                waiting = [unit for unit in waiting if unit not in skipped]
                failed += [unit.name for unit in (job.unit, *skipped)]
                display.failed(job.unit, dvc_forms.trouble(said, code), job.log, skipped)
                repair.mend_rwlock()
    return failed


def _followers(of: Unit, waiting: list[Unit]) -> list[Unit]:
    """Those that need a unit, also by way of others; each stands after what it needs."""
    names = {of.name}
    for unit in waiting:
        names |= {unit.name} if names.intersection(unit.needs) else set()
    return [unit for unit in waiting if unit.name in names]


def _mib(unit: Unit) -> float:
    """Memory that a unit may take, by what its stages took before."""
    known = [mib for name in unit.stages if "@" in name and (mib := clocks.expected(name, "peak_memory_mib"))]
    return max(known, default=LEAST_MIB)


def _free_mib() -> float:
    return float(psutil.virtual_memory().available / 2**20)


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m stages.sweep.engine", description=__doc__)
    parser.add_argument("--jobs", metavar="N", help="units at a time; default: as many as there are cores")
    parser.add_argument("--cell", metavar="NAME", help="make this cell alone, without the comparison")
    args = parser.parse_args(arguments)
    with in_one_line("repro"), _only_one():
        jobs = plan.default_jobs() if args.jobs is None else _positive(args.jobs)
        todo = plan.plan(jobs, args.cell)
        with Display(todo, jobs, estimates.seconds_of(todo, jobs, params.load())) as display:
            failed = run(todo, jobs, display)
        synced = mirror.sync(asked=True)
        if args.cell:
            plan.tell(args.cell)
        else:
            plan.table()
    if not synced:  # last, for what was said before has scrolled away
        print(f"MLflow is not up to date: {mirror.last_trouble()}. All results are in the files; `make sync` tries again.")
    return int(bool(failed))


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Hold this folder for one `make repro`. Raises UserError where another has it."""
    params.REPRO_LOCK.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(params.REPRO_LOCK, timeout=0):
            yield
    except Timeout:
        raise UserError("another `make repro` works in this folder; wait for it, or follow it in `make ui`") from None


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise UserError(f"JOBS = {text!r} is no number of units from 1 up; `make repro JOBS=2`")
    return int(text)


if __name__ == "__main__":
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    sys.exit(main(sys.argv[1:]))
