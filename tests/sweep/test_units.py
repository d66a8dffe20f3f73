"""What `make repro` runs at a time, in which order, and when it would be done."""

from pathlib import Path

import pytest
from cells import edit

from stages.pipeline import dvc_forms, params
from stages.sweep import units
from stages.sweep.units import Unit

CELL, NETWORK = "mnist-cosine-200-0", "mnist-cosine-0"

pytestmark = pytest.mark.usefixtures("bare_tree")


def every() -> dict[str, Unit]:
    return {unit.name: unit for unit in units.units(params.load(), dvc_forms.stages())}


def one_network_for_all_t(text: str) -> str:
    """dvc.yaml with a training for each dataset, schedule and seed."""
    head, *sections = text.split("\n\n")
    name = "${item.dataset}-${item.schedule}-${item.seed}"
    for i, section in enumerate(sections):
        if section.startswith("  train:"):
            sections[i] = section.replace("      T: ${sweep.timesteps}\n", "").replace("models/cells", "models/networks")
    return "\n\n".join([head, *sections]).replace("models/cells/${key}", f"models/networks/{name}")


def test_a_dataset_a_training_a_cell_and_the_comparison_are_units() -> None:
    found = every()
    stages = {name: unit.stages for name, unit in found.items()}
    assert stages["data@mnist"] == ("fetch@mnist", "prepare@mnist", "extractor@mnist", "reference@mnist")
    assert stages[f"train@{CELL}"] == (f"train@{CELL}",)
    assert stages[CELL] == (f"sample@{CELL}", f"evaluate@{CELL}")
    assert stages["compare"] == ("compare",)
    assert len(found) == 2 + 8 + 8 + 1
    assert found[f"train@{CELL}"].needs == ("data@mnist",)
    assert set(found[CELL].needs) == {"data@mnist", f"train@{CELL}"}
    assert set(found["compare"].needs) == found.keys() - {"compare"}
    assert {name for name, unit in found.items() if unit.is_cell()} == {str(cell) for cell in params.load().sweep.cells()}


def test_a_network_of_several_cells_is_trained_once() -> None:
    edit("dvc.yaml", one_network_for_all_t)
    found = every()
    assert len(found) == 2 + 4 + 8 + 1
    assert [name for name, unit in found.items() if f"train@{NETWORK}" in unit.needs][:2] == [CELL, CELL.replace("200", "1000")]
    order = [name for name in found if name.startswith("mnist-cosine") or name == f"train@{NETWORK}"]
    assert order == [f"train@{NETWORK}", CELL, CELL.replace("200", "1000")]


@pytest.mark.parametrize("turned", [False, True])
def test_the_first_cell_comes_first_however_dvc_yaml_is_ordered(turned: bool) -> None:
    if turned:
        head, *sections = Path("dvc.yaml").read_text().replace("stages:\n", "stages:\n\n").split("\n\n")
        Path("dvc.yaml").write_text("\n\n".join([head, *reversed([section.rstrip() for section in sections])]) + "\n")
    assert list(dvc_forms.stages()) == ["fetch", "prepare", "extractor", "reference", "train", "sample", "evaluate", "compare"]
    first = "mnist-linear-200-0"
    assert list(every())[:3] == ["data@mnist", f"train@{first}", first]
    assert list(every())[-1] == "compare"


def test_only_what_is_affected_is_kept() -> None:
    kept = units.only({f"evaluate@{CELL}", "compare"}, list(every().values()))
    assert kept == [Unit(CELL, (f"evaluate@{CELL}",), ()), Unit("compare", ("compare",), (CELL,))]
    assert units.only(set(), list(every().values())) == []


def test_one_cell_has_its_dataset_and_its_training() -> None:
    assert [unit.name for unit in units.leading_to(CELL, list(every().values()))] == ["data@mnist", f"train@{CELL}", CELL]


def test_the_end_is_told_by_what_each_takes_and_how_many_run() -> None:
    a, b = Unit("data@a", ("fetch@a",), ()), Unit("data@b", ("fetch@b",), ())
    cells = [Unit(f"a-x-{T}-0", (f"sample@a-x-{T}-0",), ("data@a",)) for T in (1, 2)]
    last = Unit("compare", ("compare",), ("a-x-1-0", "a-x-2-0", "data@b"))
    seconds = {"data@a": 1.0, "data@b": 5.0, "a-x-1-0": 2.0, "a-x-2-0": 2.0, "compare": 1.0}
    todo = [a, *cells, b, last]
    assert units.ends(todo, 1, seconds) == {"data@a": 1, "a-x-1-0": 3, "a-x-2-0": 5, "data@b": 10, "compare": 11}
    assert units.ends(todo, 2, seconds) == {"data@a": 1, "a-x-1-0": 3, "data@b": 5, "a-x-2-0": 5, "compare": 6}
    assert units.ends([], 2, {}) == {}
