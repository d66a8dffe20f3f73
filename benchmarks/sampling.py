"""What samples cost and what they gain, measured on finished cells.

    python benchmarks/sampling.py guidance mnist-cosine-100-0 persian_glyphs-cosine-100-0
    python benchmarks/sampling.py evaluations mnist-cosine-1000-0

guidance: precision, recall and FID over its strength, on the interval of params.yaml or on the whole chain.
evaluations: FID over the network evaluations of each sampler, beside that of all T steps of ancestral sampling.
Writes NAME.csv and NAME.png to docs/studies/NAME and prints one JSON line.
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

from stages.drawing.chain import How, class_sequence  # noqa: E402
from stages.evaluate import Judge, score_set  # noqa: E402
from stages.fidelity.rounding import rounded  # noqa: E402
from stages.pipeline import figures, params, paths  # noqa: E402
from stages.sample import chain_of, class_counts, ways  # noqa: E402

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
WHOLE_CHAIN = [-100.0, 100.0]
EVALUATIONS = (5, 8, 12, 20, 35, 60, 100)
SAMPLERS = {
    "ddpm, trailing": ("ddpm", "trailing", {"variance": "posterior"}),
    "sde_dpm_solver_pp_2m, trailing": ("sde_dpm_solver_pp_2m", "trailing", {}),
    "sde_dpm_solver_pp_2m, shifted_cosine": ("sde_dpm_solver_pp_2m", "shifted_cosine", {}),
    "ddim, trailing": ("ddim", "trailing", {"eta": 0.0}),
    "ddim, even log-SNR": ("ddim", "even_logsnr", {"eta": 0.0}),
    "dpm_solver_pp_2m, trailing": ("dpm_solver_pp_2m", "trailing", {}),
    "dpm_solver_pp_2m, even log-SNR": ("dpm_solver_pp_2m", "even_logsnr", {}),
    "heun, karras": ("heun", "karras", {}),
}
PARTS = {"": "value", "_error": "error", "_floor": "floor"}

Rows = list[dict[str, Any]]


class Drawer:
    """Draws and scores sets of one cell."""

    def __init__(self, name: str) -> None:
        self.params = params.load()
        self.cell = params.find_cell(self.params, name)
        self.judge, self.counts = Judge.load(self.cell.dataset), class_counts(self.cell.dataset)

    def row(self, how: How, n: int, **changes: Any) -> dict[str, Any]:
        """Network evaluations for each image and the scores of n of them, with some keys of `sample` changed."""
        sample = self.params.sample.model_copy(update=changes)
        drawn = chain_of(self.cell, sample, paths.weights(str(self.cell.training)) / "ema.safetensors", self.counts).draw(n, how)
        labels = class_sequence(torch.arange(n), self.counts)
        scores = score_set(self.judge, drawn.images, labels, self.params.evaluate.min_scored)
        names = ("precision", "recall", "fid", "accuracy")
        flat = {f"{name}{part}": scores[name][key] for name in names for part, key in PARTS.items()}
        return {"cell": str(self.cell), "images": n, "evaluations": drawn.evaluations} | flat


def guidance(cells: list[str]) -> tuple[Rows, dict[str, Any]]:
    """A row for each strength and part of the chain; a panel for each cell."""
    rows, panels = [], {}
    for name in cells:
        drawer = Drawer(name)
        how, _ = ways(drawer.params.sample, drawer.cell.T)
        parts = {"interval": drawer.params.sample.guidance_interval, "whole chain": WHOLE_CHAIN}
        of_cell = [
            {"guided": part, "guidance": strength}
            | drawer.row(how, drawer.params.sample.images, guidance=strength, guidance_interval=interval)
            for part, interval in parts.items()
            for strength in STRENGTHS
        ]
        rows += of_cell
        panels[name] = []
        for score in ("precision", "recall"):
            panels[name] += [
                _line(f"{score}, {part}", [row for row in of_cell if row["guided"] == part], "guidance", score) for part in parts
            ]
            floor = of_cell[0][f"{score}_floor"]
            panels[name].append(figures.Line(f"{score} of real images", STRENGTHS, [floor] * len(STRENGTHS), reference=True))
    return rows, {"panels": panels, "x": "guidance", "y": "share"}


def evaluations(cells: list[str]) -> tuple[Rows, dict[str, Any]]:
    """A row for each sampler and number of evaluations, without guidance, and one for all T ancestral steps."""
    rows, panels = [], {}
    for name in cells:
        drawer = Drawer(name)
        n, T = drawer.params.sample.images, drawer.cell.T
        all_steps = {"sampler": f"ddpm, all {T}"} | drawer.row(
            How("ddpm", "trailing", T, {"variance": "posterior"}), n, guidance=0.0
        )
        of_cell = [
            {"sampler": label} | drawer.row(How(sampler, spacing, steps // (1 + (sampler == "heun")), options), n, guidance=0.0)
            for label, (sampler, spacing, options) in SAMPLERS.items()
            for steps in EVALUATIONS
            if steps <= T
        ]
        rows += [all_steps, *of_cell]
        lines = [_line(label, [row for row in of_cell if row["sampler"] == label], "evaluations", "fid") for label in SAMPLERS]
        ends = [min(EVALUATIONS), max(EVALUATIONS)]
        panels[name] = [*lines, figures.Line(all_steps["sampler"], ends, [all_steps["fid"]] * 2, reference=True)]
    ticks = list(EVALUATIONS)
    return rows, {"panels": panels, "x": "network evaluations an image", "y": "FID", "log_x": ticks, "log_y": True}


def _line(label: str, rows: Rows, x: str, y: str) -> figures.Line:
    xs, ys, errors = ([row[key] for row in rows] for key in (x, y, f"{y}_error"))
    return figures.Line(label, xs, ys, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {"guidance": guidance, "evaluations": evaluations}
    parser.add_argument("study", choices=studies)
    parser.add_argument("cells", nargs="+")
    args = parser.parse_args()
    rows, figure = studies[args.study](args.cells)
    folder = ROOT / "docs" / "studies" / args.study
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{args.study}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rounded(rows))
    figures.save_lines(folder / f"{args.study}.png", figure.pop("panels"), **figure)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
