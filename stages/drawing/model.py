"""A trained network to draw with, in three lines of Python; torch, numpy and safetensors are all that it needs.

    from stages.drawing.model import load

    model = load("mnist-cosine-1000-0")  # a cell that was trained in this folder; or a .safetensors file that `train` wrote
    images = model.draw([7, 7, 3], seed=0)  # (3, 1, 28, 28) uint8

`model.class_names` are the classes. Image i is a function of (network, settings, seed, i, its label) alone: the same however many
are drawn. `make draw` does the same from the command line, and writes PNGs.
"""

import operator
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor

from stages.diffusion import samplers
from stages.diffusion.spacings import SPACINGS
from stages.drawing import place
from stages.drawing.chain import Chain, Guidance, How
from stages.drawing.network import load_network
from stages.drawing.weights import tensors_sha256
from stages.errors import UserError
from stages.networks.unet import UNet

MOST_NAMED = 50  # classes in an error
IN_SIGMA = ("even_logsnr", "karras")  # spacings that need an SNR above zero; so does heun

Label = str | SupportsIndex | None


def load(name: str | Path) -> "Model":
    """The network of a cell that was trained below the current folder, or of a .safetensors file that `train` wrote.

    A cell, DATASET-SCHEDULE-T-SEED, says whose noise levels are visited, and T. For a file it is the schedule that the network was
    trained on (cosine, if it was for all), at T = 1000. Raises UserError when there is no such cell or file, or it is damaged.
    """
    if Path(name).suffix == ".safetensors":
        net, about = load_network(Path(name))
        schedule = about["levels"]
        return Model(str(name), net, about, "cosine" if schedule == "shared" else schedule, 1000)
    named = place.named(str(name))
    if named is None:
        raise UserError(f"{str(name)!r} is neither a cell, as mnist-cosine-1000-0 is, nor a .safetensors file")
    path = place.network(named.training) / place.EMA
    if not path.exists():
        there = sorted(file.parent.name for file in place.network("*").parent.glob(f"*/{place.EMA}"))
        raise UserError(f"{path} is missing; `make repro CELL={name}` makes it; networks here: {', '.join(there) or 'none'}")
    return Model(str(name), *load_network(path), named.schedule, named.T)


