"""Kill `make repro` of a small pipeline at every place and in every way; see that it stops, goes on, and ends as if never broken.

A round begins with nothing made, kills `make repro` one to three times, and lets the next one end, all with one unit at a time or
with two. After every kill nothing may run on. At the end of a round every result has the bits of the run that was never broken and
ran one unit at a time, MLflow holds one finished run of each cell with each step once, and nothing unfinished is left over.

Prints one JSON line. Run: python benchmarks/kills.py [--kills 50] [--seed 0] [--folder EMPTY_FOLDER] [--summary FILE]
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.pipeline.processes import is_alive  # noqa: E402

CELL = "persian_glyphs-cosine-8-0"
PROFILE = """\
sweep: {datasets: [persian_glyphs], schedules: [cosine], timesteps: [8], seeds: [0]}
data:
  persian_glyphs: {size: 16, train_images: 192, validation_images: 256, test_images: 64}
extractor: {images: 1024, batch: 32}
network: {channel_mult: [1, 2]}
train: {images: 2400, longer: {persian_glyphs: 1}, batch: 16, warmup_images: 32, validation_images: 32, curve_points: 8}
sample: {images: 192, ancestral_images: 8, chunk: 32, fast: {steps: 4}}
evaluate: {images: 32, draws: 2, min_scored: 32}
runtime: {checkpoint_seconds: 0.3}
"""
CELLS = [f"persian_glyphs-{schedule}-8-0" for schedule in ("cosine", "sigmoid")]
TWO_CELLS = PROFILE.replace("schedules: [cosine]", "schedules: [cosine, sigmoid]")
MADE = ("data", "models", "samples", "metrics")  # what must not depend on kills

STAGES = ("fetch", "prepare", "extractor", "reference", "train", "sample", "evaluate", "compare")
PLACES = (  # of a run: before DVC, a DVC before its first stage, while MLflow's database is made, a stage, after one, after DVC
    "plan", "start", *STAGES[:4], "MLflow", *STAGES[4:], "between", "sync",
)  # fmt: skip
CHAIN = ("group", "make", "runner", "warm", "engine", "dvc", "shell", "asker", "stage")  # who is killed; each has started the next
ABOVE = CHAIN[:5]  # whose end is the end of all
WAYS = [
    (whom, how)
    for whom, signals in {
        "group": ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"),  # Ctrl-C, and a terminal that is closed
        "make": ("SIGTERM", "SIGKILL"),  # make itself waits for the recipe at any other
        "runner": ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"),
        "warm": ("SIGTERM", "SIGKILL"),
        "engine": ("SIGTERM", "SIGKILL"),
        "dvc": ("SIGTERM", "SIGKILL"),
        "shell": ("SIGTERM", "SIGKILL"),
        "asker": ("SIGTERM", "SIGKILL"),
        "stage": ("SIGINT", "SIGTERM", "SIGKILL"),
    }.items()
    for how in signals
]
ASKED, KILLED = 3, 10  # seconds to end for those who were asked in good order, and for those whom a SIGKILL leaves behind
PATIENCE = 600  # seconds for a `make repro` to end by itself


class Kill(NamedTuple):
    """Where, after which stage (for "between" alone), whom, with what."""

    place: str
    stage: str
    whom: str
    how: str


def environment() -> dict[str, str]:
    """That of a user, on one thread, so that the harness can share a small machine."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MAKE", "MLFLOW_", "GIT_", "NAQSH_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_CONFIG_GLOBAL": os.devnull}
    return kept | quiet | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}


