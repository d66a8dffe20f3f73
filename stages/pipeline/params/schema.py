"""What params.yaml may hold: every value frozen, typed and checked; no default in Python, but for sections of data."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from stages.diffusion import by_name, schedules
from stages.errors import UserError
from stages.pipeline.params.data import SECTIONS, Count, DataSection, DatasetName, MixData, Section, Seed, Text
from stages.pipeline.params.wording import short

MOST_CELLS, MOST_NAMES = 10_000, 50
LEAST_SIGNAL = 1e-53  # alpha_bar; a chain that starts far below has no Brownian path (diffusion/brownian.py)

SetSize = Annotated[int, Field(ge=4, le=10**9)]  # of images that are scored: precision and recall look at three neighbours of each
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Axis = Field(min_length=1, max_length=1000)
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]


def _as_phases(value: Any) -> Any:
    if isinstance(value, list) and len(value) < 2:
        raise ValueError(f"{short(value)} must be a number, or a list of two phases or more")
    return value if isinstance(value, list) else [value]


# A list of phases, written as a number where there is but one.
Phases = Annotated[
    list[Count],
    Field(max_length=1000),
    BeforeValidator(_as_phases),
    PlainSerializer(lambda phases: phases if phases[1:] else phases[0]),
]


def _name_in(folder: str) -> AfterValidator:
    """Refuses what is no file of `schedules` or `samplers`; a new file is known without a word here."""

    def known(name: str) -> str:
        if name not in (names := by_name.names(folder)):
            raise PydanticCustomError("unknown_name", "input should be one of {names}", {"names": ", ".join(names)})
        return name

    return AfterValidator(known)


class Sweep(Section):
    """What is varied: one cell per combination."""

    datasets: Annotated[list[DatasetName], Axis]
    schedules: Annotated[list[Annotated[str, _name_in("schedules")]], Axis]
    timesteps: Annotated[list[Annotated[int, Field(ge=2, le=100_000)]], Axis]
    seeds: Annotated[list[Seed], Axis]

    @model_validator(mode="after")
    def _each_value_once(self) -> "Sweep":
        for axis in ("datasets", "schedules", "timesteps", "seeds"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis} = {short(values)} names a value twice; each may appear once")
        return self

    @model_validator(mode="after")
    def _not_too_many(self) -> "Sweep":
        cells = len(self.datasets) * len(self.schedules) * len(self.timesteps) * len(self.seeds)
        if cells > MOST_CELLS:
            raise ValueError(f"{cells:,} cells are too many; shorten its lists to at most {MOST_CELLS:,} combinations")
        return self

    @model_validator(mode="after")
    def _every_schedule_has_a_start_and_betas_inside_0_1(self) -> "Sweep":
        for name, T in itertools.product(self.schedules, {min(self.timesteps), max(self.timesteps)}):
            if (left := schedules.find(name)(T)[-1]) < LEAST_SIGNAL:
                raise ValueError(
                    f"schedule {name!r} ends at alpha_bar = {left:.0e} at T = {T}, and must at {LEAST_SIGNAL:g} or more; "
                    "use a smaller T, or 'linear', which is rescaled with T"
                )
        return self

    def cells(self) -> Iterator["Cell"]:
        """The cells, in DVC's order."""
        for values in itertools.product(self.datasets, self.schedules, self.timesteps, self.seeds):
            yield Cell(*values)

    def trainings(self) -> Iterator["Training"]:
        """The trainings, in DVC's order."""
        for values in itertools.product(self.datasets, self.schedules, self.seeds):
            yield Training(*values)


class Extractor(Section):
    """How the classifier of a dataset is trained."""

    images: Count
    batch: Count
    lr: Positive
    seed: Seed


class Diffusion(Section):
    """Choices of the process that training and sampling share."""

    prediction: Literal["eps", "x0", "v"]
    weighting: Literal["simple", "balanced", "min_snr", "variational"]
    reference_size: Count | None
    zero_terminal_snr: bool

    @model_validator(mode="after")
    def _eps_says_something(self) -> "Diffusion":
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ValueError(
                "zero_terminal_snr = True cannot go with prediction = 'eps': at a zero SNR, eps says nothing of x0; "
                "use prediction: v or x0"
            )
        return self


