"""The readers of datasets by name: what `data.NAME.reader` in params.yaml may say."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from stages.datasets import glyphs, mnist

Split = tuple[Tensor, Tensor]  # images (N, 1, H, W) uint8, labels (N,) int64


class Reader(NamedTuple):
    """One kind of dataset. Both functions take a folder and, by keyword, every option of the dataset but `reader`."""

    fetch: Callable[..., None]
    """fetch(folder, **options) fills an empty folder with the raw files."""
    read: Callable[..., tuple[Split, Split, list[str]]]
    """read(folder, **options): the train split, the test split and the class names, all from the raw files."""
    licence: str
    synthetic: bool
    """True: drawn by a program, nobody's handwriting."""


READERS: dict[str, Reader] = {
    "mnist": Reader(mnist.fetch, mnist.read, mnist.LICENCE, synthetic=False),
    "glyphs": Reader(glyphs.fetch, glyphs.read, glyphs.LICENCE, synthetic=True),
}
