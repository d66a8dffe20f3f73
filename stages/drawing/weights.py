"""Tensors on disk: safetensors with JSON metadata, checked when read; no pickle, ever."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.errors import Held, UserError, damaged


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, on the CPU, and its metadata. Raises UserError when it is missing or damaged.

    A file of an earlier version has no SHA-256 and is loaded unchecked.
    """
    tensors, about, _ = read_tensors(path)
    return tensors, about


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """The tensors of a file, its metadata, and whether its content was checked against its SHA-256."""
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {})["about"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        about, digest = (said, None) if isinstance(said, dict) else said
        if not isinstance(about, dict) or digest not in (None, tensors_sha256(tensors, about)):
            raise ValueError("its content is not what was written")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise damaged(path, error) from None
    return Held(path, tensors), Held(path, about), digest is not None


def tensors_sha256(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """SHA-256 of the metadata and of the name, type, shape and bytes of every tensor."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    hashed = hashlib.sha256(json.dumps([about, described], sort_keys=True).encode())
    for name in names:
        hashed.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def device() -> torch.device:
    """The CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
