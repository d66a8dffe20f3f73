"""What guidance buys and costs: precision, recall, FID and network evaluations over its strength, on the whole chain or a part.

Needs finished cells. Writes docs/studies/guidance/guidance.csv and .png and prints one JSON line.
Run: python benchmarks/guidance.py mnist-cosine-200-0 persian_glyphs-cosine-200-0
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from stages.evaluate import score_set  # noqa: E402
from stages.fidelity.frechet import Gaussian  # noqa: E402
from stages.pipeline import figures, params, paths  # noqa: E402
from stages.pipeline.checkpoint import load_classifier, load_tensors  # noqa: E402
from stages.pipeline.stage import read_json  # noqa: E402
from stages.sample import Chain, class_sequence  # noqa: E402

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SCORES = ("precision", "recall", "fid", "accuracy")
FOLDER = ROOT / "docs" / "studies" / "guidance"


def measure(cell: params.Cell, loaded: params.Params) -> list[dict[str, Any]]:
    """A row for each strength, on the interval of params.yaml and on the whole chain."""
    reference, about = load_tensors(paths.reference(cell.dataset))
    real = Gaussian(reference["mean"].numpy(), reference["cov"].numpy(), about["images"])
    floors, classifier = read_json(paths.scores("reference", cell.dataset)), load_classifier(paths.extractor(cell.dataset))
    counts = read_json(paths.prepared(cell.dataset) / "dataset.json")["images_per_class"]["test"]
    fast, rows = loaded.sample.fast, []
    for where, interval in (("interval", loaded.sample.guidance_interval), ("whole chain", [-100.0, 100.0])):
        for strength in STRENGTHS:
            sample = loaded.sample.model_copy(update={"guidance": strength, "guidance_interval": interval})
            chain = Chain(cell, sample, paths.weights(str(cell)) / "ema.safetensors", counts)
            options = {"eta": fast.eta} if fast.sampler == "ddim" else {}
            how = (fast.sampler, fast.spacing, fast.steps, options)
            images, _, evaluations = chain.draw(sample.images, how, label=f"{cell} {where} {strength}")
            drawn = {"images": images, "labels": class_sequence(torch.arange(sample.images), counts)}
            scores = score_set(classifier, real, reference["features"], floors, drawn, loaded.evaluate.min_scored)
            row = {"cell": str(cell), "guided": where, "guidance": strength, "evaluations": evaluations, "images": sample.images}
            rows.append(row | {f"{name}{part}": scores[name][key] for name in SCORES for part, key in PARTS.items()})
    return rows


PARTS = {"": "value", "_error": "error", "_floor": "floor"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="+")
    loaded = params.load()
    cells = [params.find_cell(loaded, name) for name in parser.parse_args().cells]
    rows = [row for cell in cells for row in measure(cell, loaded)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "guidance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()} for row in rows)

    def lines(cell: params.Cell) -> list[figures.Line]:
        drawn = []
        for score in ("precision", "recall"):
            for where in ("interval", "whole chain"):
                of = [row for row in rows if row["cell"] == str(cell) and row["guided"] == where]
                x, y, error = ([row[key] for row in of] for key in ("guidance", score, f"{score}_error"))
                drawn.append(figures.Line(f"{score}, {where}", x, y, error))
            floor = of[0][f"{score}_floor"]
            drawn.append(figures.Line(f"{score} of real images", STRENGTHS, [floor] * len(STRENGTHS), reference=True))
        return drawn

    panels = {str(cell): lines(cell) for cell in cells}
    figures.save_lines(FOLDER / "guidance.png", panels, x="guidance", y="share")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
