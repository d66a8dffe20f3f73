"""The readers of datasets by name: what `data.NAME.reader` in params.yaml may say. And `mix`, which is made of others."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stages.datasets import archive, auto, folder, glyphs, hoda, mnist
from stages.datasets.splits import Dataset, Split, dataset
from stages.errors import UserError

Options = dict[str, Any]
"""A section of params.yaml: data."""


class Reader(NamedTuple):
    """One kind of dataset. Both functions take a folder and, by keyword, every option of the dataset but `reader`."""

    fetch: Callable[..., None]
    """fetch(folder, **options) fills an empty folder with the raw files."""
    read: Callable[..., Dataset]
    """read(folder, **options): the content of the dataset, from the raw files alone."""
    licence: str | None = None
    """Of the images; None where the option `licence` tells it."""
    synthetic: bool = False
    """True: drawn by a program, nobody's handwriting."""


def fetch(raw: Path, options: Options) -> None:
    """Fill an empty folder with the raw files of a dataset. Raises UserError when they are not to be had."""
    READERS[options["reader"]].fetch(raw, **_without_reader(options))


def read(raw: Path, options: Options) -> Dataset:
    """The content of a dataset. Raises UserError when its raw files are missing or wrong."""
    return READERS[options["reader"]].read(raw, **_without_reader(options))


def licence(options: Options) -> str:
    """The licence of the images; of a mix, all of them by name."""
    if "of" in options:
        return "; ".join(f"{name}: {licence(part)}" for name, part in options["of"].items())
    return READERS[options["reader"]].licence or str(options["licence"])


def is_synthetic(options: Options) -> bool:
    """Whether a program drew the images, or some of them."""
    return any(map(is_synthetic, options["of"].values())) if "of" in options else READERS[options["reader"]].synthetic


def _fetch_mix(raw: Path, *, of: dict[str, Options]) -> None:
    for name, options in of.items():
        (raw / name).mkdir()
        with _told_of(name):
            fetch(raw / name, options)


def _read_mix(raw: Path, *, of: dict[str, Options]) -> Dataset:
    """All datasets as one, split as each is. Classes of one name are one class; for equal images see `dataset`."""
    class_names: list[str] = []
    parts: list[Dataset] = []
    for name, options in of.items():
        with _told_of(name):
            parts.append(read(raw / name, options))
        class_names += [y for y in parts[-1].class_names if y not in class_names]

    def joined(splits: Sequence[Split]) -> Split:
        numbers = [torch.tensor([class_names.index(y) for y in part.class_names]) for part in parts]
        labels = [number[y] for number, (_, y) in zip(numbers, splits, strict=True)]
        return torch.cat([images for images, _ in splits]), torch.cat(labels)

    def origin(splits: Sequence[Split]) -> torch.Tensor:
        return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(labels) for _, labels in splits]))

    trains, validations, tests = zip(*(part.splits.values() for part in parts), strict=True)
    sources = (origin(trains), origin(validations), origin(tests))
    mixed = dataset(joined(trains), joined(validations), joined(tests), class_names, how="of each", sources=sources)
    return mixed._replace(report=mixed.report | {"of": {name: part.report for name, part in zip(of, parts, strict=True)}})


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Name the part of a mix that an error is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"of.{name}: {error}") from None


def _without_reader(options: Options) -> Options:
    return {name: value for name, value in options.items() if name != "reader"}


READERS: dict[str, Reader] = {
    "mnist": Reader(mnist.fetch, mnist.read, mnist.LICENCE),
    "glyphs": Reader(glyphs.fetch, glyphs.read, glyphs.LICENCE, synthetic=True),
    "hoda": Reader(hoda.fetch, hoda.read, hoda.LICENCE),
    "archive": Reader(archive.fetch, archive.read),
    "folder": Reader(folder.fetch, folder.read),
    "auto": Reader(auto.fetch, auto.read),
    "mix": Reader(_fetch_mix, _read_mix),
}
