"""Train one network: it serves the cells of every T of its dataset, schedule and seed.

Reads the train split, the validation split for the validation loss, and the weights to begin with, if any. Writes the final
average of the weights (what gets sampled), the raw ones, previews.zip with a grid before it and one for each report, and the loss
curve.

    python -m stages.train mnist-cosine-0
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
from stages.diffusion.process import logsnr
from stages.diffusion.schedules import Alphas, noise_levels, shared_levels, trained_at
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.fidelity.rounding import significant
from stages.networks.unet import UNet
from stages.pipeline import checkpoint, grids, params, paths
from stages.pipeline.files import sha256, whole_file, whole_files, whole_folder, write_archive
from stages.pipeline.preview import preview
from stages.pipeline.stage import Listener, peak_memory, progress, run
from stages.tracking.live import Followed
from stages.training.beginning import take
from stages.training.draws import batch_of_step
from stages.training.errors import validate
from stages.training.recipe import Recipe
from stages.training.state import State
from stages.training.step import rate_of_step, train_step
from stages.training.timetable import Timetable

# The code that decides the bits of a training, in stages/: what dvc.yaml says it depends on, beside its schedule.
CODE = (
    "train",
    "datasets/images",
    "diffusion/by_name",
    "diffusion/process",
    "diffusion/schedules/__init__",
    "fidelity/rounding",
    *(f"networks/{n}" for n in ("balance", "ema", "muon", "unet")),
    *(f"training/{n}" for n in ("beginning", "draws", "errors", "recipe", "state", "step", "timetable")),
)
STATE = "state.safetensors"  # all that an unfinished training needs to go on


def main(
    training: params.Training,
    diffusion: params.Diffusion,
    network: params.Network,
    train: params.Train,
    runtime: params.Runtime,
    listener: Listener,
) -> dict[str, Any]:
    """Train with the whole split resident as one uint8 tensor; the randomness of a step is a function of (seed, step).

    So a killed training goes on from its last checkpoint to the same bits, and one with a phase more from the finished phases
    before it, where they are still there. A shared network is trained for the first schedule of its dataset and seed; the
    others find it finished and take it.
    """
    train = train.of(training.dataset)
    torch.set_num_threads(train.threads)
    checkpoint.check_bf16(train.precision)
    _set_kernels(train.deterministic)

    # Read the images and build the network. What is needed to build it again travels with the weights.
    split = _split(training.dataset, train.validation_images, checkpoint.device())
    state = begin(training, split, diffusion, network, train)
    begun_with, left = _take(state, split.class_names)
    about = {"levels": levels_name(training, train), "logsnr": logsnr(state.alpha_bar[[-1, 0]]).tolist(), "seed": training.seed}
    about |= {"size": split.size, "num_classes": len(split.class_names), "class_names": split.class_names}
    about |= {"network": network.model_dump(), "diffusion": diffusion.model_dump(), "train": train.model_dump(), **begun_with}
    names = _fingerprints(training, diffusion, network, train)

    # Train, from where an earlier process was stopped.
    with checkpoint.unfinished(names[-1]) as work:
        job = Job(str(training), state, split, work, names, train.shared, about)
        taken = _resume(job, left)
        _train(job, listener, runtime.checkpoint_seconds)
        _publish(job)
    if taken:
        return {}
    record = job.record
    rate = round(state.step * train.batch / record.seconds, 1)
    return {"seconds": round(job.elapsed(), 2), "images_per_sec": rate, "by_step": record.clock}


class Split(NamedTuple):
    """On the device: (N, C, H, W) uint8 images to train on, (N,) int64 labels, and the same of those that are held out."""

    images: Tensor
    labels: Tensor
    held_out: tuple[Tensor, Tensor]
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
    elapsed: float = 0.0  # of all, those of earlier processes too
    machines: list[dict[str, str]] = field(default_factory=list)  # what took part: a training may go on elsewhere
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of what is in weights/, by name


@dataclass
class Job:
    """A training under way.

    Attributes:
        work: the folder that it writes to until it is over.
        names: the fingerprints of its state after each phase.
        about: what is written beside the weights.
    """

    name: str
    state: State
    split: Split
    work: Path
    names: list[str]
    shared: bool
    about: dict[str, Any]
    record: Record = field(default_factory=Record)
    since: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds of the whole training, those before this process too."""
        return self.record.elapsed + time.perf_counter() - self.since

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
    for step in progress(steps, total=timetable.end, initial=state.step, unit="step", label=job.name):
        chosen = batch_of_step(step, state.recipe.batch, len(split.labels), state.seed, split.labels.device)
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
    val_loss = validate(state.errors_of, state.average, *split.held_out, len(state.alpha_bar))
    row: dict[str, float] = {"step": state.step, "images": state.step * state.recipe.batch, "lr": rate_of_step(state, state.step)}
    row |= {"train_loss": train_loss, "val_loss": val_loss}
    record.curve.append({key: value if isinstance(value, int) else float(significant(value)) for key, value in row.items()})
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
    about = {**asdict(job.record), "elapsed": job.elapsed(), "fingerprint": fingerprint}
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
    with whole_files(paths.weights(job.name)) as folder:
        about = job.about | {"images": job.state.step * job.state.recipe.batch, "machines": job.record.machines}
        for name, net in (("ema", job.state.average), ("raw", job.state.net)):
            checkpoint.save_tensors(folder / f"{name}.safetensors", net.state_dict(), **about)
        write_archive(folder / "previews.zip", job.weights / "previews")
    _write_curve(paths.loss_curve(job.name), job.record.curve)


