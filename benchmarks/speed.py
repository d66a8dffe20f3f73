"""Images a second of training and of sampling, beside a U-Net of diffusers, in one run; where the time of a step goes.

Each is timed in turns, three times, on the CPU; medians. Our samples take the steps of params.yaml, theirs 50 of DDIM. One JSON
line.
Run: python benchmarks/speed.py [PIXELS A SIDE]
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages import train as stage  # noqa: E402
from stages.pipeline import params  # noqa: E402
from stages.pipeline.checkpoint import save_tensors  # noqa: E402
from stages.pipeline.stage import peak_memory  # noqa: E402
from stages.sample import chain_of, ways  # noqa: E402
from stages.training.step import train_step  # noqa: E402

ROUNDS, STEPS, CLASSES, T = 3, 20, 10, 1000
KINDS = {
    "convolutions": ("convolution",), "normalisation": ("group_norm",), "SiLU": ("silu",), "Muon": ("Muon", "bmm"),
    "AdamW": ("AdamW", "adam"), "copies, additions, folding": ("cat", "copy_", "mul", "add", "shuffle", "sum", "lerp"),
}  # fmt: skip


def naqsh(size: int) -> tuple[Callable[[], int], Callable[[], int], int]:
    """One training step and four chunks of samples, as params.yaml has them; each says how many images. Weights."""
    loaded = params.load(ROOT / "params.yaml")
    batch = loaded.train.batch
    images, labels = torch.randint(256, (batch, 1, size, size), dtype=torch.uint8), torch.arange(batch) % CLASSES
    split = stage.Split(images, labels, (images, labels), [str(label) for label in range(CLASSES)])
    state = stage.begin(params.Training("any", "cosine", 0), split, loaded.diffusion, loaded.network, loaded.train)
    steps = itertools.cycle(range(1, state.timetable.end + 1))

    def step() -> int:
        train_step(state, (images, labels), number := next(steps))
        if number in state.timetable.reports:
            state.set_losses(torch.empty(0))
        return batch

    about = {"size": size, "num_classes": CLASSES, "images": 0, "network": loaded.network.model_dump()}
    about |= {"logsnr": [-20.0, 20.0], "machines": []}
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder, "net.safetensors"), state.net.state_dict(), **about, diffusion=loaded.diffusion.model_dump())
        chain = chain_of(params.Cell("any", "cosine", T, 0), loaded.sample, Path(folder, "net.safetensors"), [1] * CLASSES)
    fast, _ = ways(loaded.sample, T)

    def draw() -> int:
        n = 4 * loaded.sample.chunk
        chain.draw(n, fast)
        return n

    return step, draw, sum(weight.numel() for weight in state.weights)


def plain_unet(size: int) -> tuple[UNet2DModel, DDPMScheduler, torch.optim.Optimizer]:
    """A plain U-Net of diffusers with attention at its coarsest level, linear betas, AdamW."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    net = UNet2DModel(
        sample_size=size + -size % 8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32, 64),
        norm_num_groups=8, down_block_types=down, up_block_types=up,
    )  # fmt: skip
    return net, DDPMScheduler(T), torch.optim.AdamW(net.parameters(), 1e-3)


def plain_step(net: UNet2DModel, noising: DDPMScheduler, optimizer: torch.optim.Optimizer, x0: torch.Tensor) -> None:
    """One step of Ho et al. 2020's training on (B, 1, H, W) images."""
    t, eps = torch.randint(T, (len(x0),)), torch.randn(x0.shape)
    torch.nn.functional.mse_loss(net(noising.add_noise(x0, eps, t), t).sample, eps).backward()
    optimizer.step()
    optimizer.zero_grad()


def diffusers(size: int) -> tuple[Callable[[], int], Callable[[], int], int]:
    """The same of a plain U-Net: a training step at batch 64, DDIM in 50 steps."""
    net, noising, optimizer = plain_unet(size)
    images, chain = torch.rand(64, 1, size + -size % 8, size + -size % 8) * 2 - 1, DDIMScheduler(T)

    def step() -> int:
        plain_step(net, noising, optimizer, images)
        return len(images)

    def draw() -> int:
        chain.set_timesteps(50)
        x = torch.randn(images.shape)
        with torch.inference_mode():
            for t in chain.timesteps:
                x = chain.step(net(x, t).sample, t, x).prev_sample
        return len(x)

    return step, draw, sum(weight.numel() for weight in net.parameters())


def rate(work: Callable[[], int], times: int) -> float:
    start = time.perf_counter()
    return sum(work() for _ in range(times)) / (time.perf_counter() - start)


def shares(step: Callable[[], int]) -> dict[str, float]:
    """The share of a step's time of each kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(5):
            step()
    spent: Counter[str] = Counter()
    for event in seen.key_averages():
        spent[next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "all else")] += int(
            event.self_cpu_time_total
        )
    return {kind: round(time / spent.total(), 3) for kind, time in spent.most_common()}


def main(size: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ours, theirs = naqsh(size), diffusers(size)
    rates: dict[str, list[float]] = {"train": [], "diffusers_train": [], "sample": [], "diffusers_sample": []}
    for step, draw, _ in (ours, theirs):
        step(), draw()
    for _ in range(ROUNDS):
        for prefix, (step, draw, _) in (("", ours), ("diffusers_", theirs)):
            rates[f"{prefix}train"].append(rate(step, STEPS))
            rates[f"{prefix}sample"].append(rate(draw, 2 if prefix == "" else 1))
    found = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    result = {
        "images_per_second": found,
        "train_ratio": round(found["train"] / found["diffusers_train"], 2),
        "sample_ratio": round(found["sample"] / found["diffusers_sample"], 2),
        "weights": {"naqsh": ours[2], "diffusers": theirs[2]},
        "share_of_a_step": shares(ours[0]),
        **peak_memory(),
        "threads": torch.get_num_threads(),
        "bf16_arithmetic": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 28)