def call(folder: Path, *command: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command there as a user would. Raises AssertionError, with its output, where it does not end with that code.

    `more`: of the environment.
    """
    done = subprocess.run(command, cwd=folder, env=environment() | more, capture_output=True, text=True)
    if done.returncode != code:
        raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def copy_tree(folder: Path, profile: str) -> None:
    """A copy of the working tree without its results, with a profile merged, in a repository of its own, committed."""
    listed = call(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "profiles/small.yaml").write_text(profile)
    call(folder, sys.executable, "-m", "stages.sweep.plan", "profile", "small")
    call(folder, "git", "init", "-q")
    commit(folder, "Start")


def commit(folder: Path, message: str) -> None:
    call(folder, "git", "add", "-A")
    call(folder, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--allow-empty", "-qm", message)


class Seen(NamedTuple):
    """A process: its name in CHAIN, itself, and the log of its unit; no log for those above all units."""

    role: str
    process: psutil.Process
    log: str = ""


class Pipeline:
    """A copy of the working tree with two small cells, made once without a kill. Beside it: outputs, and files of no name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary, self.outputs = folder.with_name(f"{folder.name}-tmp"), folder.with_name(f"{folder.name}-outputs")
        for beside in (self.temporary, self.outputs):
            beside.mkdir(parents=True)
        self.shell = self.temporary / "shell"  # some shells wait for their last command; this one shall
        self.shell.write_text('#!/bin/sh\n/bin/sh "$@"\nexit $?\n')
        self.shell.chmod(0o755)
        copy_tree(folder, TWO_CELLS)
        self.seconds, self.lasts = self._unbroken()
        self.unbroken = self.digests()

    def _unbroken(self) -> tuple[float, dict[str, float]]:
        """Seconds of a run without a kill, and of each place in it; of a stage also those in which it is a process already."""
        lasts, times, began = Counter[str](), Counter[str](), time.monotonic()
        before, then = set[str](), began
        with Run(self, jobs=1) as run:
            while run.shell.poll() is None:
                places, now = run.look(), time.monotonic()
                keys = {place for place, _ in places.values()}
                keys |= {f"{place} in its fork" for log, (place, _) in places.items() if run.who("stage", log)}
                for key in keys:
                    lasts[key] += now - then
                times.update(keys - before)
                before, then = keys, now
                time.sleep(0.05)
        if run.shell.returncode:
            raise AssertionError(run.output.read_text())
        return then - began, {key: seconds / times[key] for key, seconds in lasts.items()}

    def digests(self) -> dict[str, str]:
        """SHA-256 of every result file."""
        files = [path for name in MADE for path in sorted((self.folder / name).rglob("*")) if path.is_file()]
        names = {str(path.relative_to(self.folder)): path for path in files}
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in names.items()}

    def forget(self) -> None:
        """Undo all that was made, in DVC's memory and in MLflow too."""
        call(self.folder, "git", "clean", "-fdxq", "-e", "__pycache__")

    def processes(self) -> list[Seen]:
        """Who runs here or was started from here, oldest first; "other" are those that have no name in CHAIN."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                here = Path(process.cwd()).is_relative_to(self.folder)
                if here or process.environ().get("TMPDIR") == str(self.temporary):
                    output = str(Path(f"/proc/{process.pid}/fd/1").readlink())
                    found.append(Seen(_role(process), process, output if output.endswith(".log") else ""))
        return found

    def killed_run(self, kill: Kill, part: float, jobs: int) -> dict[str, Any]:
        """What came of a `make repro` that was killed after a part of the time that a place lasts; no `hit` where nobody was."""
        about: dict[str, Any] = {"kill": " ".join(filter(None, kill)), "jobs": jobs, "faults": []}
        lasts = self.lasts.get(f"{kill.place} in its fork" if kill.whom == "stage" else kill.place, 0)
        with Run(self, jobs) as run:
            about["output"] = run.output.name
            if (log := run.wait_for(kill, part * lasts)) is not None and (doomed := run.fire(kill, log)) is not None:
                about |= {"hit": run.hit, "seconds": _outlasts(doomed, limit := _limit(kill))}
                if about["seconds"] is None:
                    about["faults"].append(f"run on {limit} s after it: {_told(doomed)}")
            about["faults"] += run.end()
        return about

    def left(self, seconds: float) -> list[str]:
        """Who still runs here after so many seconds."""
        until = time.monotonic() + seconds
        while (found := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        return [f"still running: {told}" for told in _told(found)]

    def finish(self, jobs: int) -> list[str]:
        """Let a `make repro` end; what is not as after an unbroken run."""
        with Run(self, jobs) as run:
            faults = run.end()
        if run.shell.returncode:
            return [*faults, f"make repro ended with {run.shell.returncode}: {run.output.name}"]
        return faults + self.faults()

    def faults(self) -> list[str]:
        """What in the files, in DVC and in MLflow is not as after an unbroken run."""
        digests = self.digests()
        found = [f"differs: {name}" for name, digest in digests.items() if self.unbroken.get(name) != digest]
        found += [f"missing: {name}" for name in self.unbroken.keys() - digests.keys()]
        for pattern in ("**/*.partial*", "**/.*.files", ".state/checkpoints/*", ".state/scratch/*", "mlflow.db.broken*"):
            found += [f"left over: {path.relative_to(self.folder)}" for path in self.folder.glob(pattern)]
        found += [f"left over: {path}" for path in self.temporary.glob("naqsh-*")]
        if (status := call(self.folder, "dvc", "status", "--json").stdout.strip()) != "{}":
            found.append(f"dvc status: {status}")
        return found + self._faults_in_mlflow() + self.left(0)

    def _faults_in_mlflow(self) -> list[str]:
        found = []
        with contextlib.closing(sqlite3.connect(self.folder / "mlflow.db")) as database:
            runs = database.execute("select name, status, lifecycle_stage from runs order by name").fetchall()
            if runs != [(cell, "FINISHED", "active") for cell in CELLS]:
                found.append(f"runs: {runs}")
            for cell, name in itertools.product(CELLS, ("train_loss", "images_per_sec")):
                rows = (self.folder / "metrics/train" / f"{cell.replace('-8-', '-')}.csv").read_text().splitlines()[1:]
                select = "select step from metrics join runs using (run_uuid) where key = ? and runs.name = ? order by step"
                steps = [step for (step,) in database.execute(select, [name, cell])]
                if steps != [int(row.split(",")[0]) for row in rows]:
                    found.append(f"steps of {name} of {cell}: {steps}")
        return found


class Run:
    """A `make repro` below a shell, as a terminal has it. Its output goes to a file."""

    def __init__(self, pipeline: Pipeline, jobs: int) -> None:
        self._pipeline, self._began, self._compared, self._seen = pipeline, False, False, set[tuple[str, int]]()
        self._running: list[Seen] = []  # when `look` looked last
        self.hit = ""  # where the run was when it was killed
        self.output = pipeline.outputs / f"{len(list(pipeline.outputs.iterdir())):03}.txt"
        with self.output.open("wb") as file:
            self.shell = subprocess.Popen(
                (
                    "sh",
                    "-c",
                    'make -s -o "$0/.installed" repro VENV="$0" JOBS="$1"; exit $?',
                    sys.prefix,
                    str(jobs),
                ),  # -o: it installs nothing
                cwd=pipeline.folder,
                env=environment() | {"TMPDIR": str(pipeline.temporary), "SHELL": str(pipeline.shell)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_as_in_a_terminal,
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nobody behind, also where the harness is stopped."""
        for seen in self._pipeline.processes():
            with contextlib.suppress(psutil.Error):
                seen.process.kill()
        self.shell.wait()

    def look(self) -> dict[str, tuple[str, str]]:
        """Of each unit that runs, by its log, the place and the stage that DVC began last; "" is the run, where none does."""
        self._running = self._pipeline.processes()
        logs = {log: self._place(log) for log in {seen.log for seen in self._running if seen.role == "dvc"} - {""}}
        self._began |= bool(logs)
        self._compared |= any(stage == "compare" for _, stage in logs.values())
        return logs or {"": ("plan" if not self._began else "sync" if self._compared else "next", "")}

    def _place(self, log: str) -> tuple[str, str]:
        """The place of one unit, and its stage."""
        begun = re.findall(r"^Running stage '(\w+)", Path(log).read_text(errors="replace"), re.MULTILINE)
        if not begun:
            return "start", ""
        if self.who("asker", log):
            self._seen.add((log, len(begun)))
        elif (log, len(begun)) in self._seen:
            return "between", begun[-1]
        made = begun[-1] == "train" and (self._pipeline.folder / "mlflow.db.partial").exists()
        return "MLflow" if made else begun[-1], begun[-1]

    def who(self, whom: str, log: str) -> list[Seen]:
        """Who of that name was there when `look` looked last: of a unit, or above all."""
        return [seen for seen in self._running if seen.role == whom and (whom in ABOVE or seen.log == log)]

    def wait_for(self, kill: Kill, seconds: float) -> str | None:
        """Wait until whom to kill has been at a place for so many seconds, or leaves it; the log of its unit.

        None where the run ends before.
        """
        until = dict[str, float]()
        while self.shell.poll() is None:
            places = self.look()
            for log, (place, stage) in places.items():
                at = place == kill.place and (place != "between" or stage == kill.stage)
                if at and log not in until and self._is_there(kill, log):
                    until[log] = time.monotonic() + seconds
            for log, then in until.items():
                if (places.get(log, ("", ""))[0] != kill.place or time.monotonic() >= then) and self._is_there(kill, log):
                    return log
            time.sleep(0.05)  # each look takes 10 ms
        return None

    def _is_there(self, kill: Kill, log: str) -> bool:
        return kill.whom == "group" or bool(self.who(kill.whom, log))

    def fire(self, kill: Kill, log: str) -> list[Seen] | None:
        """Kill, and tell who must end with it; None where whom to kill is gone."""
        number = signal.Signals[kill.how]
        self.hit = self.look().get(log, ("between", ""))[0]
        self.hit = "between" if self.hit == "next" else self.hit
        try:
            if kill.whom == "group":
                os.killpg(self.shell.pid, number)
            else:
                self.who(kill.whom, log)[0].process.send_signal(number)
        except (IndexError, ProcessLookupError, psutil.NoSuchProcess):
            return None
        if kill.whom in ABOVE:
            return self._running
        below = CHAIN[CHAIN.index(kill.whom) :]  # of its own unit: others go on
        return [seen for seen in self._running if seen.role in below and seen.log == log]

    def end(self) -> list[str]:
        """Let the run end by itself; the faults that it has not, or left somebody behind."""
        try:
            self.shell.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return [f"no end after {PATIENCE} s: {self.output.name}", *self._pipeline.left(0)]
        return self._pipeline.left(KILLED)


