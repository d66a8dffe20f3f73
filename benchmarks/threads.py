"""Images a second of training on one thread and on two: alone, side by side, and beside a busy process, in turns in one run.

The busy process keeps core 0; the training may use any. The worst share is the slowest run of one thread beside it, over the same
alone: its fair share of two cores is a whole one. One JSON line.
Run: python benchmarks/threads.py [RUNS]
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, SIZE = 30, 28


def measure(threads: int) -> None:
    """Print the images a second of a training on so many threads."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks import speed

    torch.set_num_threads(threads)
    step, _, _ = speed.naqsh(SIZE)
    speed.rate(step, 10)
    print(speed.rate(step, STEPS))


def trained(threads: int, beside: int = 1) -> float:
    """Images a second of `beside` trainings side by side, all together."""
    command = [sys.executable, __file__, "--measure", str(threads)]
    every = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(beside)]
    return sum(float(each.communicate()[0]) for each in every)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A process that keeps core 0."""
    code = "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            yield
        finally:
            other.kill()


def main(runs: int) -> None:
    """Measure, in turns, and print."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        for threads in (1, 2):
            found.setdefault(f"{threads} threads, alone", []).append(trained(threads))
            with busy():
                found.setdefault(f"{threads} threads, beside a busy process", []).append(trained(threads))
        found.setdefault("1 threads, two side by side", []).append(trained(1, beside=2))
    alone = statistics.median(found["1 threads, alone"])
    result = {name: {"median": round(statistics.median(rates)), "least": round(min(rates))} for name, rates in found.items()}
    worst = min(found["1 threads, beside a busy process"]) / alone
    print(
        json.dumps(
            {"images_per_second": result, "worst_share_of_one_thread": round(worst, 2), "runs": runs, "cores": os.cpu_count()}
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(int(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 10)
