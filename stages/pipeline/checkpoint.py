"""Weights on disk: safetensors with the parameters that built the network in their metadata; no pickle, ever."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages import UserError
from stages.pipeline.stage import whole_file


def save_tensors(path: Path, tensors: dict[str, Tensor], **about: Any) -> None:
    """Write tensors, whole, with JSON metadata: each keyword is stored under its name."""
    metadata = {key: json.dumps(value, sort_keys=True) for key, value in about.items()}
    with whole_file(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata=metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, on the CPU, and its metadata. Raises UserError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        return load_file(path), about
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run `dvc repro`") from None


def device() -> torch.device:
    """The CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
