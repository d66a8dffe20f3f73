"""What the noise of a chain costs: the CPU time of a chunk of samples beside that of another checkout, and the share of it.

The network of params.yaml, untrained, on 28x28 images, on one thread: the fast set, and all T steps at T = 200 and 1000, under the
cosine schedule. A process for each of the two checkouts; they draw in turns, a chunk each, so that what else the machine does
meets both. The median of the ratios, this checkout's to the other's; and the ratio that there is if all but the noise takes the
same time. One JSON line.
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

HERE, CLASSES = Path(__file__).resolve().parents[1], 10
SETS = {"fast": (1000, 40), "T = 200": (200, 6), "T = 1000": (1000, 1)}  # T, and how many turns


def draw(root: str) -> None:
    """Chunks with the code of a checkout, of the set that each line of stdin names: CPU seconds and those of noise to stdout."""
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
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "net.safetensors")
        save_tensors(weights, net.state_dict(), **about, diffusion=loaded.diffusion.model_dump())
        for line in sys.stdin:
            name = line.strip()
            T, _ = SETS[name]
            chain = chain_of(params.Cell("any", "cosine", T, 0), loaded.sample, weights, [1] * CLASSES)
            fast, ancestral = ways(loaded.sample, T)
            spent, started = 0.0, time.process_time()
            chain.draw(1, fast if name == "fast" else ancestral)
            print(json.dumps([time.process_time() - started, spent]), flush=True)


def main(other: str) -> None:
    command = [sys.executable, __file__, "--draw"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ours, theirs = (subprocess.Popen([*command, root], cwd=root, **pipes) for root in (str(HERE), other))

    def chunk(process: Any, name: str) -> list[float]:
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        return list(json.loads(process.stdout.readline()))

    result = {}
    for process in (ours, theirs):
        chunk(process, "fast")
    for name, (_, turns) in SETS.items():
        pairs = [(chunk(ours, name), chunk(theirs, name)) for _ in range(turns)]
        share, share_there = (statistics.median(pair[i][1] / pair[i][0] for pair in pairs) for i in (0, 1))
        result[name] = {
            "cpu_seconds_of_a_chunk": round(statistics.median(here[0] for here, _ in pairs), 3),
            "ratio": round(statistics.median(here[0] / there[0] for here, there in pairs), 3),
            "share_of_noise": round(share, 4),
            "share_of_noise_there": round(share_there, 4),
            "ratio_by_noise": round((1 - share_there) / (1 - share), 3),
        }
    for process in (ours, theirs):
        process.stdin.close()
        process.wait()
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "--draw":
        draw(sys.argv[2])
    else:
        main(str(Path(sys.argv[1]).resolve()))
