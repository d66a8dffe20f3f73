"""What `make repro` runs at a time, in which order, and when it would be done."""

from pathlib import Path

import pytest

from stages.pipeline import dvc_forms, params
from stages.sweep import units
from stages.sweep.units import Unit

CELL, NETWORK = "mnist-cosine-100-0", "mnist-cosine-0"

pytestmark = pytest.mark.usefixtures("bare_tree")


def every() -> dict[str, Unit]:
    return {unit.name: unit for unit in units.units(params.load(), dvc_forms.stages())}


def test_a_dataset_a_training_a_cell_and_the_comparison_are_units() -> None:
    found = every()
    stages = {name: unit.stages for name, unit in found.items()}
    assert stages["data@mnist"] == ("fetch@mnist", "prepare@mnist", "extractor@mnist", "reference@mnist")
    assert stages[f"train@{NETWORK}"] == (f"train@{NETWORK}",)
    assert stages[CELL] == (f"sample@{CELL}", f"evaluate@{CELL}")
    assert stages["compare"] == ("compare",)
    assert stages["init"] == ("init",)
    assert len(found) == 2 + 1 + 4 + 12 + 1
    assert found[f"train@{NETWORK}"].needs == ("data@mnist", "init")
    assert set(found[CELL].needs) == {"data@mnist", f"train@{NETWORK}"}
    assert set(found["compare"].needs) == found.keys() - {"compare", "init"}
    assert {name for name, unit in found.items() if unit.is_cell()} == {str(cell) for cell in params.load().sweep.cells()}


def test_a_network_comes_before_the_cells_of_every_T() -> None:
    found = every()
    cells = [CELL.replace("-100-", f"-{T}-") for T in (25, 100, 1000)]
    assert [name for name, unit in found.items() if f"train@{NETWORK}" in unit.needs] == [*cells, "compare"]
    order = [name for name in found if name.startswith("mnist-cosine") or name == f"train@{NETWORK}"]
    assert order == [f"train@{NETWORK}", *cells]


@pytest.mark.parametrize("turned", [False, True])
def test_the_first_cell_comes_first_however_dvc_yaml_is_ordered(turned: bool) -> None:
    if turned:
        head, *sections = Path("dvc.yaml").read_text().replace("stages:\n", "stages:\n\n").split("\n\n")
        Path("dvc.yaml").write_text("\n\n".join([head, *reversed([section.rstrip() for section in sections])]) + "\n")
    assert list(dvc_forms.stages()) == [
        "fetch",
        "prepare",
        "extractor",
        "reference",
        "init",
        "train",
        "sample",
        "evaluate",
        "compare",
    ]
    assert list(every())[:4] == ["data@mnist", "init", "train@mnist-linear-0", "mnist-linear-25-0"]
    assert list(every())[-1] == "compare"


def test_only_what_is_affected_is_kept() -> None:
    kept = units.only({f"evaluate@{CELL}", "compare"}, list(every().values()))
    assert kept == [Unit(CELL, (f"evaluate@{CELL}",), ()), Unit("compare", ("compare",), (CELL,))]
    assert units.only(set(), list(every().values())) == []


def test_one_cell_has_its_dataset_and_its_training() -> None:
    assert [unit.name for unit in units.leading_to(CELL, list(every().values()))] == [
        "data@mnist",
        "init",
        f"train@{NETWORK}",
        CELL,
    ]


def test_the_end_is_told_by_what_each_takes_and_how_many_run() -> None:
    a, b = Unit("data@a", ("fetch@a",), ()), Unit("data@b", ("fetch@b",), ())
    cells = [Unit(f"a-x-{T}-0", (f"sample@a-x-{T}-0",), ("data@a",)) for T in (1, 2)]
    last = Unit("compare", ("compare",), ("a-x-1-0", "a-x-2-0", "data@b"))
    seconds = {"data@a": 1.0, "data@b": 5.0, "a-x-1-0": 2.0, "a-x-2-0": 2.0, "compare": 1.0}
    todo = [a, *cells, b, last]
    assert units.ends(todo, 1, seconds) == {"data@a": 1, "a-x-1-0": 3, "a-x-2-0": 5, "data@b": 10, "compare": 11}
    assert units.ends(todo, 2, seconds) == {"data@a": 1, "a-x-1-0": 3, "data@b": 5, "a-x-2-0": 5, "compare": 6}
    assert units.ends([], 2, {}) == {}


def test_where_networks_are_shared_one_training_goes_before_the_others_of_its_dataset_and_seed() -> None:
    loaded, todo = params.load(), list(every().values())
    assert units.one_training_first(todo, loaded) == todo
    shared = loaded.model_copy(update={"train": loaded.train.model_copy(update={"shared": True})})
    needs = {unit.name: unit.needs for unit in units.one_training_first(todo, shared)}
    assert needs["train@mnist-linear-0"] == ("data@mnist", "init")
    assert needs[f"train@{NETWORK}"] == ("data@mnist", "init", "train@mnist-linear-0")
    assert needs["train@persian_glyphs-cosine-0"] == ("data@persian_glyphs", "init", "train@persian_glyphs-linear-0")
    assert needs[CELL] == every()[CELL].needs
    alone = units.leading_to(CELL, todo)
    assert units.one_training_first(alone, shared) == alone
