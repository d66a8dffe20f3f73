"""How long things take before they were ever timed, and by what was timed."""

import json
from pathlib import Path

import pytest

from stages.pipeline import dvc_forms, params, processes
from stages.sweep import estimates, units

CELL = "mnist-cosine-100-0"


@pytest.fixture
def todo(bare_tree: Path) -> list[units.Unit]:
    return units.units(params.load(), dvc_forms.stages())


def timed(stage: str, item: str, seconds: float) -> None:
    path = Path(f".state/clocks/{stage}/{item}.0.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": seconds}))


def test_what_was_never_timed_is_guessed_from_what_it_has_to_do(todo: list[units.Unit]) -> None:
    loaded = params.load()
    seconds = estimates.seconds_of(todo, 2, loaded)
    assert seconds.keys() == {unit.name for unit in todo}
    assert min(seconds.values()) > 0
    longer = loaded.train.model_copy(update={"images": [3 * images for images in loaded.train.images]})
    tripled = estimates.seconds_of(todo, 2, loaded.model_copy(update={"train": longer}))
    train = "train@mnist-cosine-0"
    assert tripled[train] - estimates.START == pytest.approx(3 * (seconds[train] - estimates.START))
    assert {name for name in seconds if tripled[name] != seconds[name]} == {name for name in seconds if name.startswith("train@")}
    of_T = [seconds[CELL.replace("-100-", f"-{T}-")] for T in (25, 100, 1000)]
    assert of_T[2] - of_T[1] == pytest.approx(900 / 75 * (of_T[1] - of_T[0]))


def test_one_that_was_timed_counts_before_a_guess(todo: list[units.Unit]) -> None:
    before = estimates.seconds_of(todo, 2, params.load())
    timed("sample", CELL, 1000)
    after = estimates.seconds_of(todo, 2, params.load())
    assert after[CELL] == estimates.START + 1000 + estimates.FLAT["evaluate"]
    assert after["train@mnist-cosine-0"] == before["train@mnist-cosine-0"]


def test_what_was_timed_of_another_cell_counts_by_how_much_more_there_is_to_do(todo: list[units.Unit]) -> None:
    """After the README's first command, one cell of digits stands for all others."""
    for stage, item, seconds in (("train", "mnist-cosine-0", 100), ("sample", CELL, 20), ("evaluate", CELL, 10)):
        timed(stage, item, seconds)
    loaded = params.load()
    seconds = estimates.seconds_of(todo, 2, loaded)
    assert seconds[CELL] == estimates.START + 30
    more = (2000 * 14 + 128 * 1000) / (2000 * 14 + 128 * 100)
    assert seconds["mnist-linear-1000-0"] == pytest.approx(estimates.START + 20 * more + 10)
    assert seconds["train@mnist-linear-0"] == estimates.START + 100
    letters = 2 * 32**2 / 28**2  # twice the images, folded to 32 x 32
    assert seconds["train@persian_glyphs-linear-0"] == pytest.approx(estimates.START + 100 * letters)
    for path in Path(".state/clocks/train").iterdir():
        path.rename(path.with_name("gone-cosine-0.0.json"))  # of a dataset that is no more
    assert estimates.seconds_of(todo, 2, loaded)["train@mnist-linear-0"] == estimates.START + 100


def test_what_was_timed_may_be_of_a_dataset_that_is_no_longer_swept(todo: list[units.Unit]) -> None:
    timed("train", "mnist-cosine-0", 100)
    loaded = params.load()
    letters = loaded.model_copy(update={"sweep": loaded.sweep.model_copy(update={"datasets": ["persian_glyphs"]})})
    some = [unit for unit in todo if "persian_glyphs" in unit.name]
    folded = 2 * 32**2 / 28**2
    found = estimates.seconds_of(some, 2, letters)["train@persian_glyphs-linear-0"]
    assert found == pytest.approx(estimates.START + 100 * folded)


def test_a_cell_alone_draws_on_all_cores(todo: list[units.Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 8)
    loaded = params.load()
    drawn = [estimates.seconds_of(some, 8, loaded)[CELL] for some in (units.leading_to(CELL, todo), todo)]
    flat = estimates.START + estimates.FLAT["evaluate"]
    assert drawn[1] - flat == pytest.approx(8 * (drawn[0] - flat))


def test_a_shared_network_is_trained_once(todo: list[units.Unit]) -> None:
    loaded = params.load()
    shared = loaded.model_copy(update={"train": loaded.train.model_copy(update={"shared": True})})
    seconds = estimates.seconds_of(todo, 2, shared)
    assert seconds["train@mnist-cosine-0"] == estimates.START
    assert seconds["train@mnist-linear-0"] == estimates.seconds_of(todo, 2, loaded)["train@mnist-linear-0"]


def test_on_a_gpu_nothing_is_guessed(todo: list[units.Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "has_gpu", lambda: True)
    seconds = estimates.seconds_of(todo, 2, params.load())
    assert seconds["init"] is not None
    assert seconds[CELL] is None
    assert estimates.outlook(todo, 1, seconds) == "No estimate: not all of this was timed on this machine yet."
    for stage in ("sample", "evaluate"):
        timed(stage, CELL, 10)
    assert estimates.seconds_of(todo, 2, params.load())[CELL] == estimates.START + 20


def test_the_outlook_says_what_it_goes_by(todo: list[units.Unit]) -> None:
    cells = units.leading_to(CELL, todo)
    assert (
        estimates.outlook(cells, 1, {unit.name: 60.0 for unit in cells})
        == "Going by what a server CPU takes, all in about 4 min, 1 at a time"
    )
    for stage, item in (("fetch", "mnist"), ("prepare", "mnist"), ("extractor", "mnist"), ("reference", "mnist")):
        timed(stage, item, 1)
    for stage, item in (("train", "mnist-cosine-0"), ("sample", CELL), ("evaluate", CELL)):
        timed(stage, item, 1)
    assert estimates.outlook(cells, 2, {unit.name: 60.0 for unit in cells}).startswith(
        "Going by earlier runs, all in about 3 min, 2"
    )
