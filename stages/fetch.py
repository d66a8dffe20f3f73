"""Bring the raw files of a dataset here: writes data/raw/NAME. `python -m stages.fetch mnist`."""

from stages.datasets.readers import READERS
from stages.pipeline import params, paths, stage


def main(dataset: str, data: params.DataSection) -> None:
    """Fill data/raw/NAME, whole or not at all."""
    with stage.whole_folder(paths.raw(dataset)) as folder:
        READERS[data.reader].fetch(folder, **data.model_dump(exclude={"reader"}))


if __name__ == "__main__":
    stage.run(main)
