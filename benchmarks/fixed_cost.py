"""What a cell costs beside its work: process starts, imports, loading, hashing, logging, DVC and MLflow.

Clones the last commit, makes what is there once for each dataset and a first cell, then one more cell, then three in one run, all
of next to no work: 4 batches of training, 64 samples in 2 steps, with `dvc repro` and forked stages. On the CPU: the seconds
that each further cell of a run takes, and the parts of them inside train, sample and evaluate; those that a run takes before and
beside its cells; those of a run with nothing to do. Does `compare` import torch? One JSON line.
Run: python benchmarks/fixed_cost.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.pipeline import clocks, params  # noqa: E402

PROFILE = """\
sweep: {datasets: [persian_glyphs], schedules: [linear], timesteps: [50, 51, 52, 53, 54]}
data: {persian_glyphs: {size: 28, train_images: 2000, validation_images: 1000, test_images: 1000}}
extractor: {images: 1024}
train: {images: 256, longer: {persian_glyphs: 1}, warmup_images: 32, validation_images: 32, curve_points: 1}
sample: {images: 64, ancestral_images: 2, chunk: 8, guidance: 0, fast: {steps: 2}}
evaluate: {images: 2, draws: 1, min_scored: 64}
"""
CELLS = [f"persian_glyphs-linear-{T}-0" for T in (50, 51, 52, 53, 54)]


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/naqsh"], check=True)
        os.chdir(f"{folder}/naqsh")
        Path("profiles/next_to_nothing.yaml").write_text(PROFILE)
        Path("params.yaml").write_text(params.merged(Path("profiles/next_to_nothing.yaml")))
        dvc(f"evaluate@{CELLS[0]}")
        one = dvc(f"evaluate@{CELLS[1]}")
        cell = (dvc(*(f"evaluate@{cell}" for cell in CELLS[2:])) - one) / 2
        dvc()
        idle = sorted(dvc() for _ in range(3))
        names = {"train": "persian_glyphs-linear-0", "sample": CELLS[2], "evaluate": CELLS[2]}
        stages = {f"{stage}_seconds": clocks.expected(f"{stage}@{name}", "seconds") for stage, name in names.items()}
    result = {"cell_seconds": round(cell, 1), "run_seconds": round(one - cell, 1), "idle_repro_seconds": idle[1]}
    result |= {**stages, "compare_imports_torch": imports_torch("compare")}
    print(json.dumps(result | {"cores": len(os.sched_getaffinity(0))}))


def dvc(*targets: str) -> float:
    """Seconds that `dvc repro` of some stages takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stages.sweep.warm", "dvc", "repro", "-q", *targets], check=True, stdout=sys.stderr)
    return round(time.perf_counter() - start, 1)


def imports_torch(stage: str) -> bool:
    code = f"import sys, stages.{stage}; print('torch' in sys.modules)"
    return (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip() == "True"
    )


if __name__ == "__main__":
    main()
