"""From an archive of so many PNGs to prepared tensors, DVC's own time included: seconds, and the most memory of all processes.

Draws the archive (Persian glyphs on grey paper, 50 to 130 pixels, LABEL.number.png), clones the last commit beside it, and runs
`dvc repro prepare@persian_archive` there; one JSON line. Linux only.
Run: python benchmarks/archive.py [IMAGES]
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.datasets import glyphs  # noqa: E402
from stages.pipeline import clocks, params  # noqa: E402

DRAWN, BATCH = 4200, 1000
SIZE = 64


def main(images: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work, archive = Path(folder), Path(folder, "letters.zip")
        draw(archive, images)
        subprocess.run(["git", "clone", "-q", ROOT, work / "naqsh"], check=True)
        os.chdir(work / "naqsh")
        profile = f"sweep: {{datasets: [persian_archive]}}\ndata: {{persian_archive: {{path: {archive}}}}}\n"
        Path("profiles/archive.yaml").write_text(profile)
        Path("params.yaml").write_text(params.merged(Path("profiles/archive.yaml")))
        start = time.perf_counter()
        dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-q", "prepare@persian_archive"])
        peak = [0]
        watch = threading.Thread(target=follow, args=(dvc, peak), daemon=True)
        watch.start()
        if dvc.wait():
            sys.exit("dvc repro failed")
        seconds = time.perf_counter() - start
        about = json.loads(Path("data/prepared/persian_archive/dataset.json").read_text())
        stages = {name: clocks.expected(f"{name}@persian_archive", "seconds") for name in ("fetch", "prepare")}
        result = {"images": images, "bytes": archive.stat().st_size, "seconds": round(seconds, 1), "peak_mib": peak[0] >> 20}
        print(json.dumps(result | stages | {"read": sum(about["images"].values()), "cores": len(os.sched_getaffinity(0))}))


def draw(archive: Path, images: int) -> None:
    """Write an archive of images that are all different."""
    with tempfile.TemporaryDirectory() as folder:
        glyphs.fetch(Path(folder))
        pictures, labels = glyphs.read(
            Path(folder), size=SIZE, train_images=DRAWN, validation_images=42, test_images=42, seed=0
        ).train
    jobs = [(pictures[:, 0].numpy(), labels.numpy(), range(i, min(i + BATCH, images))) for i in range(0, images, BATCH)]
    with ProcessPoolExecutor() as pool, zipfile.ZipFile(archive, "w") as file:
        for done in pool.map(encoded, *zip(*jobs, strict=True)):
            for name, content in done:
                file.writestr(name, content)


def encoded(pictures: np.ndarray, labels: np.ndarray, numbers: range) -> list[tuple[str, bytes]]:
    """Names and PNG files of some images."""
    files = []
    for i in numbers:
        rng = np.random.default_rng(i)
        image = Image.fromarray(pictures[i % len(pictures)]).resize(tuple(rng.integers(50, 131, 2)), Image.Resampling.BILINEAR)
        grain = rng.integers(-2, 3, image.size[::-1], np.int16)
        content = io.BytesIO()
        Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(content, "PNG", compress_level=1)
        files.append((f"letters/{labels[i % len(labels)]}.{i}.png", content.getvalue()))
    return files


def follow(process: "subprocess.Popen[bytes]", peak: list[int]) -> None:
    """Note the largest sum of what a process and all below it hold in memory, shared pages counted once."""
    while process.poll() is None:
        total = 0
        try:
            for one in (top := psutil.Process(process.pid), *top.children(recursive=True)):
                total += one.memory_full_info().pss
        except psutil.Error:
            continue
        peak[0] = max(peak[0], total)
        time.sleep(0.5)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 147_000)
