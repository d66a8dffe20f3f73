"""Bring the raw files of a dataset here: writes data/raw/NAME.fetched.zip. `python -m stages.fetch mnist`."""

from stages.datasets import readers
from stages.errors import UserError
from stages.pipeline import params, paths, sources
from stages.pipeline.files import write_archive
from stages.pipeline.stage import run


def main(dataset: str, data: params.DataSection) -> None:
    """Write the archive of the raw files, whole or not at all; remember what the person's own files looked like.

    Where nothing that decides those files has changed, or they are not to be had, what was fetched before stays.
    """
    sources.refuse_outputs(dataset, data)
    options, raw = sources.resolved(data.model_dump()), paths.raw(dataset)
    source = sources.Source.of(dataset, options)
    if source.is_kept(raw):
        print(f"{dataset}: what was fetched before is kept: no setting that decides it has changed", flush=True)
        source.remember(raw, kept=True)
        return
    try:
        with sources.scratch(f"fetch-{dataset}") as folder:
            readers.fetch(folder, options)
            write_archive(raw, folder)
    except UserError as error:
        sources.bring_back(raw)
        raise UserError(f"data.{dataset}: {error}") from None
    except OSError as error:
        sources.bring_back(raw)
        raise UserError(f"data.{dataset}: {error.filename or raw}: {error.strerror}") from None
    source.remember(raw)


if __name__ == "__main__":
    run(main)
