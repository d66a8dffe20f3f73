"""Draw the samples of one cell: two sets from the final average of its weights, and small ones from the averages before it.

The fast set: the same sampler and number of evaluations in every cell. The ancestral set: all T steps. The snapshots: the first
images of the fast set, as they would be at each quarter of the last phase of training. Also a grid with the classes in order,
an animation of the denoising, and moments of it beside what the network believes then. Image i is a function of (weights, seed,
i) alone.

    python -m stages.sample mnist-cosine-1000-0
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.datasets.images import to_uint8
from stages.diffusion import noise, samplers
from stages.diffusion.guidance import denoiser
from stages.diffusion.samplers import Steps
from stages.diffusion.schedules import logsnr_shift, noise_levels
from stages.diffusion.spacings import spaced
from stages.pipeline import checkpoint, figures, params, paths
from stages.pipeline.stage import progress, run

How = tuple[str, str, int, dict[str, Any]]
"""Name of a sampler, of a spacing, number of steps, options of the sampler."""

Frame = tuple[figures.Pixels, figures.Pixels]
"""Where the first images stand, and what the network believes of them, each (N, 1, H, W) uint8."""

Network = Callable[[Tensor, Tensor, Tensor], Tensor]

COLUMNS = 10
FRAMES, SHOWN = 40, 30  # of the animation


def main(cell: params.Cell, sample: params.Sample) -> dict[str, Any]:
    """Draw every set in chunks of one fixed size; a chunk that is asked for in part is drawn whole."""
    checkpoint.check_bf16(sample.precision)
    weights, folder = paths.weights(str(cell)), paths.samples(str(cell))
    counts = class_counts(cell.dataset)
    options = {"eta": sample.fast.eta} if sample.fast.sampler == "ddim" else {}
    fast: How = (sample.fast.sampler, sample.fast.spacing, sample.fast.steps, options)
    ancestral: How = (sample.ancestral.sampler, "trailing", cell.T, {"variance": sample.ancestral.variance})

    # The averages along the way: fast sets, smaller ones.
    labels = class_sequence(torch.arange(sample.images), counts)
    snapshots = []
    for name in ("ema-25", "ema-50", "ema-75"):
        chain = Chain(cell, sample, weights / f"{name}.safetensors", counts)
        images, _, _ = chain.draw(sample.snapshot_images, fast, label=f"{cell} {name}")
        snapshots.append((chain, images))

    # The final average.
    chain = Chain(cell, sample, weights / "ema.safetensors", counts)
    measured: dict[str, Any] = {}
    for name, n, how in (("fast", sample.images, fast), ("ancestral", sample.ancestral_images, ancestral)):
        started = time.perf_counter()
        images, frames, evaluations = chain.draw(n, how, label=f"{cell} {name}")
        seconds = time.perf_counter() - started
        rate = n / seconds / chain.share_of_cores(n)  # as if every core had had a chunk all the time
        measured |= {f"{name}_seconds": round(seconds, 2), f"{name}_images_per_sec": round(rate, 2)}
        sampler, spacing, steps, options = how
        about = {"sampler": sampler, "spacing": spacing, "steps": steps, "network_evaluations": evaluations, **options}
        about |= {"guidance": sample.guidance, "guidance_interval": chain.guidance_interval}
        asked = chain.asked(labels[:n])
        checkpoint.save_tensors(folder / f"{name}.safetensors", {"images": images, "labels": asked}, cell=str(cell), **about)
        if name == "fast":
            snapshots.append((chain, images[: sample.snapshot_images]))
            figures.save_png(folder / "grid.png", class_grid(images.numpy(), labels.numpy(), len(counts)))
        else:
            pictures = [figures.grid(x, COLUMNS, scale=2) for x, _ in frames]
            figures.save_gif(folder / "denoising.gif", pictures, milliseconds=80)
            figures.save_png(folder / "chain.png", chain_picture(frames))
    trained = torch.tensor([chain.about["images"] for chain, _ in snapshots])
    sets = {"images": torch.stack([images for _, images in snapshots]), "trained_images": trained}
    sets["labels"] = chain.asked(labels[: sample.snapshot_images])
    checkpoint.save_tensors(folder / "snapshots.safetensors", sets, cell=str(cell))
    return {**measured, **checkpoint.device_memory()}


class Chain:
    """A network, and the chains of noise levels that lead from noise to its images."""

    def __init__(self, cell: params.Cell, sample: params.Sample, weights: Path, counts: Sequence[int]) -> None:
        self.cell, self.sample, self.counts, self.device = cell, sample, counts, checkpoint.device()
        self.cores = torch.get_num_threads() if self.device.type == "cpu" else 1
        self.net, self.about = checkpoint.load_network(weights)
        self.size = self.about["size"]
        how = {name: self.about["diffusion"][name] for name in ("reference_size", "zero_terminal_snr")}
        self.alpha_bar = torch.from_numpy(noise_levels(cell.schedule, cell.T, size=self.size, **how)).to(self.device)
        shift = logsnr_shift(self.size, self.about["diffusion"]["reference_size"])
        self.guidance_interval = (sample.guidance_interval[0] + shift, sample.guidance_interval[1] + shift)

    def draw(self, n: int, how: How, *, label: str) -> tuple[Tensor, list[Frame], int]:
        """n images, (n, 1, H, W) uint8; frames of the first of them on the way; network evaluations for each image.

        On a CPU every core draws chunks of its own, on one thread: faster than all at one chunk, and the same bits on any
        number of cores.
        """
        chunk, steps = self.sample.chunk, how[2]
        starts, frames, stop = range(0, n, chunk), [], threading.Event()
        shown_at = {round(k * (steps - 1) / (FRAMES - 1)) for k in range(FRAMES)}
        with (
            progress(total=len(starts) * steps * chunk, unit="eval", label=label) as bar,
            ThreadPoolExecutor(self.cores, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):

            def one(first: int) -> tuple[Tensor, int]:
                evaluated = 0

                def network(x: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
                    nonlocal evaluated
                    evaluated += len(x)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.sample.precision == "bf16"):
                        return self.net(x, logsnr, y)

                with torch.inference_mode():  # for this thread
                    for k, (x, x0_hat) in enumerate(self._steps(network, first, *how)):
                        if first == 0 and k in shown_at:
                            frames.append((_shown(x, n), _shown(x0_hat, n)))
                        with bar.get_lock():
                            bar.update(chunk)
                        if stop.is_set():
                            break
                    return to_uint8(x).cpu(), evaluated

            try:
                chunks, evaluated = zip(*pool.map(one, starts), strict=True)
            finally:
                stop.set()  # when this thread is interrupted, no other goes on
        return torch.cat(chunks)[:n], frames, evaluated[0] // chunk

    def share_of_cores(self, n: int) -> float:
        """Of the cores, the share that has a chunk, in the mean over `draw`: small sets leave some of many idle."""
        chunks = -(-n // self.sample.chunk)
        return chunks / self.cores / -(-chunks // self.cores)

    def asked(self, labels: Tensor) -> Tensor:
        """The labels that were asked for: -1 where the network knows none."""
        return labels if self.about["network"]["conditional"] else torch.full_like(labels, -1)

    def _steps(self, network: Network, first: int, sampler: str, spacing: str, steps: int, options: dict[str, Any]) -> Steps:
        index = torch.arange(first, first + self.sample.chunk, device=self.device)
        denoise = denoiser(
            network,
            self.about["diffusion"]["prediction"],
            class_sequence(index, self.counts),
            unlabelled=self.about["num_classes"],
            guidance=self.sample.guidance,
            guidance_interval=self.guidance_interval,
            clip=self.sample.clip_x0,
        )
        path = spaced(self.alpha_bar, steps, spacing)

        def noise_at(after: int) -> Tensor:
            return noise.gaussian(self.cell.seed, index, after, (1, self.size, self.size))

        return samplers.find(sampler)(denoise, noise_at(self.cell.T), path, noise_at, **options)


def class_counts(dataset: str) -> list[int]:
    """How many test images there are of each class: at these frequencies samples are drawn."""
    test, about = checkpoint.load_tensors(paths.prepared(dataset) / "test.safetensors")
    return torch.bincount(test["labels"], minlength=len(about["class_names"])).tolist()


def class_sequence(index: Tensor, counts: Sequence[int]) -> Tensor:
    """(N,) int64 labels of sample indices, on their device: the classes at their frequencies in every stretch of indices.

    A multiple of the golden ratio visits the unit interval evenly, so image i has its label whatever N is.
    """
    edges = torch.tensor(counts, dtype=torch.float64, device=index.device).cumsum(0)
    position = (index.double() + 0.5) * ((math.sqrt(5) - 1) / 2) % 1
    return torch.searchsorted(edges / edges[-1], position, right=True)


def chain_picture(frames: list[Frame]) -> figures.Pixels:
    """Four images at ten moments of their chain: in each pair of rows x_t above, x0_hat below."""
    moments = [frames[round(k * (len(frames) - 1) / (COLUMNS - 1))] for k in range(COLUMNS)]
    rows = [pictures[i] for i in range(min(4, len(frames[0][0]))) for kind in (0, 1) for pictures in (m[kind] for m in moments)]
    return figures.grid(np.stack(rows), COLUMNS, scale=2)


def class_grid(images: figures.Pixels, labels: NDArray[np.int64], num_classes: int) -> figures.Pixels:
    """Ten images a row: a row for each class; with more than 20 classes two share a row, five images each."""
    each = 10 if num_classes <= 20 else 5
    blank = np.full((each, *images.shape[1:]), 128, np.uint8)
    rows = [np.concatenate([images[labels == y][:each], blank])[:each] for y in range(num_classes)]
    return figures.grid(np.concatenate(rows), COLUMNS, scale=2 if images.shape[-1] < 48 else 1)


def _shown(x: Tensor, n: int) -> figures.Pixels:
    return to_uint8(x[: min(SHOWN, n)]).cpu().numpy()


if __name__ == "__main__":
    run(main)
