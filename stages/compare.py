"""Put the cells of the sweep side by side: a table, plots over T and schedule, a report with pictures.

Reads exactly the cells that `sweep` names, whatever else lies in metrics/; writes metrics/summary.{json,csv}, loss.csv, figures/
and report.md; brings MLflow up to date.
Run: python -m stages.compare
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from stages.pipeline import figures, params, paths
from stages.pipeline.figures import Line
from stages.pipeline.files import read_json, whole_file, whole_files, write_json
from stages.pipeline.params import Cell
from stages.pipeline.stage import run
from stages.tracking import results
from stages.tracking.mirror import Compared

METRICS = Path("metrics")
HEADLINE = ("fid", "confident_ratio")

Rows = dict[Cell, dict[str, Any]]
Curves = dict[Cell, list[dict[str, float]]]


def main(sweep: params.Sweep) -> None:
    """Read every cell, then write; a missing cell stops it before anything is written."""
    rows = {cell: results.row(cell) for cell in sweep.cells()}
    curves = {cell: results.loss_curve(cell) for cell in rows}
    synthetic = [name for name in sweep.datasets if read_json(paths.prepared(name) / "dataset.json")["synthetic"]]

    write_json(METRICS / "summary.json", {name: _means(rows, name) for name in sweep.datasets})
    _write_csv(METRICS / "summary.csv", list(rows.values()))
    losses = [{"cell": str(cell), **point} for cell, curve in curves.items() for point in curve]
    _write_csv(METRICS / "loss.csv", losses)
    with whole_files(METRICS / "figures") as folder:
        _plot(folder, sweep, rows, curves)
    with whole_file(METRICS / "report.md") as temporary:
        temporary.write_text(_report(sweep, rows, synthetic), encoding="utf-8")

    print(f"Table and pictures: {METRICS / 'report.md'}")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")


def _means(rows: Rows, dataset: str) -> dict[str, float]:
    """The headline scores as means over the cells of a dataset: few enough columns for `dvc exp show`."""
    mine = [row for cell, row in rows.items() if cell.dataset == dataset]
    return {name: mean(row[name] for row in mine) for name in HEADLINE if all(name in row for row in mine)}


def _plot(folder: Path, sweep: params.Sweep, rows: Rows, curves: Curves) -> None:
    ticks = sorted(sweep.timesteps)

    def panels(lines_of: Callable[[str], list[Line]]) -> dict[str, list[Line]]:
        return {dataset: lines_of(dataset) for dataset in sweep.datasets}

    def fid(dataset: str) -> list[Line]:
        floors = [row["fid_floor"] for cell, row in rows.items() if cell.dataset == dataset and "fid_floor" in row]
        floor = [Line("floor: real images", ticks, [floors[0]] * len(ticks), reference=True)] if floors else []
        return [*_against_steps(sweep, rows, dataset, "fid"), *floor]

    def loss(dataset: str) -> list[Line]:
        points = {cell: [row for row in curve if "val_loss" in row] for cell, curve in curves.items() if cell.dataset == dataset}
        return [
            Line(str(cell).removeprefix(f"{dataset}-"), [row["images"] for row in found], [row["val_loss"] for row in found])
            for cell, found in points.items()
        ]

    def by_logsnr(dataset: str) -> list[Line]:
        return [_loss_by_logsnr(cell, row) for cell, row in rows.items() if cell.dataset == dataset]

    figures.save_lines(folder / "fid.png", panels(fid), x="T, steps", y="FID (lower is better)", log_x=ticks, log_y=True)
    figures.save_lines(folder / "loss.png", panels(loss), x="images trained on", y="validation loss", log_y=True)
    figures.save_lines(folder / "logsnr.png", panels(by_logsnr), x="log-SNR", y="MSE of x0", log_y=True)
    grids = [
        {str(cell): paths.samples(str(cell)) / "grid.png" for cell in rows if cell.dataset == dataset} for dataset in sweep.datasets
    ]
    figures.save_contact_sheet(folder / "samples.png", grids)


def _against_steps(sweep: params.Sweep, rows: Rows, dataset: str, name: str) -> list[Line]:
    """One line for each schedule and seed: a number of the row against T, where it was measured."""
    lines = []
    for schedule in sweep.schedules:
        for seed in sweep.seeds:
            found = [rows[cell] for T in sorted(sweep.timesteps) if name in rows[cell := Cell(dataset, schedule, T, seed)]]
            title = schedule + (f", seed {seed}" if len(sweep.seeds) > 1 else "")
            error = [row.get(f"{name}_error", 0.0) for row in found]
            lines += [Line(title, [row["T"] for row in found], [row[name] for row in found], error if any(error) else None)]
    return [line for line in lines if line.x]


def _loss_by_logsnr(cell: Cell, row: dict[str, Any]) -> Line:
    points = sorted((float(key.removeprefix("x0_mse_at_")), value) for key, value in row.items() if key.startswith("x0_mse_at_"))
    return Line(str(cell).removeprefix(f"{cell.dataset}-"), [x for x, _ in points], [y for _, y in points])


def _report(sweep: params.Sweep, rows: Rows, synthetic: list[str]) -> str:
    columns = {
        "cell": "cell",
        "network": "network",
        "FID": "fid",
        "± error": "fid_error",
        "floor": "fid_floor",
        "N": "images",
        "accuracy": "accuracy",
    }
    columns |= {"confident": "confident", "precision": "precision", "recall": "recall", "bits/dim": "bits_per_dim"}
    columns |= {"eps-MSE": "eps_mse", "trained on": "train_images"}
    columns |= {"evaluations, fast": "fast_evaluations", "all T": "ancestral_evaluations"}
    lines = ["# Comparison of the sweep", "", _EXPLANATION]
    lines += [f"`{name}` is synthetic: its images are drawn by a program, nobody wrote them.\n" for name in synthetic]
    lines += [_SHARED] if any(row["network"] == "shared" for row in rows.values()) else []
    lines += [_markdown_row(columns), _markdown_row(["---"] * len(columns))]
    lines += [_markdown_row([_cell_text(row.get(key)) for key in columns.values()]) for row in rows.values()]
    lines += ["", *(f"{line}.\n" for line in results.why_missing(rows))]
    lines += [*(f"## {title}\n\n![{title}](figures/{name}.png)\n" for name, title in _FIGURES.items())]
    return "\n".join(lines)


def _markdown_row(values: Any) -> str:
    return f"| {' | '.join(values)} |"


def _cell_text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else "-" if value is None else f"{value:.4g}"


_EXPLANATION = """\
FID is the Fréchet distance between N generated images and the whole test split, in the features of a classifier trained on the
same dataset: lower is better, and it falls with N, so only scores of the same N and the same dataset compare. The floor is the
same distance for N validation images: real ones that no network was trained on. ± is a bootstrap over the samples. It does not
know that labels are drawn at fixed frequencies, so it is about twice too wide at an FID near 1, and 2.8 times at the floor
(measured on MNIST). It says nothing of another training: two trainings that differ in their seed alone differ by up to about 36 %
of FID (95 % of pairs; estimated from three triples of MNIST).

`accuracy` is the share of samples that the classifier recognises as the requested class, `confident` the share to which it gives
any class a probability of at least 0.9. `precision` is the share of samples among the real images, `recall` the share of real
images among the samples (k = 3). `bits/dim` is the variational bound on the negative log-likelihood of test images, given their
labels. `eps-MSE` is a property of the schedule: do not compare it between schedules. The loss by log-SNR does compare.
`trained on` counts images; one network serves every T of its schedule. Every cell is sampled twice: fast, with the
same number of steps in every cell (all scores are of this set), and with all T steps. `evaluations` of the network are what an
image costs: seconds are in MLflow and in what `make repro` prints.
"""

_SHARED = """\
One network for each dataset and seed, trained at every noise level, as often as `cosine` visits each, draws for all T and
schedules (`train.shared`): what differs between its cells is how the sampler walks, nothing that was learned.
"""

_FIGURES = {
    "fid": "FID over T",
    "loss": "Validation loss",
    "logsnr": "Loss by noise level, comparable across schedules",
    "samples": "Samples",
}

if __name__ == "__main__":
    run(main, Compared)
