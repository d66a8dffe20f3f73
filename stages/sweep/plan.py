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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.errors import UserError, in_one_line
from stages.pipeline import dvc_forms, graph, params, paths, processes, sources
from stages.pipeline.files import is_held, read_json
from stages.sweep import committed, estimates, reasons, repair, units
from stages.sweep.units import Unit
from stages.tracking import results
from stages.tracking.provenance import Tree

PROFILES = Path("profiles")
# Where stages alone write, in this version or an earlier one: a person's own files lie elsewhere.
SCORED = ("evaluate", "extractor", "figures", "reference", "timing", "train")
WRITTEN = [Path("models"), Path("samples"), *(Path("metrics", name) for name in SCORED)]


def plan(jobs: int, cell: str | None = None) -> list[Unit]:
    """Print what is out of date or follows from what is, why, and a time from what was last recorded. The units to run.

    Args:
        jobs: how many units run at a time.
        cell: the only one that is wanted; without it all, and their comparison.
    """
    loaded = params.load()  # a mistake in it is told here, in one line
    every = units.units(loaded, stages := dvc_forms.stages())
    if cell is not None:
        every = units.leading_to(str(params.find_cell(loaded, cell)), every)
    for dataset in loaded.sweep.datasets:
        sources.refuse_outputs(dataset, loaded.data[dataset])
    for unit in every:
        if (dataset := unit.name.removeprefix("data@")) in loaded.data:
            sources.refuse_missing(dataset, loaded.data[dataset])
    sources.refuse_missing_weights(loaded)
    repair.mend_rwlock()
    for line in sources.changed(loaded):
        print(line)
    changed = _changed()
    affected = with_followers(set(changed), graph.needs(stages, loaded))
    todo = units.one_training_first(units.only(affected, every), loaded)
    names = [name for name in affected if any(name in unit.stages for unit in todo)]
    if not todo:
        print(
            "Nothing to run: every result is up to date." if cell is None else f"Nothing to run: {cell} is up to date.", flush=True
        )
        return []
    counts = Counter(name.partition("@")[0] for name in names)
    print(f"To run: {', '.join(f'{count} x {stage}' if count > 1 else stage for stage, count in counts.items())}")
    for line in reasons.lines(changed, Tree.read(), names):
        print(line)
    print(estimates.outlook(todo, jobs, estimates.seconds_of(todo, jobs, loaded)), flush=True)
    return todo


def _changed() -> dict[str, list[Any]]:
    """What `dvc status` says, after what a kill broke is mended."""
    asked = dvc_forms.status()
    if repair.needs_mending(asked):
        asked = repair.mend_lock()
    if busy := re.search(r"is busy.*PID (\d+)", asked.stderr, re.DOTALL):
        raise UserError(f"another `dvc repro` (process {busy[1]}) works in this folder; wait for it, or follow it in `make ui`")
    if asked.returncode:
        raise UserError(f"`dvc status` failed: {' '.join(asked.stderr.split())}")
    return dict(json.loads(asked.stdout))


def default_jobs() -> int:
    """How many units run at a time: as many as there are cores; one where there is a GPU, which they would share."""
    return 1 if processes.has_gpu() else processes.cores()


def with_followers(changed: set[str], needs: dict[str, list[str]]) -> list[str]:
    """The changed stages and all that follow from them: what will run unless an output stays the same.

    `needs`: all stages, in order, each with those that it reads from.
    """
    found: dict[str, None] = {}
    for name, others in needs.items():
        if name in changed or any(other in found for other in others):
            found[name] = None
    return list(found)


def table() -> None:
    """Print the cells whose results are of what is here now; never fails because one is not."""
    tree = Tree.read()
    cells = list(tree.params.sweep.cells())
    finished = [cell for cell in cells if tree.is_recorded(cell)]
    if finished:
        print(results.table(results.row(cell) | results.clocks(tree, cell)[0] for cell in finished))
        for line in results.why_missing(finished):
            print(line)
    if missing := [str(cell) for cell in cells if cell not in finished]:
        print(f"Without results of the present code, parameters and data: {', '.join(missing)}")
        print("metrics/report.md and metrics/figures are of an earlier run, if they are there.")
    elif finished:
        print(f"Pictures: metrics/report.md, metrics/figures/, {paths.samples('CELL')}/grid.png and denoising.gif")
        for line in committed.lines(tree, finished):
            print(line)


