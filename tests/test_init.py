"""The weights to begin with are a copy of what is there, or none; and what is not there is told."""

from pathlib import Path

import pytest
import torch

from stages import init
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.pipeline import paths
from stages.pipeline.checkpoint import save_tensors

WEIGHTS = {"stem.weight": torch.arange(4.0)}
ABOUT = {"network": {"base_channels": 8}, "class_names": ["a"], "machines": []}


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
    assert (about["init"], about["class_names"], len(about["sha256"])) == (named, ["a"], 64)


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
    with pytest.raises(UserError, match=r"other.safetensors is damaged .*network"):
        init.main("other.safetensors")
