"""Bring the raw files of a dataset here: writes data/raw/NAME. `python -m stages.fetch mnist`."""

from stages import UserError
from stages.datasets import readers
from stages.pipeline import params, paths, sources, stage


def main(dataset: str, data: params.DataSection) -> None:
    """Fill data/raw/NAME, whole or not at all; remember what the person's own files looked like."""
    options = sources.resolved(data.model_dump())
    seen = sources.look(options)
    try:
        with stage.whole_folder(paths.raw(dataset)) as folder:
            readers.fetch(folder, options)
    except UserError as error:
        raise UserError(f"data.{dataset}: {error}") from None
    except OSError as error:
        raise UserError(f"data.{dataset}: {error.filename or paths.raw(dataset)}: {error.strerror}") from None
    sources.remember(dataset, seen)


if __name__ == "__main__":
    stage.run(main)
