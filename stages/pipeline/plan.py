"""What a person at the keyboard asks beside `dvc repro`: what will run, what came out, what is left over, another profile.

python -m stages.pipeline.plan plan            the stages that will run, and about how long they take
python -m stages.pipeline.plan table           the finished cells of the sweep, and where their pictures are
python -m stages.pipeline.plan prune [--yes]   list, or remove, the files of cells that the sweep no longer names
python -m stages.pipeline.plan profile NAME    merge profiles/NAME.yaml into params.yaml
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
from filelock import FileLock, Timeout

from stages import UserError
from stages.pipeline import params, paths, reasons, results, sources, warm
from stages.pipeline.provenance import LOCK, Tree, git, lock_entries, refuse_conflict
from stages.pipeline.stage import damaged, in_one_line, whole_file

LOCK_STARTS = b"schema: '2.0'\nstages:\n"
PROFILES = Path("profiles")
PER_CELL = ("train", "sample", "evaluate")
PER_DATASET = ("fetch", "prepare", "extractor", "reference")


def plan() -> None:
    """Print the stages that are out of date or follow from one that is, why, and a time from what was last recorded."""
    loaded = params.load()  # a mistake in it is told here, in one line
    for dataset in loaded.sweep.datasets:
        sources.refuse_outputs(dataset, loaded.data[dataset])
    mend_rwlock()
    for line in sources.changed(loaded):
        print(line)
    asked = _status()
    if (asked.returncode and str(LOCK) in asked.stderr) or _is_empty(LOCK):
        asked = mend_lock()
    if busy := re.search(r"is busy.*PID (\d+)", asked.stderr, re.DOTALL):
        raise UserError(f"another `dvc repro` (process {busy[1]}) works in this folder; wait for it, or follow it in `make ui`")
    if asked.returncode:
        raise UserError(f"`dvc status` failed: {' '.join(asked.stderr.split())}")
    changed = json.loads(asked.stdout)
    stages = with_followers(set(changed))
    if not stages:
        print("Nothing to run: every result is up to date.")
        return
    counts = Counter(name.partition("@")[0] for name in stages)
    print(f"To run: {', '.join(f'{count} x {stage}' if count > 1 else stage for stage, count in counts.items())}")
    for line in reasons.lines(changed, Tree.read(), stages):
        print(line)
    known = [seconds for name in stages if (seconds := expected_seconds(name)) is not None]
    unknown = len(stages) - len(known) - counts["compare"]
    if known:
        print(f"About {max(1, round(sum(known) / 60))} min, going by metrics/timing", end="")
        print(f"; no estimate for {unknown} of the stages" if unknown else "")
    else:
        print("No estimate: metrics/timing records no such stage yet.")


def _status() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", "status", "--json"], capture_output=True, text=True)


def mend_rwlock() -> None:
    """Take out of DVC's list of who reads and writes what those who do so no longer; remove it where a kill cut it off.

    DVC itself asks only whether there is a process of that number, which may be another program by now.
    """
    file = Path(".dvc/tmp/rwlock")
    with contextlib.suppress(Timeout, FileNotFoundError), FileLock(file.with_name("rwlock.lock"), timeout=0):  # as DVC holds it
        written = file.stat().st_mtime
        try:
            write, read = _rwlock_entries(json.loads(file.read_bytes()))
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            file.unlink()
            print(f"A kill of DVC cut {file} off: removed", file=sys.stderr)
            return
        writers = {path: who for path, who in write.items() if _is_dvc(who["pid"], written)}
        readers = {path: [one for one in who if _is_dvc(one["pid"], written)] for path, who in read.items()}
        if writers != write or readers != read:
            with whole_file(file) as temporary:
                temporary.write_text(json.dumps({"write": writers, "read": {path: who for path, who in readers.items() if who}}))
            print(f"{file} named processes that are gone: taken out", file=sys.stderr)


def _rwlock_entries(listed: Any) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Who writes and who reads each path, in the form that DVC asks for. Raises ValueError, or the like, where it is another."""
    write, read = listed.get("write", {}), listed.get("read", {})
    lists = [who for who in read.values() if isinstance(who, list)]
    known = listed.keys() <= {"write", "read"} and len(lists) == len(read)
    if not known or not all(
        who.keys() == {"pid", "cmd"} and isinstance(who["pid"], int) and isinstance(who["cmd"], str)
        for who in [*write.values(), *itertools.chain(*lists)]
    ):
        raise ValueError("not as DVC writes it")
    return write, read


