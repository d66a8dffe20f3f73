"""Take the weights that trainings begin with: those of `train.init`, as they are now; none where it is null.

A copy, so that a training is recorded with what it began with, whatever becomes of the file, and so that a network may begin with
what it was itself. `dvc repro -f init` takes them anew.

    python -m stages.init
"""

from stages.drawing.weights import load_tensors, tensors_sha256
from stages.errors import UserError
from stages.pipeline import paths, sources
from stages.pipeline.checkpoint import save_tensors
from stages.pipeline.stage import run

KEPT = ("network", "diffusion", "class_names")  # of what their file says


def main(train__init: str | None) -> None:
    """Write models/init.safetensors."""
    if train__init is None:
        save_tensors(paths.INIT, {})
        return
    path = sources.file_to_begin_with(train__init)
    try:
        weights, about = load_tensors(path)
        said = {name: about[name] for name in KEPT}
    except UserError as error:
        raise UserError(
            f"train.init = {train__init} holds no whole network that a training of this project wrote: {error}"
        ) from None
    sources.remember_weights(train__init, path)
    save_tensors(paths.INIT, weights, sha256=tensors_sha256(weights, about), **said)


if __name__ == "__main__":
    run(main)