class Network(Section):
    """Size of the U-Net."""

    stem_resolution: Annotated[int, Field(ge=4, le=1024)]
    base_channels: Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
    channel_mult: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=4)]
    blocks_per_level: Annotated[int, Field(ge=1, le=64)]
    attention_levels: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=4)]
    conditional: bool

    @model_validator(mode="after")
    def _levels_exist(self) -> "Network":
        levels = len(self.channel_mult)
        if any(level >= levels for level in self.attention_levels):
            raise ValueError(
                f"attention_levels = {short(self.attention_levels)} must lie in 0..{levels - 1}: channel_mult has {levels} entries"
            )
        return self


class Train(Section):
    """Optimisation; lengths are counted in images. `images` is a list of phases, each a learning-rate schedule of its own.

    `longer` names datasets that train so many times as long; `init` a cell, or a file of weights, to begin with.
    """

    shared: bool
    timesteps: Annotated[int, Field(ge=2, le=100_000)] | None
    init: Text | None
    threads: Annotated[int, Field(ge=1, le=1024)]
    images: Phases
    longer: dict[DatasetName, Count]
    batch: Count
    optimizer: Literal["muon", "adam"]
    lr: Positive
    halve_lr_every: Count | None
    warmup_images: Annotated[int, Field(ge=0, le=10**9)]
    grad_clip: Positive
    label_dropout: Fraction
    precision: Precision
    ema_halflife: Fraction
    validation_images: Count
    curve_points: Annotated[int, Field(ge=1, le=10_000)]
    deterministic: bool

    def of(self, dataset: str) -> "Train":
        """The section as one dataset sees it: `images` multiplied, `longer` empty."""
        times = self.longer.get(dataset, 1)
        return self.model_copy(update={"images": [images * times for images in self.images], "longer": {}})


class FastSampler(Section):
    """The sampler of the headline score: the same number of steps in every cell."""

    sampler: Annotated[str, _name_in("samplers")]
    spacing: Literal["trailing", "leading", "linspace", "even_logsnr", "karras", "shifted_cosine"]
    steps: Count
    eta: Fraction

    @model_validator(mode="after")
    def _eta_is_of_ddim(self) -> "FastSampler":
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta = {self.eta:g} is an option of ddim alone; with sampler = {self.sampler!r} it must be 0")
        return self


class AncestralSampler(Section):
    """The sampler that takes all T steps."""

    sampler: Literal["ddpm"]
    variance: Literal["posterior", "beta"]


class Sample(Section):
    """What is drawn, and how."""

    seed: Seed
    images: SetSize
    ancestral_images: Count
    guidance: NonNegative
    guidance_interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    clip_x0: bool
    precision: Precision
    chunk: Count
    fast: FastSampler
    ancestral: AncestralSampler

    @model_validator(mode="after")
    def _fast_set_is_the_largest(self) -> "Sample":
        if self.ancestral_images > self.images:
            raise ValueError(f"ancestral_images = {self.ancestral_images} must be at most images = {self.images}")
        return self

    @model_validator(mode="after")
    def _interval_rises(self) -> "Sample":
        lowest, highest = self.guidance_interval
        if not lowest < highest:
            raise ValueError(f"guidance_interval = {self.guidance_interval} must be [lowest, highest] log-SNR, rising")
        return self


class Evaluate(Section):
    """What is measured."""

    images: Count
    draws: Annotated[int, Field(ge=1, le=10_000)]
    logsnr: Annotated[list[Annotated[float, Field(ge=-20, le=20)]], Field(min_length=1, max_length=1000)]
    min_scored: SetSize
    seed: Seed


class Runtime(Section):
    """What cannot change a result."""

    experiment: Text
    checkpoint_seconds: NonNegative


