"""Quality after so many seconds of training, from the pipeline's recipe and from diffusers' plain U-Net, scored alike in one run.

Clones the last commit, measures how fast the recipe trains here, gives it as many images as fit into the seconds, runs cells
mnist-cosine-1000-SEED with `dvc repro`. The baseline trains for as long (unconditional, eps, linear betas, AdamW 1e-3, batch 64),
is sampled with DDIM in 50 steps, at most 1,000 times because that is slow, and is scored by the same code. On the CPU. One JSON
line. The baseline is not tuned and has no average of its weights, and two minutes are few steps for it: its scores do not
rank diffusers.
Run: python benchmarks/quality.py [SECONDS [SAMPLES [SEED ...]]], at least 1,000 samples
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import speed  # noqa: E402
from stages.datasets.images import to_float, to_uint8  # noqa: E402
from stages.evaluate import Judge, score_set  # noqa: E402
from stages.pipeline import clocks, params, paths  # noqa: E402
from stages.pipeline.files import read_json  # noqa: E402

DATASET = "mnist"
SCORES = ("fid", "precision", "recall", "accuracy", "confident")


def main(seconds: float, samples: int, seeds: list[int]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    step, _, _ = speed.naqsh(28)
    step()
    images = round(seconds * speed.rate(step, 100), -3)
    guidance = 0.5 if images >= 150_000 else 0.8
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/naqsh"], check=True)
        os.chdir(f"{folder}/naqsh")
        Path("profiles/quality.yaml").write_text(
            f"sweep: {{datasets: [{DATASET}], schedules: [cosine], timesteps: [1000], seeds: {seeds}}}\n"
            f"train: {{images: {int(images)}}}\nsample: {{images: {samples}, guidance: {guidance}}}\n"
        )
        Path("params.yaml").write_text(params.merged(Path("profiles/quality.yaml")))
        cells = [f"{DATASET}-cosine-1000-{seed}" for seed in seeds]
        repro = [sys.executable, "-m", "dvc", "repro", "-q", *(f"evaluate@{cell}" for cell in cells)]
        subprocess.run(repro, check=True, stdout=sys.stderr)
        ours = [row(read_json(paths.scores("evaluate", cell))["fast"]) for cell in cells]
        trainings = [f"{DATASET}-cosine-{seed}" for seed in seeds]
        timing: dict[str, list] = {"train": [clocks.read("train", name, clocks.now("train", name)) for name in trainings]}
        timing["sample"] = [clocks.read("sample", cell, clocks.now("sample", cell)) for cell in cells]
        trained = statistics.median(of["seconds"] for of in timing["train"])  # with all that a cell does beside its steps
        result = {
            "training_seconds": trained,
            "naqsh": {
                "images": int(images),
                "seconds": [of["seconds"] for of in timing["train"]],
                "samples_per_second": [of["fast_images_per_sec"] for of in timing["sample"]],
                "scores": ours,
                "median_fid_over_floor": statistics.median(of["fid"] / of["fid_floor"] for of in ours),
                "median_recall_over_floor": statistics.median(of["recall"] / of["recall_floor"] for of in ours),
            },
            "diffusers": baseline(trained, min(samples, 1000)),
            "samples": samples,
            "threads": torch.get_num_threads(),
        }
    print(json.dumps(result))


def row(scores: dict) -> dict[str, float]:
    """Values and floors of one set."""
    return {
        f"{name}{end}": scores[name][key] for name in SCORES if scores[name] for end, key in (("", "value"), ("_floor", "floor"))
    }


def baseline(seconds: float, samples: int) -> dict[str, float]:
    """The scores of diffusers' U-Net after as long a training."""
    train = load_file(paths.prepared(DATASET) / "train.safetensors")["images"]
    net, noising, optimizer = speed.plain_unet(28)
    start, seen = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        x0 = torch.nn.functional.pad(to_float(train[torch.randint(len(train), (64,))]), (2, 2, 2, 2), value=-1)
        speed.plain_step(net, noising, optimizer, x0)
        seen += len(x0)
    chain, drawn, start = DDIMScheduler(1000), [], time.perf_counter()
    chain.set_timesteps(50)
    with torch.inference_mode():
        for first in range(0, samples, 250):
            x = torch.randn(min(250, samples - first), 1, 32, 32)
            for t in chain.timesteps:
                x = chain.step(net(x, t).sample, t, x).prev_sample
            drawn.append(to_uint8(x[..., 2:-2, 2:-2]))
    rate = samples / (time.perf_counter() - start)
    scores = score_set(Judge.load(DATASET), torch.cat(drawn), torch.full((samples,), -1), min_scored=2)
    return {"images": seen, "samples": samples, "samples_per_second": round(rate, 1), **row(scores)}


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    main(given[0] if given else 120, given[1] if given[1:] else 2000, given[2:] or [0])