def _is_dvc(pid: int, since: float) -> bool:
    """Whether a process is a DVC that was there already at a time."""
    with contextlib.suppress(psutil.Error, ValueError, OverflowError):  # the latter two: no process has such a number
        process = psutil.Process(pid)
        return warm.is_alive(process) and process.create_time() <= since + 1 and "dvc" in " ".join(process.cmdline())
    return False


def mend_lock() -> subprocess.CompletedProcess[str]:
    """Give dvc.lock back what a kill or a full disk took from it while DVC wrote it. What DVC says of it then.

    What is whole of it stays; what is missing then comes from the last commit. What neither has, DVC finds in its run cache, by
    code, parameters and data. The file stays as it is where something else is wrong with it.
    """
    content = LOCK.read_bytes()
    refuse_conflict(content)
    if not _is_cut(content):
        raise damaged(LOCK, "it is not as DVC writes it")
    rest = lock_entries(content.decode(errors="surrogateescape").replace("\r\n", "\n"))
    if rest:
        rest.popitem()  # a last one that is cut may look whole
    entries = lock_entries(git("show", f"HEAD:./{LOCK}") or "") | {name: entry for name, entry in rest.items() if _is_whole(entry)}
    kept = "".join(entries.values()).encode()
    _write_bytes(LOCK, LOCK_STARTS + kept if kept else LOCK_STARTS.rstrip() + b" {}\n")
    asked = _status()
    if asked.returncode and str(LOCK) in asked.stderr:
        _write_bytes(LOCK, content)
    else:
        print(f"{LOCK} was cut off while DVC wrote it: mended from its rest and the last commit", file=sys.stderr)
    return asked


