"""Why stages run, as `make repro` tells it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cells import CELL, OTHER, edit, record

from stages.sweep import reasons
from stages.tracking.provenance import Tree

SAMPLE, TRAIN, FETCH = f"sample@{CELL}", f"train@{CELL.training}", f"fetch@{CELL.dataset}"
SAMPLERS = "stages/diffusion/samplers"
CHOSEN = {f"{SAMPLERS}/heun.py": "modified", "params.yaml": {"sample": "modified"}}  # as DVC says it


def said(status: dict[str, list[Any]]) -> list[str]:
    return list(reasons.lines(status, Tree.read(), status))


@pytest.fixture(autouse=True)
def recorded(tree: Path) -> None:
    record(CELL, last="evaluate")


def set_to(before: str, after: str) -> Callable[[str], str]:
    return lambda text: text.replace(before, after)


def test_another_sampler_is_a_choice_and_no_changed_file() -> None:
    edit("params.yaml", set_to("sampler: sde_dpm_solver_pp_2m", "sampler: heun"))
    assert said({SAMPLE: [{"changed deps": CHOSEN}]}) == ["  sample: sample.fast.sampler is now heun (was sde_dpm_solver_pp_2m)"]
    more = CHOSEN | {f"{SAMPLERS}/ddpm.py": "modified", f"{SAMPLERS}/euler.py": "modified"}
    assert said({SAMPLE: [{"changed deps": more}]}) == [
        "  sample: sample.fast.sampler is now heun (was sde_dpm_solver_pp_2m), stages/diffusion/samplers/ddpm.py is modified, "
        "stages/diffusion/samplers/euler.py is a new input"
    ]


def test_a_changed_file_of_the_chosen_sampler_is_told_as_one() -> None:
    changes = {f"{SAMPLERS}/sde_dpm_solver_pp_2m.py": "modified"}
    assert said({SAMPLE: [{"changed deps": changes}]}) == [f"  sample: {SAMPLERS}/sde_dpm_solver_pp_2m.py is modified"]


def test_a_line_has_three_reasons_and_names_parameters_and_code_before_data() -> None:
    edit("params.yaml", set_to("grad_clip: 1.0", "grad_clip: 2.0"))
    deps = {
        "data/prepared/mnist/train.safetensors": "deleted",
        "stages/train.py": "modified",
        "stages/networks/unet.py": "modified",
    }
    weights = {
        f"models/networks/{CELL.training}/ema.safetensors": "not in cache",
        f"models/networks/{CELL.training}/raw.safetensors": "not in cache",
    }
    changes = [{"changed deps": deps | {"params.yaml": {"train": "modified"}}}, {"changed outs": weights}, "changed command"]
    assert said({TRAIN: changes}) == [
        "  train: changed command, train.grad_clip is now 2.0 (was 1.0), stages/train.py is modified, and 2 more"
    ]


def test_results_that_are_not_here_are_one_reason() -> None:
    weights = {
        f"models/networks/{CELL.training}/ema.safetensors": "not in cache",
        f"models/networks/{CELL.training}/raw.safetensors": "deleted",
    }
    status: dict[str, list[Any]] = {TRAIN: [{"changed outs": weights}], SAMPLE: [{"changed deps": weights}]}
    assert said(status) == ["  train, sample: results are not here"]
    status[SAMPLE].append({"changed deps": {"stages/sample.py": "deleted"}})
    assert said(status) == ["  train: results are not here", "  sample: stages/sample.py is deleted, results are not here"]


def test_cells_with_the_same_reasons_are_one_line_and_a_new_cell_is_not_run_yet() -> None:
    new = {"stages/train.py": "modified", "stages/diffusion/schedules/linear.py": "modified"}
    status = {TRAIN: [{"changed deps": {"stages/train.py": "modified"}}], f"train@{OTHER.training}": [{"changed deps": new}]}
    assert said(status) == ["  train: stages/train.py is modified, not run yet"]
    assert said({f"train@{OTHER.training}": status[TRAIN], f"sample@{OTHER}": []}) == ["  train, sample: not run yet"]
    assert said(status | {"compare": [{"changed deps": {"metrics/train": "modified"}}]})[1:] == ["  compare: not run yet"]
    assert said({}) == []


def test_no_secret_is_told_and_no_long_value() -> None:
    edit("params.yaml", set_to("path: null # a folder with the four", "path: 'https://me:hunter2@host/x' # "))
    changes: list[Any] = [{"changed deps": {"params.yaml": {"data.mnist": "modified"}}}]
    assert said({FETCH: changes}) == ["  fetch: data.mnist.path is now https://***@host/x (was None)"]
    edit("params.yaml", set_to("https://me:hunter2@host/x", "y" * 100))
    assert said({FETCH: changes}) == [f"  fetch: data.mnist.path is now {'y' * 60}... (was None)"]


def test_paths_are_told_once_for_all_cells_of_a_kind() -> None:
    read = dict.fromkeys((f"models/networks/{CELL.training}/ema.safetensors", f"samples/{CELL}/fast.safetensors"), "modified")
    said_of = said({f"evaluate@{CELL}": [{"changed deps": read | {"metrics/reference/mnist.json": "modified"}}]})
    assert said_of == [
        "  evaluate: models/networks/NETWORK/ema.safetensors is modified, samples/CELL/fast.safetensors is modified, "
        "metrics/reference/DATASET.json is modified"
    ]
    assert said({TRAIN: [{"changed outs": {f"metrics/train/{CELL.training}.csv": "modified"}}]}) == [
        "  train: metrics/train/NETWORK.csv is modified"
    ]
    assert said({FETCH: [{"changed deps": {"stages/datasets/mnist.py": "modified"}}]}) == [
        "  fetch: stages/datasets/mnist.py is modified"
    ]