class Model:
    """A trained network, and the chain of noise levels that it draws along.

    Args:
        name: what errors call it.
        net, about: as `load_network` gives them.
        schedule, T: whose noise levels are visited.
    """

    def __init__(self, name: str, net: UNet, about: dict[str, Any], schedule: str, T: int) -> None:
        self.name, self.net, self.about, self.schedule, self.T = name, net, about, schedule, T
        self.class_names: list[str] = about["class_names"]
        self.conditional = bool(about["network"]["conditional"])

    @property
    def sha256(self) -> str:
        """SHA-256 of the network's weights and of all that its file says of it."""
        return tensors_sha256({name: tensor.cpu() for name, tensor in self.net.state_dict().items()}, self.about)

    def draw(
        self,
        labels: Iterable[Label],
        *,
        seed: int = 0,
        first: int = 0,
        sampler: str = "sde_dpm_solver_pp_2m",
        spacing: str = "shifted_cosine",
        steps: int = 14,
        eta: float = 0.0,
        variance: Literal["posterior", "beta"] = "posterior",
        guidance: float = 0.8,
        guidance_interval: Sequence[float] = (-0.4, 2.6),
        clip_x0: bool = True,
        precision: Literal["fp32", "bf16"] = "fp32",
        chunk: int = 32,
        workers: int | None = None,
        evaluated: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """(N, C, H, W) uint8 images on the CPU, 0 black and 255 white: one for each label.

        Args:
            labels: class names, or class numbers from 0; None draws without telling the network a class.
            seed: of the noise.
            first: number of the first image: a large set can be drawn in parts, and is the same set.
            sampler, spacing, steps, eta, variance, guidance, guidance_interval, clip_x0, precision, chunk: as in params.yaml.
                "ddpm" with all T steps and the spacing "trailing" is ancestral sampling.
            workers: how many chunks are drawn side by side on a CPU; without it as many as torch has threads. No bit depends on it.
            evaluated: told, from any thread, of how many images made a step.

        Raises:
            UserError: a label or a setting that cannot be.
        """
        y = self._numbers(list(labels))
        for what, value, known in (
            ("sampler", sampler, samplers.names()),
            ("spacing", spacing, SPACINGS),
            ("variance", variance, ("posterior", "beta")),
            ("precision", precision, ("fp32", "bf16")),
        ):
            _check(value in known, f"{what} = {value!r} must be one of {', '.join(known)}")
        _check(0 <= seed < 2**31 and first >= 0, f"seed = {seed} must lie in 0..2147483647, and first = {first} be 0 or more")
        _check(1 <= steps <= self.T, f"steps = {steps} must lie in 1..{self.T}, the T of {self.name}")
        _check(chunk >= 1 and guidance >= 0, f"chunk = {chunk} must be 1 or more, and guidance = {guidance} 0 or more")
        _check(0 <= eta <= 1 and (not eta or sampler == "ddim"), f"eta = {eta} must be 0, or with ddim lie in 0..1")
        _check(
            not guidance or (self.conditional and self.about["train"]["label_dropout"] > 0),
            f"guidance = {guidance} needs a network with and without labels, and {self.name} has network.conditional: false or "
            "train.label_dropout: 0; set guidance to 0",
        )
        lowest, highest = guidance_interval
        how_guided = Guidance(guidance, (lowest, highest), clip_x0)
        bf16, workers = precision == "bf16", workers or torch.get_num_threads()
        network = (self.net, self.about)
        try:
            chain = Chain(network, self.schedule, self.T, seed, guidance=how_guided, chunk=chunk, bf16=bf16, workers=workers)
        except ValueError as error:  # the schedule has no such T
            raise UserError(f"{self.name}: {error}") from None
        _check(
            bool(chain.alpha_bar[-1] > 0) or (sampler != "heun" and spacing not in IN_SIGMA),
            f"{self.name} starts at a zero SNR, where heun, {' and '.join(IN_SIGMA)} cannot; use 'trailing', another sampler",
        )
        options = {"eta": eta} if sampler == "ddim" else {"variance": variance} if sampler == "ddpm" else {}
        return chain.draw(len(y), How(sampler, spacing, steps, options), first=first, labels=y, evaluated=evaluated).images

    def _numbers(self, labels: Sequence[Label]) -> Tensor:
        """(N,) int64 labels as the network is told them."""
        _check(bool(labels), "no labels: draw needs one for each image")
        if not self.conditional and any(label is not None for label in labels):
            raise UserError(f"{self.name} was never told a label (network.conditional: false); draw it with None for each image")
        untold: int = self.about["num_classes"]
        return torch.tensor([untold if label is None else class_number(label, self.class_names) for label in labels])


def class_number(label: str | SupportsIndex, class_names: Sequence[str]) -> int:
    """The number of a class. A text is its name, else its number; a number is its number.

    Digits of any script are one number: a class named 5 is also ۵. Where all names are numbers, a text that is none of them is no
    class. Raises UserError, with the classes that there are, where it is none of them.
    """
    numbered = {int(name): y for y, name in reversed(list(enumerate(class_names))) if _is_number(name)}
    number = None
    if not isinstance(label, str):
        number = operator.index(label)
    elif (name := unicodedata.normalize("NFC", label)) in class_names:
        number = class_names.index(name)
    elif _is_number(name):
        number = numbered.get(int(name), int(name) if len(numbered) < len(class_names) else None)
    if number is None or not 0 <= number < len(class_names):
        raise UserError(f"there is no class {label!r}; there are: {listed(class_names)}")
    return number


def listed(class_names: Sequence[str]) -> str:
    """The classes, each with its number where names are no numbers; the first of many."""
    alone = all(map(_is_number, class_names))  # then no number is another class
    shown = [name if alone else f"{name} ({y})" for y, name in enumerate(class_names[:MOST_NAMED])]
    return ", ".join(shown) + f" and {len(class_names) - MOST_NAMED} more" * (len(class_names) > MOST_NAMED)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _check(holds: bool, mistake: str) -> None:
    if not holds:
        raise UserError(mistake)