def _write_bytes(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def _is_cut(content: bytes) -> bool:
    """Whether a dvc.lock begins as DVC writes it, or holds nothing, or zeros: a crash may leave these."""
    start = content.replace(b"\r\n", b"\n")[: len(LOCK_STARTS)]
    return b"\0" in content or not content.strip() or LOCK_STARTS.startswith(start)


def _is_whole(entry: str) -> bool:
    """Whether an entry of dvc.lock is of the form that DVC writes."""
    with contextlib.suppress(UserError, ValueError, LookupError, AttributeError, TypeError):
        ((_, stage),) = params.parse_yaml(entry, LOCK).items()
        files = [*stage.get("deps", []), *stage.get("outs", [])]
        return bool(stage["cmd"]) and all(file["path"] and file["md5"] for file in files)
    return False


def _is_empty(file: Path) -> bool:
    return file.exists() and not file.read_bytes().strip(b"\0 \n")


def with_followers(changed: set[str]) -> list[str]:
    """The changed stages and all that follow from them, in the order of dvc.yaml: what will run unless an output stays the same."""
    stages, loaded = params.read_yaml(Path("dvc.yaml"))["stages"], params.load()
    cells, values = list(loaded.sweep.cells()), loaded.model_dump()
    names = {name: [str(cell) for cell in cells] if name in PER_CELL else {cell.dataset for cell in cells} for name in stages}
    found: list[str] = []
    made: list[str] = []  # outputs of the stages found so far
    for name, stage in stages.items():
        for item in sorted(names[name]) if "matrix" in stage else [""]:
            full = f"{name}@{item}" if item else name
            deps = paths.deps(stage, item, values)
            if full in changed or any(_overlap(dep, out) for dep in deps for out in made):
                found.append(full)
                made += [paths.of_item(out, item) for out in paths.outs(stage)]
    return found


def expected_seconds(name: str) -> float | None:
    """What a stage took when last recorded; else the mean of the same stage on the same dataset, else on any; else None."""
    stage, _, item = name.partition("@")
    dataset = item.partition("-")[0]
    for pattern in (item, f"{dataset}-*", "*"):
        found = [results.timing(stage, path.stem) for path in sorted(paths.timing(stage, "x").parent.glob(f"{pattern}.json"))]
        seconds = [timing["seconds"] for timing in found if "seconds" in timing]
        if seconds:
            return mean(seconds)
    return None


def table() -> None:
    """Print the cells whose results are of what is here now; never fails because one is not."""
    tree = Tree.read()
    cells = list(tree.params.sweep.cells())
    finished = [cell for cell in cells if tree.is_recorded(cell)]
    if finished:
        print(results.table(results.row(cell) for cell in finished))
    if missing := [str(cell) for cell in cells if cell not in finished]:
        print(f"Without results of the present code, parameters and data: {', '.join(missing)}")
        print("metrics/report.md and metrics/figures are of an earlier run, if they are there.")
    elif finished:
        print(f"Pictures: metrics/report.md, metrics/figures/, {paths.samples('CELL')}/grid.png and denoising.gif")


def prune(really: bool) -> None:
    """List the files of cells and datasets that params.yaml no longer names; remove them when told to."""
    found = leftovers(params.load())
    for path in found:
        print(f"{'removed' if really else 'left over:'} {path}")
        if really:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not found:
        print("Nothing is left over.")
    elif not really:
        print("`make prune YES=1` removes them; DVC's cache keeps what it has until `dvc gc`.")


def leftovers(loaded: params.Params) -> list[Path]:
    """Files and folders under metrics, models and samples that belong to no cell of the sweep and to no dataset in it.

    Also the state of trainings that a kill broke off and nobody went on with.
    """
    cells = {str(cell) for cell in loaded.sweep.cells()}
    datasets = set(loaded.sweep.datasets)
    folders: dict[Path, set[str]] = {paths.weights("x").parent: cells, paths.samples("x").parent: cells}
    folders |= {paths.loss_curve("x").parent: cells, paths.scores("evaluate", "x").parent: cells}
    folders |= {paths.timing(stage, "x").parent: cells for stage in PER_CELL}
    folders |= {paths.timing(stage, "x").parent: datasets for stage in PER_DATASET}
    folders |= {paths.scores(stage, "x").parent: datasets for stage in ("extractor", "reference")}
    folders |= {make("x").parent: datasets for make in (paths.extractor, paths.reference)}
    unfinished = sorted([*Path(".state/checkpoints").glob("*"), *Path(".state/scratch").glob("*")])
    abandoned = [path for path in unfinished if not _is_held(Path(".state/locks", f"{path.name}.lock"))]
    return abandoned + [
        path for folder, names in folders.items() for path in sorted(folder.glob("[!.]*")) if _name(path) not in names
    ]


def profile(name: str) -> None:
    """Merge a profile into params.yaml, whole or not at all."""
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if name not in known:
        raise UserError(f"there is no profile {name!r}; there are: {', '.join(known)}")
    text = params.merged(path := known[name])
    with whole_file(params.PARAMS) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{params.PARAMS} now holds {path}. `git diff {params.PARAMS}` shows it, `git checkout {params.PARAMS}` undoes it.")


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one lies inside the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.plan", description=__doc__)
    commands: Any = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plan")
    commands.add_parser("table")
    commands.add_parser("prune").add_argument("--yes", action="store_true")
    commands.add_parser("profile").add_argument("name")
    args = parser.parse_args()
    with in_one_line(args.command):
        if args.command == "prune":
            prune(args.yes)
        elif args.command == "profile":
            profile(args.name)
        else:
            {"plan": plan, "table": table}[args.command]()


if __name__ == "__main__":
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    main()
