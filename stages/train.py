"""Train the network of one cell.

Reads the train split. Writes the final average of the weights (what gets sampled), the raw ones, previews.zip with a grid before
it and one for each report, and the loss curve.

    python -m stages.train mnist-cosine-1000-0
"""

import csv
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.datasets.images import balanced_order
from stages.diffusion.schedules import SHARED_LEVELS, noise_levels, shared_levels
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.fidelity.rounding import significant
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, grids, params, paths
from stages.pipeline.files import sha256, whole_file, whole_files, whole_folder, write_archive
from stages.pipeline.preview import preview
from stages.pipeline.stage import Listener, peak_memory, progress, run
from stages.tracking.live import Followed
from stages.training.draws import batch_of_step
from stages.training.errors import validate
from stages.training.recipe import Recipe
from stages.training.state import State
from stages.training.step import rate_of_step, train_step
from stages.training.timetable import Timetable

# The code that decides the bits of a training, in stages/: what dvc.yaml says it depends on, beside the cell's schedule.
CODE = (
    "train",
    "datasets/images",
    "diffusion/by_name",
    "diffusion/process",
    "diffusion/schedules/__init__",
    "fidelity/rounding",
    *(f"networks/{n}" for n in ("balance", "ema", "muon", "unet")),
    *(f"training/{n}" for n in ("draws", "errors", "recipe", "state", "step", "timetable")),
)
STATE = "state.safetensors"  # all that an unfinished training needs to go on


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
    checkpoint.check_bf16(train.precision)
    _set_kernels(train.deterministic)

    # Read the images and build the network. What is needed to build it again travels with the weights.
    split = _split(cell.dataset, train.validation_images, checkpoint.device())
    levels = SHARED_LEVELS if train.shared else (cell.schedule, cell.T)
    state = begin(cell.seed, levels, split, diffusion, network, train)
    about = {"levels": levels, "seed": cell.seed, "size": split.size, "num_classes": len(split.class_names)}
    about |= {"class_names": split.class_names, "network": network.model_dump(), "diffusion": diffusion.model_dump()}
    about |= {"train": train.model_dump()}
    code = CODE if train.shared else (*CODE, f"diffusion/schedules/{cell.schedule}")
    names = _fingerprints(cell.dataset, "-".join(map(str, [*levels, cell.seed])), code, diffusion, network, train)

    # Train, from where an earlier process was stopped.
    with checkpoint.unfinished(names[-1]) as work:
        job = Job(str(cell), state, split, work, names, train.shared, about)
        taken = _resume(job)
        _train(job, listener, runtime.checkpoint_seconds)
        _publish(job)
    if taken:
        return {}
    return {"images_per_sec": round(state.step * train.batch / job.record.seconds, 1), "by_step": job.record.clock}