class Params(Section):
    """The whole of params.yaml."""

    sweep: Sweep
    data: dict[DatasetName, DataSection]
    extractor: Extractor
    diffusion: Diffusion
    network: Network
    train: Train
    sample: Sample
    evaluate: Evaluate
    runtime: Runtime

    @model_validator(mode="after")
    def _swept_datasets_exist(self) -> "Params":
        for name in self.sweep.datasets:
            if name not in self.data:
                raise ValueError(f"sweep.datasets names {name!r}, which is no section of data; there are: {', '.join(self.data)}")
            for key, section in parts(f"data.{name}", self.data[name]):
                ways = {"hoda": ["path"], "archive": ["path", "url", "drive"]}.get(section.reader, [])
                if ways and not any(getattr(section, way) for way in ways):
                    raise ValueError(f"{key}: say where its files are, in {' or '.join(ways)}")
        return self

    @model_validator(mode="after")
    def _longer_trained_datasets_exist(self) -> "Params":
        for name in self.train.longer:
            if name not in self.data:
                raise ValueError(f"train.longer names {name!r}, which is no section of data; there are: {', '.join(self.data)}")
        return self

    @model_validator(mode="after")
    def _fast_steps_fit(self) -> "Params":
        if self.sample.fast.steps > min(self.sweep.timesteps):
            raise ValueError(
                f"sample.fast.steps = {self.sample.fast.steps} must be at most the smallest of sweep.timesteps "
                f"({min(self.sweep.timesteps)})"
            )
        return self

    @model_validator(mode="after")
    def _zero_terminal_snr_fits(self) -> "Params":
        if self.diffusion.zero_terminal_snr:
            fast = self.sample.fast
            if fast.sampler == "heun" or fast.spacing in ("even_logsnr", "karras"):
                raise ValueError(
                    f"diffusion.zero_terminal_snr = True cannot go with sample.fast.sampler = {fast.sampler!r} and "
                    f"sample.fast.spacing = {fast.spacing!r}: sigma is infinite there; use another sampler, spacing: trailing"
                )
            if self.train.shared or not self.train.timesteps:
                raise ValueError(
                    "diffusion.zero_terminal_snr = True needs train.shared: false and train.timesteps, 1000 say: among continuous "
                    "noise levels a network would hardly ever see a zero SNR"
                )
        return self

    @model_validator(mode="after")
    def _levels_are_one_kind(self) -> "Params":
        if self.train.shared and self.train.timesteps:
            raise ValueError(
                f"train.timesteps = {self.train.timesteps} cannot go with train.shared = True, whose network learns every noise "
                "level; set train.timesteps: null"
            )
        for name in self.sweep.schedules if self.train.timesteps else ():
            schedules.find(name)(self.train.timesteps or 0)
        return self

    @model_validator(mode="after")
    def _guidance_has_two_models(self) -> "Params":
        if self.sample.guidance > 0 and not (self.network.conditional and self.train.label_dropout > 0):
            raise ValueError(
                f"sample.guidance = {self.sample.guidance:g} needs network.conditional: true and train.label_dropout > 0; "
                "set sample.guidance: 0"
            )
        return self


def parts(key: str, section: DataSection) -> Iterator[tuple[str, Any]]:
    """The dotted key and the section of a dataset, or of each of those that a mix is made of."""
    if isinstance(section, MixData):
        for name, part in section.of.items():
            yield from parts(f"{key}.of.{name}", part)
    else:
        yield key, section


@dataclass(frozen=True)
class Cell:
    """One point of the sweep; its name is DVC's matrix key."""

    dataset: str
    schedule: str
    T: int
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}-{self.schedule}-{self.T}-{self.seed}"

    @property
    def training(self) -> "Training":
        """Where its network comes from."""
        return Training(self.dataset, self.schedule, self.seed)


@dataclass(frozen=True)
class Training:
    """One network of the sweep: it serves the cells of every T. Its name is DVC's matrix key."""

    dataset: str
    schedule: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}-{self.schedule}-{self.seed}"


def find_cell(params: Params, name: str) -> Cell:
    """The cell of that name. Raises UserError when the sweep has none."""
    return _find("cell", params.sweep.cells(), name)


def find_training(params: Params, name: str) -> Training:
    """The training of that name. Raises UserError when the sweep has none."""
    return _find("network", params.sweep.trainings(), name)


Item = TypeVar("Item", Cell, Training)


def _find(what: str, items: Iterable[Item], name: str) -> Item:
    found = {str(item): item for item in items}
    if name not in found:
        more = f" and {len(found) - MOST_NAMES} more" * (len(found) > MOST_NAMES)
        raise UserError(f"params.yaml: the sweep has no {what} {short(name)}; it has: {', '.join(list(found)[:MOST_NAMES])}{more}")
    return found[name]


def section_at(loc: tuple[Any, ...]) -> Any:
    """The model of the section at a pydantic location."""
    if loc[0:1] == ("data",):
        return {section.model_fields["reader"].annotation.__args__[0]: section for section in SECTIONS}[loc[-1]]  # type: ignore[union-attr]
    model: Any = Params
    for part in loc:
        model = model.model_fields[part].annotation
    return model
