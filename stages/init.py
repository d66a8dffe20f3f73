"""Take the weights that trainings begin with: those of `train.init`, as they are now; none where it is null.

A copy, so that a training is recorded with what it began with, whatever becomes of the file, and so that a network may begin with
what it was itself. `dvc repro -f init` takes them anew.

    python -m stages.init
"""

from pathlib import Path

from stages.drawing import place
from stages.drawing.weights import load_tensors, tensors_sha256
from stages.errors import UserError
from stages.pipeline import paths
from stages.pipeline.checkpoint import save_tensors
from stages.pipeline.dvc_forms import workspace
from stages.pipeline.stage import run


def main(train__init: str | None) -> None:
    """Write models/init.safetensors."""
    if train__init is None:
        save_tensors(paths.INIT, {})
        return
    path = file_of(train__init)
    if not path.is_file():
        raise UserError(f"train.init = {train__init}: {path} is missing; {_known()}")
    weights, about = load_tensors(path)
    said = {name: about[name] for name in ("network", "class_names")}
    save_tensors(paths.INIT, weights, init=train__init, sha256=tensors_sha256(weights, about), **said)


def file_of(named: str) -> Path:
    """The file of weights that `train.init` names: a cell's, or one by its path, from the root of the repository."""
    if named.endswith(".safetensors"):
        return workspace() / Path(named).expanduser()
    if found := place.named(named):
        return place.network(found.training) / place.EMA
    raise UserError(f"train.init = {named} is no cell and no .safetensors file; {_known()}")


def _known() -> str:
    names = sorted(path.parent.name for path in place.network("*").parent.glob(f"*/{place.EMA}"))
    return f"networks that are here: {', '.join(names)}" if names else "no network was trained here yet"


if __name__ == "__main__":
    run(main)