class Split(NamedTuple):
    """The train split on the device: (N, 1, H, W) uint8 images, (N,) int64 labels, the rows to train on and to hold out."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    held_out: Tensor
    class_names: list[str]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]


@dataclass
class Record:
    """What has happened in a training so far: what a checkpoint says beside its tensors."""

    step: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)  # what each report measured
    clock: list[dict[str, float]] = field(default_factory=list)  # what each report measured with a clock
    seconds: float = 0.0  # of the steps, without the reports
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of what is in weights/, by name


@dataclass
class Job:
    """A training under way.

    Attributes:
        work: the folder that it writes to until it is over.
        names: the fingerprints of its state after each phase.
        about: what is written beside the weights.
    """

    cell: str
    state: State
    split: Split
    work: Path
    names: list[str]
    shared: bool
    about: dict[str, Any]
    record: Record = field(default_factory=Record)

    @property
    def weights(self) -> Path:
        """The folder of what will be published."""
        return self.work / "weights"


class Stopwatch:
    """The seconds that steps take, without the pauses between `pause` and `go_on`."""

    def __init__(self, step: int, seconds: float) -> None:
        self._step, self._seconds, self._since = step, seconds, time.perf_counter()

    def seconds(self) -> float:
        """All seconds so far, those before this process too."""
        return self._seconds + time.perf_counter() - self._since

    def pause(self, step: int) -> float:
        """Stop after a step. Steps a second since the pause before."""
        elapsed = time.perf_counter() - self._since
        self._seconds += elapsed
        return (step - self._step) / elapsed

    def go_on(self, step: int) -> None:
        """Start again after a pause at a step."""
        self._step, self._since = step, time.perf_counter()


def _train(job: Job, listener: Listener, checkpoint_seconds: float) -> None:
    """Take all steps that are left."""
    state, split, timetable = job.state, job.split, job.state.timetable
    ends = {phase.end for phase in timetable.phases}
    watch, saved = Stopwatch(state.step, job.record.seconds), time.perf_counter()
    steps = range(state.step + 1, timetable.end + 1)
    for step in progress(steps, total=timetable.end, initial=state.step, unit="step", label=job.cell):
        index = batch_of_step(step, state.recipe.batch, len(split.rows), state.seed, split.rows.device)
        chosen = split.rows[index]
        train_step(state, (split.images[chosen], split.labels[chosen]), step)

        # Losses stay on the device until somebody looks, so that no step waits for the one before it.
        if step in timetable.reports:
            loss = _finite_mean(state.read_losses(), step)
            rate = watch.pause(step) * state.recipe.batch
            picture = _report(job, loss, rate)
            seconds_left = (timetable.end - step) * state.recipe.batch / rate
            listener.point(job.record.curve[-1] | job.record.clock[-1], picture, step / timetable.end, seconds_left)
            watch.go_on(step)

        if step in ends or time.perf_counter() - saved >= checkpoint_seconds:
            job.record.seconds = watch.seconds()
            _save(job)
            saved = time.perf_counter()


def _report(job: Job, train_loss: float, rate: float) -> Path:
    """Measure how the network does and draw a preview, whose path is returned; the next report's losses begin here."""
    state, split, record = job.state, job.split, job.record
    val_loss = validate(
        state.errors_of, state.average, split.images[split.held_out], split.labels[split.held_out], len(state.alpha_bar)
    )
    row: dict[str, float] = {"step": state.step, "images": state.step * state.recipe.batch, "lr": rate_of_step(state, state.step)}
    row |= {"train_loss": train_loss, "val_loss": val_loss}
    record.curve.append({key: float(significant(value)) for key, value in row.items()})
    record.clock.append({"step": state.step, "images_per_sec": round(rate, 1), **peak_memory(), **checkpoint.device_memory()})
    state.set_losses(torch.empty(0))
    return _draw(job, len(record.curve))  # by report, for trainings of any length to lie side by side


def _draw(job: Job, report: int) -> Path:
    """Write the preview of a report; 0 is that before the first step."""
    state, picture = job.state, job.weights / "previews" / f"{report:08d}.png"
    grids.save_png(picture, preview(state.average, job.split.size, state.recipe.prediction, state.alpha_bar))
    job.record.files[f"{picture.parent.name}/{picture.name}"] = sha256(picture)
    return picture


def _save(job: Job) -> None:
    """Write a checkpoint. At the end of a phase it has no optimisers: the next phase begins with new ones."""
    state, phase = job.state, job.state.timetable.phase_of(job.state.step)
    over = state.step == phase.end
    fingerprint = job.names[state.timetable.phases.index(phase)] if over else job.names[-1]
    job.record.step = state.step
    about = {**asdict(job.record), "fingerprint": fingerprint}
    checkpoint.save_state(job.work / STATE, state.modules, [] if over else state.optimizers, list(state.read_losses()), **about)
    _keep(job)


def _keep(job: Job) -> None:
    """Where a phase is over, keep its end for a longer training, or for the cells that share the network, to go on from."""
    for phase, name in zip(job.state.timetable.phases, job.names, strict=True):
        if job.state.step == phase.end and not checkpoint.finished(name).exists():
            checkpoint.finish(job.work, name)


