"""The weights to begin with are a copy of what is there, or none; and what is not there is told."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages import init
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.pipeline import params, paths, sources
from stages.pipeline.checkpoint import save_tensors

ROOT = Path(__file__).parents[1]
WEIGHTS = {"stem.weight": torch.arange(4.0)}
ABOUT = {"network": {"base_channels": 8}, "class_names": ["a"], "diffusion": {"prediction": "v"}, "machines": []}


@pytest.fixture(autouse=True)
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mnist-linear_unscaled-3", "my_letters-cosine-0"):
        save_tensors(paths.weights(name) / "ema.safetensors", WEIGHTS, **ABOUT)


def test_without_a_name_there_are_no_weights_and_the_bytes_are_the_same() -> None:
    found = []
    for _ in range(2):
        init.main(None)
        found.append(paths.INIT.read_bytes())
    assert load_tensors(paths.INIT) == ({}, {})
    assert found[0] == found[1]


@pytest.mark.parametrize("named", ["mnist-linear_unscaled-1000-3", "models/networks/mnist-linear_unscaled-3/ema.safetensors"])
def test_a_cell_or_a_file_is_copied(named: str) -> None:
    init.main(named)
    weights, about = load_tensors(paths.INIT)
    assert torch.equal(weights["stem.weight"], WEIGHTS["stem.weight"])
    assert (about["class_names"], about["diffusion"], len(about["sha256"])) == (["a"], {"prediction": "v"}, 64)
    assert named not in str(about), "where it lay decides nothing"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (
            "mnist-cosine-100-0",
            r"models/networks/mnist-cosine-0/ema.safetensors is missing; networks that are here: mnist-lin.*, my_l",
        ),
        ("none.safetensors", r"none.safetensors is missing"),
        ("mnist", r"train.init = mnist is no cell and no .safetensors file; networks that are here: mnist-"),
        ("../x-cosine-1-0", r"is no cell"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(named: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        init.main(named)
    assert not paths.INIT.exists()


def test_a_file_that_holds_no_network_is_told() -> None:
    save_tensors(Path("other.safetensors"), WEIGHTS)
    with pytest.raises(
        UserError, match=r"train.init = other.safetensors holds no whole network that a training of this project wrote"
    ):
        init.main("other.safetensors")
    save_file(WEIGHTS, "foreign.safetensors")
    with pytest.raises(UserError, match=r"train.init = foreign.safetensors holds no whole network"):
        init.main("foreign.safetensors")


def with_init(named: str | None) -> params.Params:
    """The parameters with train.init."""
    loaded = params.load(ROOT / "params.yaml")
    return loaded.model_copy(update={"train": loaded.train.model_copy(update={"init": named})})


def test_a_file_that_changed_since_it_was_taken_is_told_and_the_network_of_the_sweep_itself_is_not() -> None:
    shutil.copy(paths.weights("my_letters-cosine-0") / "ema.safetensors", "mine.safetensors")
    for named, told in (("mine.safetensors", True), ("my_letters-cosine-25-0", True), ("mnist-cosine-25-0", False)):
        path = sources.file_to_begin_with(named) if told else paths.weights("mnist-cosine-0") / "ema.safetensors"
        save_tensors(path, WEIGHTS, **ABOUT)
        init.main(named)
        loaded = with_init(named)
        assert sources.changed(loaded) == []
        save_tensors(path, {"stem.weight": torch.zeros(4)}, **ABOUT)
        lines = sources.changed(loaded)
        assert len(lines) == told
        assert all(f"{named} changed since trainings began with it; `dvc repro -f init` takes it in" == line for line in lines)
    assert sources.changed(with_init(None)) == []


def test_what_is_not_there_is_told_in_the_plan_unless_it_was_taken_before(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = with_init("gone.safetensors")
    with pytest.raises(UserError, match=r"train.init = gone.safetensors: .*gone.safetensors is missing"):
        sources.refuse_missing_weights(loaded)
    taken = "  init:\n    params:\n      params.yaml:\n        train.init: gone.safetensors\n"
    monkeypatch.setattr(sources, "read_lock", lambda: {"init": taken})
    sources.refuse_missing_weights(loaded)
    sources.refuse_missing_weights(with_init(None))