def score(cell: str) -> str:
    """The headline scores of a cell whose files are whole; what is wrong with them where they are not."""
    try:
        found = params.find_cell(params.load(), cell)
        row, missing = results.row(found), results.not_measured(found)
    except UserError as mistake:
        return str(mistake)
    if "fid" in row:
        floor = f"floor {row['fid_floor']:.3g}" if "fid_floor" in row else f"no floor: {missing.get('fid_floor', 'not measured')}"
        return f"FID {row['fid']:.3g} ± {row['fid_error']:.2g} ({floor})"
    others = [f"{name} {row[name]:.1%} ± {row[f'{name}_error']:.1%}" for name in ("accuracy", "precision", "recall") if name in row]
    return ", ".join([*others, f"no FID: {missing.get('fid', 'it was not measured')}"])


def tell(cell: str) -> None:
    """Print the score of one cell, what it means, where its picture is, and what to type next.

    If its results are of what is here now.
    """
    tree = Tree.read()
    if not tree.is_recorded(found := params.find_cell(tree.params, cell)):
        print(f"Without results of the present code, parameters and data: {cell}", flush=True)
        return
    lines = (f"{cell}  {score(cell)}", _meaning(results.row(found)), f"Picture: {paths.samples(cell) / 'grid.png'}")
    print("\n".join(filter(None, lines)), flush=True)
    for line in committed.lines(tree, [found]):
        print(line)
    print("Next:")
    cells = len(list(tree.params.sweep.cells()))
    for command, what in (
        (f"make draw CELL={cell}", "draws pictures with its network"),
        ("make repro", f"makes all {cells} cells of the sweep and compares them"),
        ("make ui", "shows the runs in MLflow"),
    ):
        print(f"  {command:<{len(cell) + 15}}  {what}", flush=True)


def _meaning(row: dict[str, Any]) -> str:
    """What the scores of a cell mean, in a sentence or two."""
    said = []
    if "fid" in row:
        floor = f"; as many real images have {row['fid_floor']:.3g}, the floor" if "fid_floor" in row else ""
        said.append(f"FID is how far {row['images']:,} drawn images are from the real test images, lower is better{floor}.")
    if "accuracy" in row:
        real = f", and {row['accuracy_floor']:.1%} of real ones" if "accuracy_floor" in row else ""
        has_classes = len(read_json(paths.prepared(row["dataset"]) / "dataset.json")["class_names"]) > 1
        verb, how = ("recognises", "as what was asked for") if has_classes else ("sees", "upright")
        said.append(f"A classifier {verb} {row['accuracy']:.1%} of the drawn images {how}{real}.")
    return " ".join(said)


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
    """What lies where stages write, and is written by no stage of the sweep: of other cells and datasets, of earlier versions.

    Also the state of trainings that a kill broke off and nobody went on with. A folder stands for all in it.
    """
    unfinished = sorted([*Path(".state/checkpoints").glob("*"), *Path(".state/scratch").glob("*")])
    abandoned = [path for path in unfinished if not is_held(Path(".state/locks", f"{path.name}.lock"))]
    written = {Path(out) for out in dvc_forms.outputs(loaded)}
    written |= {folder for out in written for folder in out.parents}
    return abandoned + [path for folder in WRITTEN for path in _strangers(folder, written)]


def _strangers(folder: Path, known: set[Path]) -> Iterator[Path]:
    """What lies in a folder, at any depth, and is not known; of folders that hold nothing known, the uppermost."""
    for path in sorted(folder.glob("[!.]*")):
        if path not in known:
            yield path
        elif path.is_dir():
            yield from _strangers(path, known)


def profile(name: str) -> None:
    """Merge a profile into params.yaml, whole or not at all."""
    known = {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}
    if name not in known:
        raise UserError(f"there is no profile {name!r}; there are: {', '.join(known)}")
    text = params.merged(path := known[name])
    edits = "" if params.is_committed() else ", and takes back the edits that were there before"
    params.write(text)
    print(
        f"{params.PARAMS} now holds {path}. `git diff {params.PARAMS}` shows it, `git checkout {params.PARAMS}` undoes it{edits}."
    )


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
            {"plan": lambda: plan(default_jobs()), "table": table}[args.command]()


if __name__ == "__main__":
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    main()
