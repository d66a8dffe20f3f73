"""Schedules and samplers are found by their name: each is a file of one function, in a folder beside this one."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


def names(folder: str) -> list[str]:
    """The names of the files in `schedules` or `samplers`, sorted.

    A name is an identifier without an underscore in front: it becomes part of a cell's name, which is split at its hyphens.
    """
    return sorted(file.stem for file in (HERE / folder).glob("*.py") if file.stem.isidentifier() and file.stem[0] != "_")


def find(folder: str, name: str, function: str) -> Any:
    """That function of the file of that name. Raises ValueError, with the names that there are, for an unknown one."""
    if name not in (known := names(folder)):
        raise ValueError(f"there is no stages/diffusion/{folder}/{name}.py; allowed: {', '.join(known)}")
    return getattr(_module(folder, name), function)


def constant(folder: str, name: str, what: str) -> Any:
    """A constant of a file that is there; None where it has none of that name."""
    return getattr(_module(folder, name), what, None)


def _module(folder: str, name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{folder}.{name}")
