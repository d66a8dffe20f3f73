"""What a person at the keyboard asks beside `dvc repro`: what will run, what came out, what is left over, another profile.

python -m stages.sweep.plan plan            the stages that will run, and about how long they take
python -m stages.sweep.plan table           the finished cells of the sweep, and where their pictures are
python -m stages.sweep.plan prune [--yes]   list, or remove, the files of cells that the sweep no longer names
python -m stages.sweep.plan profile NAME    merge profiles/NAME.yaml into params.yaml
"""

import argparse
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.errors import UserError, in_one_line
from stages.pipeline import clocks, dvc_forms, params, paths, sources
from stages.pipeline.files import whole_file
from stages.sweep import committed, reasons, repair
from stages.tracking import results
from stages.tracking.provenance import Tree

PROFILES = Path("profiles")


def plan() -> None:
    """Print the stages that are out of date or follow from one that is, why, and a time from what was last recorded."""
    loaded = params.load()  # a mistake in it is told here, in one line
    for dataset in loaded.sweep.datasets:
        sources.refuse_outputs(dataset, loaded.data[dataset])
    repair.mend_rwlock()
    for line in sources.changed(loaded):
        print(line)
    asked = dvc_forms.status()
    if repair.needs_mending(asked):
        asked = repair.mend_lock()
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
    known = [seconds for name in stages if (seconds := clocks.expected_seconds(*name.split("@"))) is not None]
    unknown = len(stages) - len(known) - counts["compare"]
    if known:
        print(f"About {max(1, round(sum(known) / 60))} min, going by what was measured here", end="")
        print(f"; no estimate for {unknown} of the stages" if unknown else "")
    else:
        print("No estimate: no such stage was run here yet.")


def with_followers(changed: set[str]) -> list[str]:
    """The changed stages and all that follow from them, in the order of dvc.yaml: what will run unless an output stays the same."""
    stages, loaded = dvc_forms.stages(), params.load()
    values = loaded.model_dump()
    names = {name: {paths.item_of(stage, str(cell)) for cell in loaded.sweep.cells()} for name, stage in stages.items()}
    found: list[str] = []
    made: list[str] = []  # outputs of the stages found so far
    for name, stage in stages.items():
        for item in sorted(names[name]):
            full = f"{name}@{item}" if item else name
            deps = paths.deps(stage, item, values)
            if full in changed or any(_overlap(dep, out) for dep in deps for out in made):
                found.append(full)
                made += [paths.of_item(out, item) for out in paths.outs(stage)]
    return found


def table() -> None:
    """Print the cells whose results are of what is here now; never fails because one is not."""
    tree = Tree.read()
    cells = list(tree.params.sweep.cells())
    finished = [cell for cell in cells if tree.is_recorded(cell)]
    if finished:
        print(results.table(results.row(cell) | results.clocks(tree, cell)[0] for cell in finished))
    if missing := [str(cell) for cell in cells if cell not in finished]:
        print(f"Without results of the present code, parameters and data: {', '.join(missing)}")
        print("metrics/report.md and metrics/figures are of an earlier run, if they are there.")
    elif finished:
        for line in committed.lines(tree, finished):
            print(line)
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
    cells, datasets = {str(cell) for cell in loaded.sweep.cells()}, set(loaded.sweep.datasets)
    trainings = {str(training) for training in loaded.sweep.trainings()}
    folders: dict[Path, set[str]] = {paths.samples("x").parent: cells, paths.scores("evaluate", "x").parent: cells}
    folders |= {paths.weights("x").parent: trainings, paths.loss_curve("x").parent: trainings}
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
    parser = argparse.ArgumentParser(prog="python -m stages.sweep.plan", description=__doc__)
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
