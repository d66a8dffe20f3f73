"""Where a trained network lies, and what the name of a cell says. Without torch, for programs that only name files."""

import re
from pathlib import Path
from typing import NamedTuple

EMA = "ema.safetensors"  # the final average of the weights, in the folder of a network: what is drawn with


class Named(NamedTuple):
    """What the name of a cell says."""

    training: str
    schedule: str
    T: int


def network(training: str) -> Path:
    """Folder of a network's files, by its name, DATASET-SCHEDULE-SEED, below the root of the working tree."""
    return Path("models/networks") / training


def named(cell: str) -> Named | None:
    """What the name of a cell, DATASET-SCHEDULE-T-SEED, says; None where it is no such name."""
    match = re.fullmatch(r"(\w+)-([a-z]\w*)-(\d{1,6})-(\d+)", cell, re.ASCII)
    return Named(f"{match[1]}-{match[2]}-{match[4]}", match[2], int(match[3])) if match else None
