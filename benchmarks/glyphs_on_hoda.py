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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stages.datasets import glyphs, hoda
from stages.datasets.images import to_float
from stages.extractor import fit
from stages.networks.classifier import CHUNK, classify
from stages.pipeline.params import Extractor

SIZE = 64
GLYPHS = 84000  # drawn, of 42 classes; the ten digits are trained on
TRAINING = Extractor(images=150000, batch=128, lr=3e-3, seed=0)
INK, PAPER = 45, 220


def main(path: Path) -> None:
    (train, y_train), real = digits(), read_cdb(path)
    net = fit(train, y_train, 10, TRAINING)
    images, labels = (part[1::2] for part in real)
    _, probabilities = classify(net, map(to_float, images.split(CHUNK)))
    confusion = (labels * 10 + probabilities.argmax(1)).bincount(minlength=100).view(10, 10)
    accuracy = confusion.diag().sum().item() / len(labels)
    Path(__file__).with_suffix(".md").write_text(table(confusion, accuracy), encoding="utf-8")
    print(json.dumps({"accuracy": accuracy, "error": (accuracy * (1 - accuracy) / len(labels)) ** 0.5, "images": len(labels)}))


def digits() -> tuple[Tensor, Tensor]:
    """Images and labels of the ten digits among GLYPHS glyphs."""
    with tempfile.TemporaryDirectory() as folder:
        glyphs.fetch(Path(folder))
        images, labels = glyphs.read(Path(folder), size=SIZE, train_images=GLYPHS, validation_images=1, test_images=1, seed=0).train
    return images[labels < 10], labels[labels < 10]


def read_cdb(path: Path) -> tuple[Tensor, Tensor]:
    """All digits of a file as (N, 1, SIZE, SIZE) uint8, in the tones of the glyphs, and their labels, (N,) int64."""
    labels, inks = zip(*hoda.digits(path.read_bytes(), str(path)), strict=True)
    images = np.stack([hoda.place(ink, SIZE, dark=INK, light=PAPER) for ink in inks])
    return torch.from_numpy(images[:, None]), torch.tensor(labels)


def table(confusion: Tensor, accuracy: float) -> str:
    names = glyphs.CLASS_NAMES[:10]
    rows = [f"| {name} | " + " | ".join(map(str, row)) + " |" for name, row in zip(names, confusion.tolist(), strict=True)]
    head = f"{accuracy:.1%} of {confusion.sum()} real digits are recognised; rows: written, columns: recognised.\n"
    return "\n".join([head, f"| | {' | '.join(names)} |", "|---" * 11 + "|", *rows, ""])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