def _as_in_a_terminal() -> None:
    """Who runs in the background of a script, as CI does, has some signals ignored; who starts there inherits that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _role(process: psutil.Process) -> str:
    """The name in CHAIN of a process."""
    command = " ".join(process.cmdline())
    if "stages.sweep.warm" in command:
        above = process.parent()
        return "stage" if above and "stages.sweep.warm" in " ".join(above.cmdline()) else "warm"
    if process.name() == "make":
        return "make"
    signs = {"stages.sweep.runner": "runner", "stages.sweep.engine": "engine", "-m dvc --wait-for-lock repro": "dvc"}
    signs |= {"-c python -m stages.": "shell", "-m stages.": "asker"}
    return next((role for sign, role in signs.items() if sign in command), "other")


def _limit(kill: Kill) -> int:
    return ASKED if kill.whom in CHAIN[:3] and kill.how != "SIGKILL" else KILLED


def _outlasts(doomed: list[Seen], seconds: float) -> float | None:
    """The seconds until the last of them has ended; None where it takes longer than that."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if not any(is_alive(seen.process) for seen in doomed):
            return passed
        time.sleep(0.02)
    return None


def _told(processes: list[Seen]) -> list[str]:
    """Those that run, in words."""
    found = []
    for role, process, _ in processes:
        with contextlib.suppress(psutil.Error):
            if is_alive(process):
                found.append(f"{role} {' '.join(process.cmdline())}")
    return found


