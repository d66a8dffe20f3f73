"""Train the network of one cell.

Reads the train split. Writes the final average of the weights (what gets sampled), the raw ones, the average at each quarter of
the last phase, previews.zip with a grid before it and one for each report, and the loss curve.

    python -m stages.train mnist-cosine-1000-0
"""

import copy
import csv
import functools
import itertools
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stages.datasets.images import balanced_order, to_float
from stages.diffusion import process
from stages.diffusion.schedules import SHARED_LEVELS, noise_levels, shared_levels
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.fidelity.rounding import significant
from stages.networks import ema
from stages.networks.balance import Balance
from stages.networks.muon import Muon
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, grids, params, paths
from stages.pipeline.files import sha256, whole_file, whole_files, whole_folder, write_archive
from stages.pipeline.preview import preview
from stages.pipeline.stage import Listener, peak_memory, progress, run
from stages.tracking.live import Followed

Errors = Callable[[UNet, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(net, x0, y, t, eps) -> (B,) mean squared errors of what the network predicts, by fixed weights where there are such."""

# The code that decides the bits of a training, in stages/: what dvc.yaml says it depends on, beside the cell's schedule.
CODE = (
    "train",
    "datasets/images",
    "diffusion/by_name",
    "diffusion/process",
    "diffusion/schedules/__init__",
    *(f"networks/{n}" for n in ("balance", "ema", "muon", "unet")),
)
STATE = "state.safetensors"  # all that an unfinished training needs to go on
NOISE, ORDER = 0, 1  # streams of random numbers


class Phase(NamedTuple):
    """A stretch of training with a learning-rate schedule of its own: the steps begin + 1 .. end."""

    begin: int
    end: int


def main(
    cell: params.Cell,
    diffusion: params.Diffusion,
    network: params.Network,
    train: params.Train,
    runtime: params.Runtime,
    listener: Listener,
) -> dict[str, Any]:
    """Train with the whole split resident as one uint8 tensor; the randomness of a step is a function of (seed, step).

    So a killed training goes on from its last checkpoint to the same bits, and one with a phase more from the finished phases
    before it, where they are still there. A shared network is trained by the first cell of its dataset and seed; the others find
    it finished and take it.
    """
    train = train.of(cell.dataset)
    device = checkpoint.device()
    checkpoint.check_bf16(train.precision)
    _set_kernels(train.deterministic)

    # Data: a part of the train split is held out, and never trained on.
    images, labels, rows, held_out, class_names = _split(cell, train.validation_images, device)
    size = images.shape[-1]
    how = diffusion.model_dump(include={"reference_size", "zero_terminal_snr"})
    schedule, T = SHARED_LEVELS if train.shared else (cell.schedule, cell.T)
    levels = shared_levels(size=size, **how) if train.shared else noise_levels(schedule, T, size=size, **how)
    alpha_bar = torch.from_numpy(levels).to(device)

    # Network, its average, optimisers. What is needed to build the network again travels with the weights.
    about = {"levels": [schedule, T], "seed": cell.seed, "size": size, "num_classes": len(class_names), "class_names": class_names}
    about |= {"network": network.model_dump(), "diffusion": diffusion.model_dump(), "train": train.model_dump()}
    torch.manual_seed(cell.seed)
    net = UNet(size=size, num_classes=len(class_names), **network.model_dump())
    net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net_ema = copy.deepcopy(net).eval().requires_grad_(False)
    weights, averages = list(net.parameters()), list(net_ema.parameters())
    modules: dict[str, nn.Module] = {"net": net, "ema": net_ema, "balance": Balance(T).to(device)}
    optimizers, errors_of = _optimizers(net, train), _errors(diffusion, alpha_bar, train.precision)

    # What happens when.
    phases = _phases(train)
    last, points = phases[-1], train.curve_points
    report_at = {phase.begin + math.ceil((phase.end - phase.begin) * k / points) for phase in phases for k in range(1, points + 1)}
    snapshot_at = {last.begin + math.ceil((last.end - last.begin) * k / 4): f"ema-{25 * k}" for k in (1, 2, 3)} | {last.end: "ema"}

    # The loop. Losses stay on the device until an interval ends, so that no step waits for the one before it.
    own = () if train.shared else (f"diffusion/schedules/{schedule}",)
    names = _fingerprints(cell.dataset, f"{schedule}-{T}-{cell.seed}", CODE + own, diffusion, network, train)
    with checkpoint.unfinished(names[-1]) as work:
        losses, so_far = _restore(work, names, names if train.shared else names[:-1], modules, optimizers)
        previews, files = work / "weights" / "previews", so_far["files"]
        taken = train.shared and so_far["step"] == last.end
        if taken:
            print(f"{cell}: takes the network that is trained already", flush=True)
        elif so_far["step"]:
            print(f"{cell}: going on from step {so_far['step']} of {last.end}", flush=True)
        else:
            _draw(previews / f"{0:08d}.png", preview(net_ema, size, diffusion.prediction, alpha_bar), files)
        _keep(work, phases, names, so_far["step"], train)  # a kill may have come between the end of a phase and this
        curve, clock, seconds = so_far["curve"], so_far["clock"], so_far["seconds"]
        marked, started = so_far["step"], time.perf_counter()  # since when `seconds` does not count
        saved = started
        steps = progress(range(marked + 1, last.end + 1), total=last.end, initial=marked, unit="step", label=str(cell))
        for step in steps:
            phase = next(phase for phase in phases if step <= phase.end)
            step_of_phase = step - phase.begin
            if step_of_phase == 1:
                optimizers = _optimizers(net, train)
            rng = generator(cell.seed, NOISE, step, device)
            batch = rows[batch_of_step(step, train.batch, len(rows), cell.seed).to(device)]
            x0, y = to_float(images[batch]), labels[batch]
            y = torch.where(torch.rand(y.shape, device=device, generator=rng) < train.label_dropout, len(class_names), y)
            t = stratified_timesteps(len(y), T, rng)
            eps = torch.randn(x0.shape, device=device, generator=rng)

            errors = errors_of(net, x0, y, t, eps)
            (modules["balance"](errors, t) if diffusion.weighting == "balanced" else errors).mean().backward()
            torch.nn.utils.clip_grad_norm_(weights, train.grad_clip)
            lr = learning_rate(step_of_phase, phase.end - phase.begin, train)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr * optimizer.defaults["lr"] / train.lr
                optimizer.step()
            net.zero_grad()
            ema.update(averages, weights, step=step_of_phase, halflife=train.ema_halflife)
            losses.append(errors.detach().mean())

            if step in report_at or step in snapshot_at:
                train_loss = _finite_mean(losses, step)
                elapsed = time.perf_counter() - started
                seconds += elapsed
                if step in report_at:
                    val_loss = _validate(errors_of, net_ema, images[held_out], labels[held_out], T)
                    row = {"step": step, "images": step * train.batch, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
                    curve.append({key: float(significant(value)) for key, value in row.items()})
                    rate = (step - marked) * train.batch / elapsed
                    clock.append({"step": step, "images_per_sec": round(rate, 1), **peak_memory(), **checkpoint.device_memory()})
                    losses.clear()
                    picture = previews / f"{len(curve):08d}.png"  # by report, for trainings of any length to lie side by side
                    _draw(picture, preview(net_ema, size, diffusion.prediction, alpha_bar), files)
                    listener.point(curve[-1] | clock[-1], picture, step / last.end, (last.end - step) * train.batch / rate)
                if step in snapshot_at:
                    file = work / "weights" / f"{snapshot_at[step]}.safetensors"
                    checkpoint.save_tensors(file, net_ema.state_dict(), **about, images=step * train.batch)
                    files[file.name] = sha256(file)
                marked, started = step, time.perf_counter()
            if step == phase.end or time.perf_counter() - saved >= runtime.checkpoint_seconds:
                so_far = {"step": step, "curve": curve, "clock": clock, "seconds": seconds + time.perf_counter() - started}
                over = step == phase.end
                so_far |= {"files": files, "fingerprint": names[phases.index(phase)] if over else names[-1]}
                checkpoint.save_state(work / STATE, modules, [] if over else optimizers, losses, **so_far)
                _keep(work, phases, names, step, train)
                saved = time.perf_counter()
        checkpoint.check_files(work / "weights", files)
        with whole_files(paths.weights(str(cell))) as folder:
            for name in snapshot_at.values():
                shutil.copy(work / "weights" / f"{name}.safetensors", folder)
            checkpoint.save_tensors(folder / "raw.safetensors", net.state_dict(), **about)
            write_archive(folder / "previews.zip", previews)
        _write_curve(paths.loss_curve(str(cell)), curve)
    return {} if taken else {"images_per_sec": round(last.end * train.batch / seconds, 1), "by_step": clock}


def _phases(train: params.Train) -> list[Phase]:
    ends = list(itertools.accumulate(math.ceil(images / train.batch) for images in train.images))
    return [Phase(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _draw(picture: Path, pixels: grids.Pixels, files: dict[str, str]) -> None:
    """Write a preview, and put its SHA-256 into `files`."""
    grids.save_png(picture, pixels)
    files[f"{picture.parent.name}/{picture.name}"] = sha256(picture)


def _keep(work: Path, phases: list[Phase], names: list[str], step: int, train: params.Train) -> None:
    """Where a phase is over, keep its end for a longer training, or for the cells that share the network, to go on from."""
    for phase, name in zip(phases, names, strict=True):
        if step == phase.end and not checkpoint.finished(name).exists():
            checkpoint.finish(work, name, averages=train.shared)


def _fingerprints(
    dataset: str,
    levels_and_seed: str,
    code: tuple[str, ...],
    diffusion: params.Diffusion,
    network: params.Network,
    train: params.Train,
) -> list[str]:
    """What the state of this training is known by after each of its phases: a hash of all that leads there."""
    folder = paths.prepared(dataset)
    files = [folder / "train.safetensors", *(Path(__file__).parent / f"{name}.py" for name in code)]
    values = [dataset, levels_and_seed, diffusion.model_dump(), network.model_dump(), train.model_dump(exclude={"images"})]
    return [checkpoint.fingerprint(files, *values, train.images[: k + 1]) for k in range(len(train.images))]


def _restore(
    work: Path, names: list[str], earlier: list[str], modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Set modules and optimisers to where the training stands; the losses since the last report, and the rest of its state.

    That is where it was killed, else the end of the longest of `earlier` that was finished before, else the start.
    """
    for folder in (work, *(checkpoint.finished(name) for name in reversed(earlier))):
        if not (folder / STATE).exists():
            continue
        try:
            found = checkpoint.load_state(folder / STATE, names, modules, optimizers)
        except UserError as error:
            print(f"{error}; starting over", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
            continue
        if folder != work:
            with whole_folder(work) as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
        return found
    work.mkdir(exist_ok=True)
    return [], {"step": 0, "curve": [], "clock": [], "seconds": 0.0, "files": {}}


def learning_rate(step: int, steps: int, train: params.Train) -> float:
    """Learning rate of a step, 1..steps: linear warm-up times the square root of what is left of the phase, or halvings."""
    warmup = min(1.0, step * train.batch / max(train.warmup_images, 1))
    if train.halve_lr_every:
        return train.lr * warmup * 0.5 ** ((step - 1) * train.batch // train.halve_lr_every)
    return train.lr * warmup * (1 - (step - 1) / steps) ** 0.5


def generator(seed: int, stream: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each seed, stream (NOISE or ORDER) and index of a step or an epoch.

    Hashed, for torch's generator on the CPU keeps 32 bits of a seed and drops the others.
    """
    hashed = np.random.SeedSequence([seed, stream, index]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(hashed[0]))


def batch_of_step(step: int, batch: int, n: int, seed: int) -> Tensor:
    """(batch,) int64 indices of a step, the first is 1, in an endless row of shuffled epochs of n images."""
    first, end = (step - 1) * batch, step * batch
    parts = []
    while first < end:
        epoch, offset = divmod(first, n)
        parts.append(_shuffled(n, seed, epoch)[offset : offset + end - first])
        first += len(parts[-1])
    return torch.cat(parts)


def stratified_timesteps(batch: int, T: int, rng: torch.Generator) -> Tensor:
    """(batch,) int64 in 0..T-1, each uniform, one from each of `batch` equal parts of the range: less noise in the loss."""
    strata = torch.arange(batch, device=rng.device, dtype=torch.float64)
    jitter = torch.rand(batch, device=rng.device, dtype=torch.float64, generator=rng)
    return ((strata + jitter) / batch * T).long().clamp_max(T - 1)


def _optimizers(net: UNet, train: params.Train) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions between stem and head, AdamW at twice its rate for all else: ends, embeddings, biases, norms.

    Or Adam for all.
    """
    if train.optimizer == "adam":
        return [torch.optim.Adam(net.parameters(), lr=train.lr, fused=True)]
    inner = [weight for part in (net.down, net.middle, net.up) for weight in part.parameters() if weight.ndim == 4]
    taken = {id(weight) for weight in inner}
    rest = [weight for weight in net.parameters() if id(weight) not in taken]
    adamw = torch.optim.AdamW(rest, lr=train.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [Muon(inner, lr=train.lr / 2), adamw]


@functools.lru_cache(maxsize=2)
def _shuffled(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, ORDER, epoch))


def _split(cell: params.Cell, held_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Images and labels of the train split, the rows to train on and to hold out, names of the classes.

    Held out is of every class its share, the same in every cell.
    """
    path = paths.prepared(cell.dataset) / "train.safetensors"
    split, about = load_tensors(path)
    images, labels = split["images"].to(device), split["labels"].to(device)
    if held_out >= len(images):
        raise UserError(f"train.validation_images = {held_out} must be less than the {len(images)} images of {path}")
    order = balanced_order(labels.cpu(), torch.Generator().manual_seed(0)).to(device)
    return images, labels, order[held_out:], order[:held_out], about["class_names"]


def _errors(diffusion: params.Diffusion, alpha_bar: Tensor, precision: params.Precision) -> Errors:
    fixed = "simple" if diffusion.weighting == "balanced" else diffusion.weighting
    weights = process.loss_weights(fixed, diffusion.prediction, alpha_bar)

    def errors_of(net: UNet, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        a = alpha_bar[t]
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = net(process.q_sample(x0, a, eps), process.logsnr(a), y)
        errors = (output.float() - process.target(diffusion.prediction, x0, eps, a)).square().flatten(1).mean(1)
        return weights[t].float() * errors

    return errors_of


@torch.no_grad()
def _validate(errors_of: Errors, net: UNet, images: Tensor, labels: Tensor, T: int) -> float:
    """Loss on the held-out images, always with the same noise and timesteps."""
    rng = torch.Generator(images.device).manual_seed(0)
    t = stratified_timesteps(len(images), T, rng)
    eps = torch.randn(images.shape, device=images.device, generator=rng)
    chunks = zip(to_float(images).split(256), labels.split(256), t.split(256), eps.split(256), strict=True)
    return sum(float(errors_of(net, *chunk).sum()) for chunk in chunks) / len(images)


def _finite_mean(losses: list[Tensor], step: int) -> float:
    """Mean of the losses of the steps up to `step`. Raises UserError naming the first step whose loss is not finite."""
    values = torch.stack(losses).double().cpu()
    if not values.isfinite().all():
        bad = int((~values.isfinite()).nonzero()[0])
        raise UserError(
            f"the loss became {values[bad]} at step {step - len(losses) + 1 + bad}; a lower train.lr or train.grad_clip may help"
        )
    return float(values.mean())


def _set_kernels(deterministic: bool) -> None:
    """TF32 and the fastest kernels on CUDA, or the deterministic ones; a CPU is deterministic as it is."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic and torch.cuda.is_available():  # the call alone imports torch's compiler, for seconds
        torch.use_deterministic_algorithms(True)


def _write_curve(path: Path, curve: list[dict[str, Any]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("step", "images", "lr", "train_loss", "val_loss"), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: significant(value) for key, value in row.items()} for row in curve)


if __name__ == "__main__":
    run(main, Followed)
