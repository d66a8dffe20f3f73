"""How a classifier trained on glyph digits alone does on real handwriting: the Hoda digits (Khosravi & Kabir 2007).

Reads one .cdb file of that set; it is not part of this repository. Prints one line of JSON; writes the confusion matrix to
glyphs_on_hoda.md beside this file. The glyphs were fitted by eye to the even records; the accuracy is that of the odd ones.
Run: python benchmarks/glyphs_on_hoda.py 'FOLDER/Test 20000.cdb'
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stages.datasets import glyphs
from stages.datasets.images import to_float
from stages.extractor import fit
from stages.networks.classifier import CHUNK, classify
from stages.pipeline.params import Extractor

SIZE = 64
GLYPHS = 84000  # drawn, of 42 classes; the ten digits are trained on
TRAINING = Extractor(images=150000, batch=128, lr=3e-3, seed=0)
TYPICAL = 33  # pixels; most of the file's digits are about so high, and that height is to fill HEIGHT of an image
HEIGHT = 0.72
INK, PAPER = 45, 220


def main(path: Path) -> None:
    (train, y_train), hoda = digits(), read_cdb(path.read_bytes())
    net = fit(train, y_train, 10, TRAINING)
    images, labels = (part[1::2] for part in hoda)
    _, probabilities = classify(net, map(to_float, images.split(CHUNK)))
    confusion = (labels * 10 + probabilities.argmax(1)).bincount(minlength=100).view(10, 10)
    accuracy = confusion.diag().sum().item() / len(labels)
    Path(__file__).with_suffix(".md").write_text(table(confusion, accuracy), encoding="utf-8")
    print(json.dumps({"accuracy": accuracy, "error": (accuracy * (1 - accuracy) / len(labels)) ** 0.5, "images": len(labels)}))


def digits() -> tuple[Tensor, Tensor]:
    """Images and labels of the ten digits among GLYPHS glyphs."""
    with tempfile.TemporaryDirectory() as folder:
        glyphs.fetch(Path(folder))
        (images, labels), _, _ = glyphs.read(Path(folder), size=SIZE, train_images=GLYPHS, test_images=1, seed=0)
    return images[labels < 10], labels[labels < 10]


def read_cdb(content: bytes) -> tuple[Tensor, Tensor]:
    """All digits of a file as (N, 1, SIZE, SIZE) uint8, dark ink on light paper, and their labels, (N,) int64."""
    count, at = int.from_bytes(content[6:10], "little"), 1024
    images, labels = np.empty((count, 1, SIZE, SIZE), np.uint8), np.empty(count, np.int64)
    for i in range(count):
        mark, labels[i], width, height = content[at : at + 4]
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        assert mark == 255
        runs = np.frombuffer(content, np.uint8, length, at + 6)
        at += 6 + length
        images[i, 0] = place(decode(runs, width, height))
    assert at == len(content)
    return torch.from_numpy(images), torch.from_numpy(labels)


def decode(runs: NDArray[np.uint8], width: int, height: int) -> NDArray[np.bool_]:
    """(height, width), True is ink: in each row, runs of paper and ink take turns, paper first, until it is full."""
    ends, ink, row = np.cumsum(runs, dtype=np.int64), np.empty(len(runs), bool), 0
    for i, end in enumerate(ends):
        ink[i] = (i - row) % 2 == 1
        if end % width == 0 and runs[i]:
            row = i + 1
    return np.repeat(ink, runs).reshape(height, width)


def place(ink: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The digit in the middle of an image, proportions kept; larger than usual ones are made to fit, small ones stay small."""
    height, width = ink.shape
    side = max(height, width, TYPICAL) / HEIGHT
    window = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    page = Image.fromarray(np.pad(np.where(ink, INK, PAPER).astype(np.uint8), 64, constant_values=PAPER))
    box = tuple(64 + edge for edge in window)
    return np.asarray(page.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))


def table(confusion: Tensor, accuracy: float) -> str:
    names = glyphs.CLASS_NAMES[:10]
    rows = [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in zip(names, confusion.tolist(), strict=True)]
    head = f"{accuracy:.1%} of {confusion.sum()} real digits are recognised; rows: written, columns: recognised.\n"
    return "\n".join([head, f"| | {' | '.join(names)} |", "|---" * 11 + "|", *rows, ""])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
