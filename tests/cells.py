"""The files of a cell, made up, and what MLflow holds of them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.pipeline import dvc_forms, grids, paths
from stages.pipeline.files import md5, write_archive
from stages.pipeline.params import Cell
from stages.tracking import mirror, provenance
from stages.tracking.live import Followed

if TYPE_CHECKING:
    from mlflow.entities import Run

ROOT = Path(__file__).parents[1]
CELL, OTHER = Cell("mnist", "cosine", 200, 0), Cell("mnist", "linear", 200, 0)


def record(cell: Cell, *, last: str) -> None:
    """Write what dvc.lock says of a cell once its stages are run, from the first to the last; folders have a made-up digest."""
    from dvc.utils.serialize import dump_yaml

    entries, made = {}, {}
    tree = provenance.Tree.read()
    values = tree.params.model_dump()
    for name, stage in tree.stages.items():
        outs = paths.outs(stage)
        entry = {"cmd": "", "deps": [], "params": {"params.yaml": dvc_forms.params_of(stage, cell, tree.params)}, "outs": []}
        for path in paths.deps(stage, str(cell), values):
            entry["deps"].append({"path": path, "md5": made.get(path) or md5(Path(path))})
        for path in (paths.of_item(out, str(cell)) for out in outs):
            made[path] = md5(Path(path)) or "0" * 32 + ".dir"
            entry["outs"].append({"path": path, "md5": made[path]})
        entries[f"{name}@{cell if 'schedule' in stage['matrix'] else cell.dataset}"] = entry
        if name == last:
            break
    dump_yaml("dvc.lock", {"schema": "2.0", "stages": entries})


def make_previews(cell: Cell, *reports: int) -> None:
    """An archive of preview grids."""
    folder = Path(".previews")
    for report in reports:
        grids.save_png(folder / f"{report:08d}.png", np.zeros((4, 4), np.uint8))
    write_archive(paths.weights(str(cell)) / "previews.zip", folder)


def publish(cell: Cell) -> None:
    """Publish a cell as its stage `evaluate` does: after DVC recorded those before."""
    record(cell, last="sample")
    mirror.publish(cell)


@contextlib.contextmanager
def followed(cell: Cell) -> Iterator[Followed]:
    """Who tells MLflow of a training, for as long as the block lasts."""
    live = Followed("train", cell)
    live.start()
    try:
        yield live
    except BaseException as error:
        live.end(error)
        raise
    live.end(None)


def make_files(cell: Cell, fid: float = 20.0) -> None:
    score = {"value": fid, "error": 0.5, "floor": 11.8}
    grid = [{"logsnr": -2.0, "eps_mse": {"value": 0.1, "error": None, "floor": None}}]
    scores = {"fast": {"images": 2000, "fid": score, "sampling": {"steps": 25}}, "ancestral": {"images": 64, "scored": False}}
    write(
        paths.scores("evaluate", str(cell)),
        json.dumps({**scores, "train_images": 128, "eps_mse": score | {"value": 0.03}, "logsnr_grid": grid}),
    )
    write(paths.timing("train", str(cell)), json.dumps({"seconds": 100.0, "device": "cpu"}))
    write(paths.loss_curve(str(cell)), "step,images,lr,train_loss,val_loss\n1,64,0.1,0.9,\n2,128,0.1,0.8,0.85\n")
    write(paths.prepared(cell.dataset) / "dataset.json", "{}")
    for name in ("grid.png", "chain.png"):
        grids.save_png(paths.samples(str(cell)) / name, np.zeros((4, 4), np.uint8))
    write(paths.samples(str(cell)) / "denoising.gif", "")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def runs(tree: Path) -> list["Run"]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("naqsh")
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])) if experiment else []


def edit(path: str, change: Callable[[str], str]) -> None:
    before = Path(path).read_text()
    Path(path).write_text(change(before))
    assert Path(path).read_text() != before
