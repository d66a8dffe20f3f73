"""The files of a cell, made up, and what MLflow holds of them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.pipeline import clocks, dvc_forms, grids, paths
from stages.pipeline.files import md5, write_archive
from stages.pipeline.params import Cell
from stages.tracking import mirror, provenance
from stages.tracking.live import Followed

if TYPE_CHECKING:
    from mlflow.entities import Run

ROOT = Path(__file__).parents[1]
CELL, OTHER = Cell("mnist", "cosine", 100, 0), Cell("mnist", "linear", 100, 0)


def record(cell: Cell, *, last: str) -> None:
    """Write what dvc.lock says of a cell once its stages are run, from the first to the last; folders have a made-up digest."""
    from dvc.utils.serialize import dump_yaml

    entries, made = {}, {}
    tree = provenance.Tree.read()
    values = tree.params.model_dump()
    for name, stage in tree.stages.items():
        item = paths.item_of(stage, str(cell))
        entry = {"cmd": "", "deps": [], "params": {"params.yaml": dvc_forms.params_of(stage, item, tree.params)}, "outs": []}
        for path in paths.deps(stage, item, values):
            entry["deps"].append({"path": path, "md5": made.get(path) or md5(Path(path))})
        for path in (paths.of_item(out, item) for out in paths.outs(stage)):
            made[path] = md5(Path(path)) or "0" * 32 + ".dir"
            entry["outs"].append({"path": path, "md5": made[path]})
        entries[paths.stage_name(name, item)] = entry
        if name == last:
            break
    dump_yaml("dvc.lock", {"schema": "2.0", "stages": entries})


def make_network(cell: Cell, *class_names: str, **changes: object) -> Path:
    """Weights of a network that was never trained; it draws 8 x 8 pixels all the same. `changes`: of what its file says."""
    import torch

    from stages.networks.unet import UNet
    from stages.pipeline import checkpoint

    network = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}
    network |= {"conditional": True}
    about = {"class_names": class_names, "num_classes": len(class_names), "size": 8, "levels": cell.schedule, "images": 64}
    about |= {"logsnr": [-28.0, 14.0], "machines": [], "network": network, "train": {"label_dropout": 0.1, "shared": False}}
    about |= {"diffusion": {"prediction": "v", "reference_size": 28, "zero_terminal_snr": False}} | changes
    torch.manual_seed(0)
    net = UNet(size=8, num_classes=len(class_names), **about["network"])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = paths.weights(str(cell.training)) / "ema.safetensors"
    checkpoint.save_tensors(path, net.state_dict(), **about)
    return path


def make_previews(cell: Cell, *reports: int) -> None:
    """An archive of preview grids."""
    folder = Path(".previews")
    for report in reports:
        grids.save_png(folder / f"{report:08d}.png", np.zeros((4, 4), np.uint8))
    write_archive(paths.weights(str(cell.training)) / "previews.zip", folder)


def publish(cell: Cell) -> None:
    """Publish a cell as its stage `evaluate` does: after DVC recorded those before."""
    record(cell, last="sample")
    mirror.publish(cell)


@contextlib.contextmanager
def followed(cell: Cell) -> Iterator[Followed]:
    """Who tells MLflow of a training, for as long as the block lasts."""
    live = Followed("train", [cell])
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
    scores = {"fast": {"images": 2000, "fid": score, "sampling": {"steps": 25, "network_evaluations": 40}}}
    scores["ancestral"] = {"images": 64, "scored": False, "sampling": {"network_evaluations": 300}}
    scores |= {"machines": provenance.here(), "train_images": 128}
    write(paths.scores("evaluate", str(cell)), json.dumps({**scores, "eps_mse": score | {"value": 0.03}, "logsnr_grid": grid}))
    write(paths.loss_curve(str(cell.training)), "step,images,lr,train_loss,val_loss\n1,64,0.1,0.9,\n2,128,0.1,0.8,0.85\n")
    write(paths.prepared(cell.dataset) / "dataset.json", "{}")
    for name in ("grid.png", "chain.png"):
        grids.save_png(paths.samples(str(cell)) / name, np.zeros((4, 4), np.uint8))
    write(paths.samples(str(cell)) / "denoising.gif", "")


def write_clocks(stage: str, cell: Cell, **measured: object) -> None:
    """What a stage of a cell measured with a clock; under the inputs that dvc.lock records, or those that are here now."""
    item = paths.item_of(dvc_forms.stages()[stage], str(cell))
    entry = dvc_forms.recorded(dvc_forms.read_lock(), f"{stage}@{item}") or clocks.now(stage, item)
    write(clocks.path_of(stage, item, entry), json.dumps(measured))


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
