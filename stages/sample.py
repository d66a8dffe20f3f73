"""Draw the samples of one cell: two sets from the final average of its weights.

The fast set: the same sampler and number of evaluations in every cell. The ancestral set: all T steps. Also a grid with the
classes in order, an animation of the denoising, and moments of it beside what the network believes then. Image i is a function of
(weights, sample.seed, i) alone; its noise is one Brownian path, the same in every cell and in both sets, so that cells compare
image by image.

    python -m stages.sample mnist-cosine-1000-0
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.drawing.chain import Chain, Drawn, Guidance, How, class_sequence
from stages.drawing.network import load_network
from stages.drawing.weights import load_tensors
from stages.pipeline import checkpoint, grids, params, paths, processes
from stages.pipeline.checkpoint import save_tensors
from stages.pipeline.stage import progress, run
from stages.tracking.mirror import Failing

COLUMNS, SHOWN = 10, 30  # images in a row of a picture, and of the animation


def main(cell: params.Cell, sample: params.Sample) -> dict[str, Any]:
    """Draw both sets and the pictures."""
    checkpoint.check_bf16(sample.precision)
    counts = class_counts(cell.dataset)
    labels = class_sequence(torch.arange(sample.images), counts)
    fast, ancestral = ways(sample, cell.T)

    chain = chain_of(cell, sample, paths.weights(str(cell.training)) / "ema.safetensors", counts)
    few, measured = _set(cell, chain, "fast", labels, fast)
    folder = paths.samples(str(cell))
    grids.save_png(folder / "grid.png", class_grid(few.images.numpy(), labels.numpy(), len(counts)))

    full, measured_of_full = _set(cell, chain, "ancestral", labels[: sample.ancestral_images], ancestral)
    frames = [(_shown(x), _shown(x0_hat)) for x, x0_hat in ((x[: len(full.images)], y[: len(full.images)]) for x, y in full.frames)]
    grids.save_gif(folder / "denoising.gif", [grids.grid(x, COLUMNS, scale=2) for x, _ in frames], milliseconds=80)
    grids.save_png(folder / "chain.png", chain_picture(frames))
    return {**measured, **measured_of_full, **checkpoint.device_memory(), "threads": chain.workers}


def ways(sample: params.Sample, T: int) -> tuple[How, How]:
    """How the fast set and the ancestral set are drawn."""
    options = {"eta": sample.fast.eta} if sample.fast.sampler == "ddim" else {}
    fast = How(sample.fast.sampler, sample.fast.spacing, sample.fast.steps, options)
    return fast, How(sample.ancestral.sampler, "trailing", T, {"variance": sample.ancestral.variance})


def chain_of(cell: params.Cell, sample: params.Sample, weights: Path, counts: Sequence[int]) -> Chain:
    """The chain that draws a cell's images from a file of weights."""
    lowest, highest = sample.guidance_interval
    guidance = Guidance(sample.guidance, (lowest, highest), sample.clip_x0)
    return Chain(
        load_network(weights),
        cell.schedule,
        cell.T,
        sample.seed,
        counts=counts,
        guidance=guidance,
        chunk=sample.chunk,
        bf16=sample.precision == "bf16",
        workers=processes.cores(),
    )


def _set(cell: params.Cell, chain: Chain, name: str, labels: Tensor, how: How) -> tuple[Drawn, dict[str, float]]:
    """Draw a set and write it; the set, and what it cost."""
    n, started = len(labels), time.perf_counter()
    drawn = _drawn(chain, n, how, f"{cell} {name}")
    seconds = time.perf_counter() - started
    rate = n / seconds / chain.share_of_workers(n)  # as if every worker had had a chunk all the time
    about = {"sampler": how.sampler, "spacing": how.spacing, "steps": how.steps, "network_evaluations": drawn.evaluations}
    about |= how.options | {"guidance": chain.guidance.strength, "guidance_interval": chain.guidance_interval}
    about |= {"chunk": chain.chunk, "machine": checkpoint.machine(), "trained_on": chain.about["machines"]}
    tensors = {"images": drawn.images, "labels": chain.asked(labels)}
    save_tensors(paths.samples(str(cell)) / f"{name}.safetensors", tensors, cell=str(cell), **about)
    return drawn, {f"{name}_seconds": round(seconds, 2), f"{name}_images_per_sec": round(rate, 2)}


def _drawn(chain: Chain, n: int, how: How, label: str) -> Drawn:
    with progress(total=-(-n // chain.chunk) * how.steps * chain.chunk, unit="eval", label=label) as bar:

        def evaluated(images: int) -> None:
            with bar.get_lock():
                bar.update(images)

        return chain.draw(n, how, evaluated=evaluated)


def class_counts(dataset: str) -> list[int]:
    """How many test images there are of each class: at these frequencies samples are drawn."""
    test, about = load_tensors(paths.prepared(dataset) / "test.safetensors")
    return torch.bincount(test["labels"], minlength=len(about["class_names"])).tolist()


def chain_picture(frames: list[tuple[grids.Pixels, grids.Pixels]]) -> grids.Pixels:
    """Four images at ten moments of their chain: in each pair of rows x_t above, x0_hat below."""
    moments = [frames[round(k * (len(frames) - 1) / (COLUMNS - 1))] for k in range(COLUMNS)]
    rows = [pictures[i] for i in range(min(4, len(frames[0][0]))) for kind in (0, 1) for pictures in (m[kind] for m in moments)]
    return grids.grid(np.stack(rows), COLUMNS, scale=2)


def class_grid(images: grids.Pixels, labels: NDArray[np.int64], num_classes: int) -> grids.Pixels:
    """Ten images a row: a row for each class; with more than 20 classes two share a row, five images each."""
    each = 10 if num_classes <= 20 else 5
    blank = np.full((each, *images.shape[1:]), 128, np.uint8)
    rows = [np.concatenate([images[labels == y][:each], blank])[:each] for y in range(num_classes)]
    return grids.grid(np.concatenate(rows), COLUMNS, scale=2 if images.shape[-1] < 48 else 1)


def _shown(images: Tensor) -> grids.Pixels:
    return images[:SHOWN].numpy()


if __name__ == "__main__":
    run(main, Failing)
