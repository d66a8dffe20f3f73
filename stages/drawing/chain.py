"""From weights, labels and a seed to images. Image i is a function of (weights, seed, i, its label) alone."""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.datasets.images import to_uint8
from stages.diffusion import samplers
from stages.diffusion.brownian import Brownian
from stages.diffusion.guidance import denoiser
from stages.diffusion.samplers import Steps
from stages.diffusion.schedules import logsnr_shift, noise_levels
from stages.diffusion.spacings import spaced
from stages.networks.unet import UNet

FRAMES = 40  # kept of a chain at most

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


class How(NamedTuple):
    """A way to draw: a sampler, the spacing of its steps, their number, the sampler's own options."""

    sampler: str
    spacing: str
    steps: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Guidance:
    """What every chain of a set shares.

    Args:
        strength: of the guidance; 0 is the conditional model.
        interval: log-SNR, for images of the reference size, between which it acts.
        clip_x0: what the network believes of x0, to [-1, 1].
    """

    strength: float
    interval: tuple[float, float]
    clip_x0: bool


@dataclass
class Drawn:
    """A set of images.

    images: (N, C, H, W) uint8.
    frames: moments of the first chunk on the way: where its images stand, and what the network believes of them, each uint8.
    evaluations: of the network, for each image; with guidance a step takes two.
    """

    images: Tensor
    frames: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    evaluations: int = 0


class Chain:
    """A network, and the chains of noise levels that lead from noise to its images.

    Args:
        network: and what its file says of it, as `load_network` gives them.
        schedule, T: whose noise levels the chain visits.
        seed: of the noise.
        counts: how often each class is drawn where `draw` gets no labels: see `class_sequence`.
        chunk: the network always runs on this many images; part of what fixes the bits.
        bf16: precision of the network's arithmetic; else float32.
        workers: how many chunks are drawn side by side on a CPU; no bit depends on it.
    """

    def __init__(
        self,
        network: tuple[UNet, dict[str, Any]],
        schedule: str,
        T: int,
        seed: int,
        *,
        counts: Sequence[int] = (),
        guidance: Guidance,
        chunk: int,
        bf16: bool,
        workers: int,
    ) -> None:
        self.net, self.about = network
        self.device = next(self.net.parameters()).device
        self.workers = workers if self.device.type == "cpu" else 1
        self.seed, self.counts, self.chunk, self.bf16, self.guidance = seed, counts, chunk, bf16, guidance
        self.size = self.about["size"]
        how = {name: self.about["diffusion"][name] for name in ("reference_size", "zero_terminal_snr")}
        self.alpha_bar = torch.from_numpy(noise_levels(schedule, T, size=self.size, **how)).to(self.device)
        shift = logsnr_shift(self.size, self.about["diffusion"]["reference_size"])
        self.guidance_interval = (guidance.interval[0] + shift, guidance.interval[1] + shift)

    def draw(
        self,
        n: int,
        how: How,
        *,
        first: int = 0,
        labels: Tensor | None = None,
        evaluated: Callable[[int], None] = lambda _: None,
    ) -> Drawn:
        """n images, from number `first` on, drawn in chunks of one size; a chunk that is asked for in part is drawn whole.

        On a CPU every worker draws chunks of its own, on one thread: faster than all at one chunk, and the same bits with any
        number of workers.

        Args:
            labels: (n,) int64, what each image is of; without them the classes come at their frequencies.
            evaluated: told, from any thread, of how many images made a step.
        """

        def labels_of(index: Tensor) -> Tensor:
            if labels is None:
                return class_sequence(index, self.counts)
            return labels.to(index.device)[(index - first).clamp(0, n - 1)]  # those around `n` are drawn, and left out

        starts, drawn, stop = range(first - first % self.chunk, first + n, self.chunk), Drawn(torch.empty(0)), threading.Event()
        with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                chunks, evaluations = zip(
                    *pool.map(lambda start: self._chunk(start, labels_of, how, drawn, evaluated, stop), starts), strict=True
                )
            finally:
                stop.set()  # when this thread is interrupted, no other goes on
        drawn.images, drawn.evaluations = torch.cat(chunks)[first - starts[0] :][:n], evaluations[0] // self.chunk
        return drawn

    def _chunk(
        self,
        start: int,
        labels_of: Callable[[Tensor], Tensor],
        how: How,
        drawn: Drawn,
        evaluated: Callable[[int], None],
        stop: threading.Event,
    ) -> tuple[Tensor, int]:
        """The images of a chunk, and for how many images the network was evaluated."""
        runs, shown_at = 0, {round(k * (how.steps - 1) / (FRAMES - 1)) for k in range(FRAMES)}

        def network(x: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
            nonlocal runs
            runs += len(x)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self.net(x, logsnr, y)

        with torch.inference_mode():  # for this thread
            for k, (x, x0_hat) in enumerate(self._steps(network, start, labels_of, how)):
                if start == 0 and k in shown_at:
                    drawn.frames.append((to_uint8(x).cpu(), to_uint8(x0_hat).cpu()))
                evaluated(self.chunk)
                if stop.is_set():
                    break
            return to_uint8(x).cpu(), runs

    def share_of_workers(self, n: int) -> float:
        """Of the workers, the share that has a chunk, in the mean over `draw`: small sets leave some of many idle."""
        chunks = -(-n // self.chunk)
        return chunks / self.workers / -(-chunks // self.workers)

    def asked(self, labels: Tensor) -> Tensor:
        """The labels that were asked for: -1 where the network knows none."""
        return labels if self.about["network"]["conditional"] else torch.full_like(labels, -1)

    def _steps(self, network: Network, start: int, labels_of: Callable[[Tensor], Tensor], how: How) -> Steps:
        index = torch.arange(start, start + self.chunk, device=self.device)
        denoise = denoiser(
            network,
            self.about["diffusion"]["prediction"],
            labels_of(index),
            unlabelled=self.about["num_classes"],
            guidance=self.guidance.strength,
            guidance_interval=self.guidance_interval,
            clip=self.guidance.clip_x0,
        )
        path = spaced(self.alpha_bar, how.steps, how.spacing)
        noise = Brownian(self.seed, index, (1, self.size, self.size), path)
        return samplers.find(how.sampler)(denoise, path, noise, **how.options)


def class_sequence(index: Tensor, counts: Sequence[int]) -> Tensor:
    """(N,) int64 labels of sample indices, on their device: the classes at their frequencies in every stretch of indices.

    A multiple of the golden ratio visits the unit interval evenly, so image i has its label whatever N is.
    """
    edges = torch.tensor(counts, dtype=torch.float64, device=index.device).cumsum(0)
    position = (index.double() + 0.5) * ((math.sqrt(5) - 1) / 2) % 1
    return torch.searchsorted(edges / edges[-1], position, right=True)
