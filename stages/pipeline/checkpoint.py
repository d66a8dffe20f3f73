"""Tensors written whole; unfinished training, which survives any kill; finished ones, for a longer one to go on from.

The former lies in .state/checkpoints of the original working tree, the latter in .state/finished, where cells that share a network
find it too.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.drawing.weights import device, load_tensors, read_tensors, tensors_sha256
from stages.errors import ChangedError, UserError, sound
from stages.networks.classifier import Classifier
from stages.pipeline.dvc_forms import workspace
from stages.pipeline.files import alone, content_hash, md5, sha256, whole_file, whole_folder
from stages.pipeline.processes import cpu_model
from stages.pipeline.stage import check_unchanged


def save_tensors(path: Path, tensors: dict[str, Tensor], **about: Any) -> None:
    """Write tensors, whole, with JSON metadata: `about` and the SHA-256 of all content, which `load_tensors` checks.

    Under one key: safetensors writes several in an order that changes every time.
    """
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    about = json.loads(json.dumps(about))  # as it will be read: with text for keys
    metadata = {"about": json.dumps([about, tensors_sha256(on_cpu, about)], sort_keys=True)}
    with whole_file(path) as temporary:
        try:
            save_file(on_cpu, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, which is an OSError everywhere else
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else error) from None


def check_files(folder: Path, files: dict[str, str]) -> None:
    """Compare files with what they were when written. Raises UserError when one is missing or damaged.

    Args:
        files: SHA-256 by name in the folder.
    """
    for name, digest in files.items():
        if sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is damaged (its content is not what was written); run `dvc repro` again")


def check_bf16(precision: str) -> None:
    """Tell, in one line, that bf16 will crawl on this processor; the precision is a parameter, so it is not changed here."""
    if precision == "bf16" and device().type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("this processor has no bf16 arithmetic and emulates it, slowly: fp32 is faster here", file=sys.stderr, flush=True)


def device_memory() -> dict[str, int]:
    """Peak memory of the CUDA device in MiB; nothing on a CPU."""
    return {"cuda_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20)} if torch.cuda.is_available() else {}


def load_classifier(path: Path) -> Classifier:
    """A trained classifier in eval mode on `device()`."""
    weights, about = load_tensors(path)
    with sound(path):
        net = Classifier(**about["classifier"])
        net.load_state_dict(weights)
    return net.to(device()).to(memory_format=torch.channels_last).eval()


def fingerprint(files: Iterable[Path], *values: Any) -> str:
    """A hash of what decides the bits of a training: the content of files (data and code), values.

    Args:
        values: anything that JSON can hold.
    """
    return content_hash([[md5(path) for path in files], *values])[:32]


def machine() -> dict[str, str]:
    """What of this machine decides bits: type of the device, its model and which of its instructions torch uses, version of torch.

    The instructions alone do not: of two processors with AVX-512, one AMD's and one Intel's, each gave bits of its own. How many
    cores it has decides none: the number of threads is a parameter.
    """
    device_type, version = device().type, torch.__version__.partition("+")[0]
    on_cpu = f"{torch.backends.cpu.get_cpu_capability()} on {cpu_model()}"
    return {"device": device_type, "processor": torch.cuda.get_device_name() if device_type == "cuda" else on_cpu, "torch": version}


@contextlib.contextmanager
def unfinished(name: str) -> Iterator[Path]:
    """The folder of one unfinished training, held against a second writer; removed when the block ends without an error.

    It stays where an input changed meanwhile: who takes the change back goes on from it.
    """
    folder = workspace() / ".state" / "checkpoints" / name
    with alone(folder.parents[1] / "locks" / f"{name}.lock"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
            check_unchanged()
        except ChangedError:
            raise
        except UserError:  # to go on would end the same way
            _remove(folder)
            raise
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder so that a kill leaves it whole, or under a name that nothing reads and `make prune` lists."""
    shutil.rmtree(gone := folder.with_name(f"{folder.name}.gone"), ignore_errors=True)
    shutil.rmtree(folder.rename(gone))


def finished(name: str) -> Path:
    """The folder of a training whose phases are all over, kept for longer ones to go on from; it need not exist."""
    return workspace() / ".state" / "finished" / name


def finish(folder: Path, name: str) -> None:
    """Keep a copy of an unfinished training as a finished one."""
    with alone(workspace() / ".state" / "locks" / f"finished-{name}.lock"), whole_folder(finished(name)) as kept:
        shutil.copytree(folder, kept, dirs_exist_ok=True)


def save_state(
    path: Path, modules: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer], losses: list[Tensor], **about: Any
) -> None:
    """Write all that a training needs to go on, whole.

    Args:
        losses: 0-d tensors, those of the steps since the last report.
        about: anything that JSON can hold; among it `fingerprint`, and `files`: SHA-256 by name of what is in weights/ beside it.
    """
    tensors = {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{i}/{index}/{key}": value for key, value in values.items()}
    tensors["losses"] = torch.stack(losses) if losses else torch.empty(0)
    save_tensors(path, tensors, **about)


def load_state(
    path: Path, names: Sequence[str], modules: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[list[Tensor], dict[str, Any]]:
    """What `save_state` wrote: modules and optimizers are set in place, `losses` and `about` returned.

    Args:
        names: the fingerprints that will do; the last is that of the training itself, the others of its earlier phases.

    Raises:
        UserError: the file, or one in weights/, is missing or damaged, or its fingerprint is none of `names`; nothing is set then.
    """
    tensors, about, checked = read_tensors(path)
    if about.get("fingerprint") not in names:
        raise UserError(f"{path} is of another training")
    if not checked:
        raise UserError(f"{path} is of an earlier version, without a SHA-256")
    check_files(path.parent / "weights", about["files"])

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    for name, module in modules.items():
        if _shapes(module.state_dict()) != _shapes(under(f"{name}/")):
            raise UserError(f"{path} is of another network")
    losses = list(tensors["losses"].to(device()))
    for name, module in modules.items():
        module.load_state_dict(under(f"{name}/"))
    for i, optimizer in enumerate(optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = {index: _laid_out(weight, under(f"{i}/{index}/")) for index, weight in enumerate(weights)}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {index: values for index, values in state.items() if values}, "param_groups": groups})
    return losses, about


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _laid_out(weight: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a weight in the memory layout of that weight, which fused optimizers count on."""
    return {
        key: torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value.to(weight.device)
        for key, value in state.items()
    }