def drawn(rng: random.Random) -> Iterator[Kill]:
    """Kills without end: every place once before any comes again, and ways likewise, as far as they suit the place."""
    ways: list[tuple[str, str]] = []
    while True:
        for place in rng.sample(PLACES, len(PLACES)):
            there = CHAIN[: {"plan": 5, "sync": 5, "start": 6, "between": 6}.get(place, len(CHAIN))]  # who runs at that place
            if not any(whom in there for whom, _ in ways):
                ways += rng.sample(WAYS, len(WAYS))
            way = next(way for way in ways if way[0] in there)
            ways.remove(way)
            yield Kill(place, rng.choice(STAGES) if place == "between" else "", *way)


def in_order(kills: list[Kill], rng: random.Random) -> list[Kill]:
    """As they can follow each other in a round, where what was made stays; every run has a plan and a start."""

    def position(kill: Kill) -> float:
        if kill.place in ("plan", "start"):
            return rng.uniform(0, len(PLACES))
        return PLACES.index(kill.stage) + 0.5 if kill.stage else PLACES.index(kill.place)

    return sorted(kills, key=position)


def soak(pipeline: Pipeline, kills: int, seed: int, told: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Rounds of one to three kills, each followed by a `make repro` that may end; stops at the first round with a fault.

    `told` hears the summary after every round, so that what is known survives a stop.
    """
    rng = random.Random(seed)
    deck, done, missed, rounds, faults, history = drawn(rng), [], 0, 0, [], []

    def summary() -> dict[str, Any]:
        places, ways = Counter(about["hit"] for about, _ in done), Counter((kill.whom, kill.how) for _, kill in done)
        return {
            "kills": len(done),
            "rounds": rounds,
            "places": {place: places[place] for place in PLACES},
            "ways": {f"{how} of {whom}": ways[whom, how] for whom, how in WAYS},
            "with two at a time": sum(about["jobs"] == 2 for about, _ in done),
            "faults": faults,
            **({"history": history, "folder": str(pipeline.folder), "outputs": str(pipeline.outputs)} if faults else {}),
            "slowest_end_seconds": round(max((about["seconds"] or 0 for about, _ in done), default=0), 1),
        }

    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while len(done) < kills and not faults:
            pipeline.forget()
            history, rounds, jobs = [], rounds + 1, rng.choice((1, 2))
            for kill in in_order(list(itertools.islice(deck, min(rng.randint(1, 3), kills - len(done)))), rng):
                history.append(pipeline.killed_run(kill, rng.random(), jobs))
                if "hit" in history[-1]:
                    done.append((history[-1], kill))
                    bar.update()
                else:  # the place was passed before: it comes in another round
                    deck, missed = itertools.chain([kill], deck), missed + 1
                if history[-1]["faults"]:
                    break
            faults = [fault for about in history for fault in about["faults"]] or pipeline.finish(jobs)
            if missed > 3 + kills // 4:
                faults.append(f"{missed} kills found their place passed")
            told(summary())
    return summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; without it, all is removed unless there is a fault")
    parser.add_argument("--summary", type=Path, help="a file to write the JSON to, after every round")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = args.folder or Path(tempfile.mkdtemp())
    started = time.perf_counter()
    pipeline = Pipeline((folder / "naqsh").resolve())
    result: dict[str, Any] = {}

    def told(summary: dict[str, Any]) -> None:
        result.update({"seed": args.seed, **summary, "unbroken_seconds": round(pipeline.seconds)})
        result["seconds"] = round(time.perf_counter() - started)
        if args.summary:
            args.summary.write_text(json.dumps(result, indent=2) + "\n")

    soak(pipeline, args.kills, args.seed, told)
    print(json.dumps(result))
    if not args.folder and not result["faults"]:
        shutil.rmtree(folder)
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
