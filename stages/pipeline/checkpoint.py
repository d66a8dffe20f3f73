"""Weights on disk: safetensors with the parameters that built the network in their metadata; no pickle, ever."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages import UserError
from stages.networks.classifier import Classifier
from stages.networks.unet import UNet
from stages.pipeline.stage import whole_file


def save_tensors(path: Path, tensors: dict[str, Tensor], **about: Any) -> None:
    """Write tensors, whole, with JSON metadata. Under one key: safetensors writes several in an order that changes every time."""
    metadata = {"about": json.dumps(about, sort_keys=True)}
    with whole_file(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata=metadata)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, on the CPU, and its metadata. Raises UserError when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
        return load_file(path), about
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run `dvc repro`") from None


def device() -> torch.device:
    """The CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_bf16(precision: str) -> None:
    """Tell, in one line, that bf16 will crawl on this processor; the precision is a parameter, so it is not changed here."""
    if precision == "bf16" and device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("this processor has no bf16 arithmetic: `make profile NAME=fp32` is faster here", file=sys.stderr, flush=True)


def device_memory() -> dict[str, int]:
    """Peak memory of the CUDA device in MiB; nothing on a CPU."""
    return {"cuda_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20)} if torch.cuda.is_available() else {}


def load_network(path: Path) -> tuple[UNet, dict[str, Any]]:
    """A trained network in eval mode on `device()`, and what its file says: network, diffusion, num_classes, size, cell, ..."""
    weights, about = load_tensors(path)
    net = UNet(size=about["size"], num_classes=about["num_classes"], **about["network"])
    net.load_state_dict(weights)
    return net.to(device(), memory_format=torch.channels_last).eval(), about  # type: ignore[call-overload]


def load_classifier(path: Path) -> Classifier:
    """A trained classifier in eval mode on `device()`."""
    weights, about = load_tensors(path)
    net = Classifier(**about["classifier"])
    net.load_state_dict(weights)
    return net.to(device()).to(memory_format=torch.channels_last).eval()