def _resume(job: Job, left: list[str]) -> bool:
    """Set the state to where the training stands; whether it is that of a shared network, and over already.

    `left`: parts of the network that do not begin with the weights of train.init.
    """
    _restore(job)
    step, end = job.state.step, job.state.timetable.end
    taken = job.shared and step == end
    here, machines = checkpoint.machine(), job.record.machines
    if taken:
        print(f"{job.name}: takes the network that is trained already", flush=True)
    elif step:
        print(f"{job.name}: going on from step {step} of {end}", flush=True)
        if here != machines[-1]:
            print(f"{job.name}: begun on {_told(machines[-1])}, here it is {_told(here)}: the bits will be of both", flush=True)
    else:
        if init := job.about["train"]["init"]:
            print(f"{job.name}: begins with the weights of {init}{', but for ' + ', '.join(left) if left else ''}", flush=True)
        _draw(job, 0)
    if not taken and here not in machines[-1:]:
        machines.append(here)
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


def _told(machine: dict[str, str]) -> str:
    return f"{machine['processor']} with torch {machine['torch']}"


def begin(
    training: params.Training, split: Split, diffusion: params.Diffusion, network: params.Network, train: params.Train
) -> State:
    """The state before the first step, on the device of the images."""
    on_device = torch.from_numpy(levels(training, split.size, diffusion, train)).to(split.images.device)
    values = diffusion.model_dump() | train.model_dump()
    recipe = Recipe(**{each.name: values[each.name] for each in fields(Recipe)})
    torch.manual_seed(training.seed)
    net = UNet(size=split.size, num_classes=len(split.class_names), **network.model_dump())
    timetable = Timetable.of(train.images, train.batch, train.curve_points)
    return State.begin(net, recipe, timetable, on_device, training.seed)


def _take(state: State, class_names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Begin with the weights of train.init, where it names some.

    Returns:
        what the file of the new weights says of them, and the parts of the network that begin with random ones all the same.
    """
    weights, about = load_tensors(paths.INIT)
    if not weights:
        return {}, []
    left = take(state.net, class_names, state.recipe.prediction, weights, about)
    state.average.load_state_dict(state.net.state_dict())
    return {"init_sha256": about["sha256"]}, left


def levels(training: params.Training, size: int, diffusion: params.Diffusion, train: params.Train) -> Alphas:
    """alpha_bar of the noise levels to train at, (T,) float64: T is large where they are as good as continuous."""
    how = diffusion.model_dump(include={"reference_size", "zero_terminal_snr"})
    if train.shared:
        return shared_levels(size=size, **how)
    return noise_levels(training.schedule, trained_at(training.schedule, train.timesteps), size=size, **how)


def levels_name(training: params.Training, train: params.Train) -> str:
    """Whose noise levels a network learns: what its file says, and nothing more of the schedule."""
    return "shared" if train.shared else training.schedule


def _fingerprints(
    training: params.Training, diffusion: params.Diffusion, network: params.Network, train: params.Train
) -> list[str]:
    """What the state of this training is known by after each of its phases: a hash of all that leads there.

    But for the machine, which the state itself tells.
    """
    code = CODE if train.shared else (*CODE, f"diffusion/schedules/{training.schedule}")
    folder = paths.prepared(training.dataset)
    files = [folder / "train.safetensors", folder / "validation.safetensors", paths.INIT]
    files += [Path(__file__).parent / f"{name}.py" for name in code]
    values = [training.dataset, levels_name(training, train), training.seed, diffusion.model_dump(), network.model_dump()]
    values.append(train.model_dump(exclude={"images"}))
    return [checkpoint.fingerprint(files, *values, train.images[: k + 1]) for k in range(len(train.images))]


def _split(dataset: str, held_out: int, device: torch.device) -> Split:
    """The train split, and so many images of the validation split, or all if they are fewer.

    Of every class its share, the same in every cell.
    """
    files = [paths.prepared(dataset) / f"{name}.safetensors" for name in ("train", "validation")]
    (train, about), (validation, _) = map(load_tensors, files)
    rows = balanced_order(validation["labels"], torch.Generator().manual_seed(0))[:held_out]
    picked = validation["images"][rows].to(device), validation["labels"][rows].to(device)
    return Split(train["images"].to(device), train["labels"].to(device), picked, about["class_names"])


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
        writer.writerows(
            {key: value if isinstance(value, int) else significant(value) for key, value in row.items()} for row in curve
        )


if __name__ == "__main__":
    run(main, Followed)
