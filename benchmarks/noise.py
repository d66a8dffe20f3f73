"""What the noise of a chain costs: CPU seconds of a chunk of samples, and how many of them are spent on noise.

The network of params.yaml, untrained, on 28x28 images, on one thread: chunks of the fast set, and one of all T steps at T = 200
and 1000, under the cosine schedule. This checkout and another, an older one, are measured in turns; the medians, and the ratio of
this one's CPU time to the other's: as measured, and as it is if all but the noise takes the same time. One JSON line.
Run: python benchmarks/noise.py CHECKOUT
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE, ROUNDS, CLASSES = Path(__file__).resolve().parents[1], 3, 10
SETS = {"fast": (1000, 20), "T = 200": (200, 1), "T = 1000": (1000, 1)}  # T, and how many chunks


def measure(root: str) -> dict[str, list[float]]:
    """CPU seconds of the chunks of each set, and of their noise, with the code of a checkout."""
    sys.path.insert(0, root)
    import torch

    from stages.diffusion import samplers
    from stages.networks.unet import UNet
    from stages.pipeline import params
    from stages.pipeline.checkpoint import save_tensors
    from stages.sample import chain_of, ways

    find, spent = samplers.find, 0.0

    def timed(noise: Callable[..., Any]) -> Callable[..., Any]:
        def call(*levels: Any) -> Any:
            nonlocal spent
            started = time.process_time()
            z = noise(*levels)
            spent += time.process_time() - started
            return z

        return call

    samplers.find = lambda name: lambda *args, **options: find(name)(*args[:-1], timed(args[-1]), **options)
    torch.set_num_threads(1)
    loaded = params.load(Path(root, "params.yaml"))
    net = UNet(size=28, num_classes=CLASSES, **loaded.network.model_dump())
    about = {"size": 28, "num_classes": CLASSES, "network": loaded.network.model_dump()}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "net.safetensors")
        save_tensors(weights, net.state_dict(), **about, diffusion=loaded.diffusion.model_dump())
        for name, (T, chunks) in SETS.items():
            chain = chain_of(params.Cell("any", "cosine", T, 0), loaded.sample, weights, [1] * CLASSES)
            fast, ancestral = ways(loaded.sample, T)
            chain.draw(1, fast)
            spent, started = 0.0, time.process_time()
            chain.draw(chunks * chain.chunk, fast if name == "fast" else ancestral)
            found[name] = [time.process_time() - started, spent]
    return found


def main(other: str) -> None:
    runs: dict[str, list[dict[str, list[float]]]] = {str(HERE): [], other: []}
    for _ in range(ROUNDS):
        for root in runs:
            done = subprocess.run([sys.executable, __file__, "--measure", root], cwd=root, check=True, capture_output=True)
            runs[root].append(json.loads(done.stdout))
    result = {}
    for name in SETS:
        seconds, share = (
            {root: statistics.median(of(*run[name]) for run in found) for root, found in runs.items()}
            for of in (lambda all_, _: all_, lambda all_, noise: noise / all_)
        )
        result[name] = {
            "cpu_seconds": round(seconds[str(HERE)], 2),
            "share_of_noise": round(share[str(HERE)], 4),
            "share_of_noise_other": round(share[other], 4),
            "ratio": round(seconds[str(HERE)] / seconds[other], 3),
            "ratio_by_noise": round((1 - share[other]) / (1 - share[str(HERE)]), 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(str(Path(sys.argv[1]).resolve()))