def _publish(job: Job) -> None:
    """Write the outputs, whole."""
    checkpoint.check_files(job.weights, job.record.files)
    with whole_files(paths.weights(job.cell)) as folder:
        about = job.about | {"images": job.state.step * job.state.recipe.batch}
        for name, net in (("ema", job.state.average), ("raw", job.state.net)):
            checkpoint.save_tensors(folder / f"{name}.safetensors", net.state_dict(), **about)
        write_archive(folder / "previews.zip", job.weights / "previews")
    _write_curve(paths.loss_curve(job.cell), job.record.curve)


def _resume(job: Job) -> bool:
    """Set the state to where the training stands; whether it is that of a shared network, and over already."""
    _restore(job)
    step, end = job.state.step, job.state.timetable.end
    taken = job.shared and step == end
    if taken:
        print(f"{job.cell}: takes the network that is trained already", flush=True)
    elif step:
        print(f"{job.cell}: going on from step {step} of {end}", flush=True)
    else:
        _draw(job, 0)
    _keep(job)  # a kill may have come between the end of a phase and this
    return taken


def _restore(job: Job) -> None:
    """Set the state to where the training was killed, else to the longest of its phases that was finished before.

    Else it stays at the start. The end of the last phase counts for a shared network alone: others train for themselves.
    """
    earlier = job.names if job.shared else job.names[:-1]
    for folder in (job.work, *(checkpoint.finished(name) for name in reversed(earlier))):
        if not (folder / STATE).exists():
            continue
        try:
            losses, said = checkpoint.load_state(folder / STATE, job.names, job.state.modules, job.state.optimizers)
        except UserError as error:
            print(f"{error}; starting over", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
            continue
        if folder != job.work:
            with whole_folder(job.work) as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
        job.record = Record(**{each.name: said[each.name] for each in fields(Record)})
        job.state.step = job.record.step
        job.state.set_losses(torch.stack(losses) if losses else torch.empty(0))
        return
    job.work.mkdir(exist_ok=True)


def begin(
    seed: int, levels: tuple[str, int], split: Split, diffusion: params.Diffusion, network: params.Network, train: params.Train
) -> State:
    """The state before the first step, on the device of the images.

    Args:
        levels: the schedule and T of the noise levels to train at.
    """
    how = diffusion.model_dump(include={"reference_size", "zero_terminal_snr"})
    alpha_bar = shared_levels(size=split.size, **how) if train.shared else noise_levels(*levels, size=split.size, **how)
    on_device = torch.from_numpy(alpha_bar).to(split.images.device)
    values = diffusion.model_dump() | train.model_dump()
    recipe = Recipe(**{each.name: values[each.name] for each in fields(Recipe)})
    torch.manual_seed(seed)
    net = UNet(size=split.size, num_classes=len(split.class_names), **network.model_dump())
    return State.begin(net, recipe, Timetable.of(train.images, train.batch, train.curve_points), on_device, seed)


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


def _split(dataset: str, held_out: int, device: torch.device) -> Split:
    """The train split. Held out is of every class its share, the same in every cell, and never trained on."""
    path = paths.prepared(dataset) / "train.safetensors"
    split, about = load_tensors(path)
    images, labels = split["images"].to(device), split["labels"].to(device)
    if held_out >= len(images):
        raise UserError(f"train.validation_images = {held_out} must be less than the {len(images)} images of {path}")
    order = balanced_order(labels.cpu(), torch.Generator().manual_seed(0)).to(device)
    return Split(images, labels, order[held_out:], order[:held_out], about["class_names"])


def _finite_mean(losses: Tensor, step: int) -> float:
    """Mean of the losses of the steps up to `step`. Raises UserError naming the first step whose loss is not finite."""
    values = losses.double()
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
