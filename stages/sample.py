"""Draw the samples of one cell from the final average of its weights, twice.

The fast set: the same sampler and number of evaluations in every cell. The ancestral set: all T steps. Also a grid with the
classes in order, and an animation of the denoising. Image i is a function of (weights, seed, i) alone.

    python -m stages.sample mnist-cosine-1000-0
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.datasets.images import to_uint8
from stages.diffusion import noise
from stages.diffusion.samplers import SAMPLERS, Steps, clipped_denoiser, spaced_timesteps
from stages.diffusion.schedules import logsnr_shift, noise_levels
from stages.pipeline import checkpoint, figures, params, paths
from stages.pipeline.stage import progress, read_json, run

COLUMNS = 10
FRAMES, SHOWN = 40, 30  # of the animation


@torch.inference_mode()
def main(cell: params.Cell, sample: params.Sample) -> dict[str, Any]:
    """Draw both sets in chunks of one fixed size; a chunk that is asked for in part is drawn whole."""
    device = checkpoint.device()
    checkpoint.check_bf16(sample.precision)
    net, about = checkpoint.load_network(paths.weights(str(cell)) / "ema.safetensors")
    size, prediction, num_classes = about["size"], about["diffusion"]["prediction"], about["num_classes"]
    reference_size = about["diffusion"]["reference_size"]
    shift = logsnr_shift(size, reference_size)
    lowest, highest = (level + shift for level in sample.guidance_interval)
    alpha_bar = torch.from_numpy(noise_levels(cell.schedule, cell.T, size=size, reference_size=reference_size)).to(device)
    counts = read_json(paths.prepared(cell.dataset) / "dataset.json")["images_per_class"]["test"]
    folder, shape = paths.samples(str(cell)), (1, size, size)

    evaluated = 0

    def network(x: Tensor, logsnr: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluated
        evaluated += len(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=sample.precision == "bf16"):
            return net(x, logsnr, y)

    def draw_chunk(first: int, sampler: str, timesteps: list[int], **options: float) -> Steps:
        index = torch.arange(first, first + sample.chunk, device=device)
        y = class_sequence(index, counts)
        denoise = clipped_denoiser(
            network, prediction, y, unlabelled=num_classes, guidance=sample.guidance, guidance_interval=(lowest, highest)
        )

        def noise_at(t: int) -> Tensor:
            return noise.gaussian(cell.seed, index, t, shape)

        return SAMPLERS[sampler](denoise, noise_at(cell.T), alpha_bar, timesteps, noise_at, **options)

    every, spaced = spaced_timesteps(cell.T, cell.T), spaced_timesteps(cell.T, sample.fast.steps)
    sets: dict[str, tuple[int, str, list[int], dict[str, float]]] = {
        "fast": (sample.images, sample.fast.sampler, spaced, {"eta": sample.fast.eta}),
        "ancestral": (sample.ancestral_images, sample.ancestral.sampler, every, {}),
    }
    measured: dict[str, Any] = {}
    for name, (n, sampler, timesteps, options) in sets.items():
        chunks, frames, started, evaluated = [], [], time.perf_counter(), 0
        shown_at = set(timesteps[:: max(1, len(timesteps) // FRAMES)]) | {timesteps[-1]}
        starts = range(0, n, sample.chunk)
        total = len(starts) * len(timesteps)
        with progress(total=total * sample.chunk, unit="eval", label=f"{cell} {name}") as bar:
            for first in starts:
                for t, x, _ in draw_chunk(first, sampler, timesteps, **options):
                    if first == 0 and t in shown_at:
                        frames.append(to_uint8(x[: min(SHOWN, n)]).cpu().numpy())
                    bar.update(sample.chunk)
                chunks.append(to_uint8(x).cpu())
        images, labels = torch.cat(chunks)[:n], class_sequence(torch.arange(n), counts)
        seconds = time.perf_counter() - started
        measured |= {f"{name}_seconds": round(seconds, 2), f"{name}_images_per_sec": round(n / seconds, 2)}

        how: dict[str, Any] = {"sampler": sampler, "steps": len(timesteps), **options}
        how |= {"guidance": sample.guidance, "guidance_interval": [lowest, highest]}
        how["network_evaluations"] = evaluated // (len(starts) * sample.chunk)
        asked = labels if about["network"]["conditional"] else torch.full_like(labels, -1)
        checkpoint.save_tensors(folder / f"{name}.safetensors", {"images": images, "labels": asked}, cell=str(cell), **how)
        if name == "fast":
            figures.save_png(folder / "grid.png", class_grid(images.numpy(), labels.numpy(), num_classes))
        else:
            pictures = [figures.grid(frame, COLUMNS, scale=2) for frame in frames]
            figures.save_gif(folder / "denoising.gif", pictures, milliseconds=80)
    return {**measured, **checkpoint.device_memory()}


def class_sequence(index: Tensor, counts: Sequence[int]) -> Tensor:
    """(N,) int64 labels of sample indices, on their device: the classes at their frequencies in every stretch of indices.

    A multiple of the golden ratio visits the unit interval evenly, so image i has its label whatever N is.
    """
    edges = torch.tensor(counts, dtype=torch.float64, device=index.device).cumsum(0)
    position = (index.double() + 0.5) * ((math.sqrt(5) - 1) / 2) % 1
    return torch.searchsorted(edges / edges[-1], position, right=True)


def class_grid(images: figures.Pixels, labels: NDArray[np.int64], num_classes: int) -> figures.Pixels:
    """Ten images a row: a row for each class; with more than 20 classes two share a row, five images each."""
    each = 10 if num_classes <= 20 else 5
    blank = np.full((each, *images.shape[1:]), 128, np.uint8)
    rows = [np.concatenate([images[labels == y][:each], blank])[:each] for y in range(num_classes)]
    return figures.grid(np.concatenate(rows), COLUMNS, scale=2 if images.shape[-1] < 48 else 1)


if __name__ == "__main__":
    run(main)
