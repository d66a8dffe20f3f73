"""Tensors on disk: the same come back, or one line says that the file is damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stages.drawing.network import load_network
from stages.drawing.weights import load_tensors
from stages.errors import UserError
from stages.networks.classifier import Classifier
from stages.networks.unet import UNet
from stages.pipeline import checkpoint

TENSORS = {
    "images": torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2),
    "scalar": torch.tensor(0.5, dtype=torch.float64),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "truth": torch.tensor([True, False]),
    "none": torch.empty(0),
    "odd": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
}
ABOUT = {"cell": "mnist", "interval": [float("-inf"), 0.1], "by": {10: "a", 9: "b"}, "none": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save_tensors(tmp_path / "x.safetensors", TENSORS, **ABOUT)
    return tmp_path / "x.safetensors"


def test_what_is_written_comes_back_and_is_written_to_the_same_bits(path: Path) -> None:
    tensors, about = load_tensors(path)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in tensors.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in TENSORS.items()
    }
    assert about == json.loads(json.dumps(ABOUT))
    before = path.read_bytes()
    checkpoint.save_tensors(path, dict(reversed(tensors.items())), **about)
    assert path.read_bytes() == before


def test_any_flipped_bit_is_told_in_one_line_or_changes_nothing(path: Path) -> None:
    whole = path.read_bytes()
    expected = {name: tensor.tolist() for name, tensor in TENSORS.items()}
    told = []
    for bit in range(8 * len(whole)):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            tensors, about = load_tensors(path)
        except UserError as error:
            told.append(str(error))
        else:
            assert ({name: tensor.tolist() for name, tensor in tensors.items()}, about) == (expected, json.loads(json.dumps(ABOUT)))
    assert len(told) > 0.99 * 8 * len(whole)
    assert all("is damaged" in line and "\n" not in line for line in told)


def test_a_file_that_is_cut_anywhere_is_told_in_one_line(path: Path) -> None:
    whole = path.read_bytes()
    for length in np.random.default_rng(0).integers(0, len(whole), 50).tolist():
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x\.safetensors is damaged .*; delete it and run `dvc repro`"):
            load_tensors(path)


@pytest.mark.parametrize("about", ["", "{", "3", "null", "[]", "[{}]", "[1, 2]", '[[], "x"]', '[{}, "x"]', "[" * 10_000])
def test_metadata_of_another_form_is_told_in_one_line(path: Path, about: str) -> None:
    save_file({"x": torch.zeros(1)}, path, metadata={"about": about})
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(path)


def test_a_file_of_an_earlier_version_is_loaded_and_one_without_metadata_is_not(path: Path) -> None:
    save_file(TENSORS | {"odd": torch.zeros(1)}, path, metadata={"about": json.dumps({"size": 28})})
    assert load_tensors(path)[1] == {"size": 28}
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(path)


def test_a_missing_tensor_or_name_is_told_with_the_file(path: Path) -> None:
    for part in load_tensors(path):
        with pytest.raises(UserError, match=r"x\.safetensors is damaged \(it has no 'no'\)"):
            part["no"]


def test_a_folder_or_nothing_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is damaged"):
        load_tensors(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        load_tensors(tmp_path / "x.safetensors")


NETWORK = {"stem_resolution": 8, "base_channels": 8, "channel_mult": [1], "blocks_per_level": 1, "attention_levels": []}
SAID = {"size": 8, "num_classes": 2, "logsnr": [-10.0, 10.0], "network": NETWORK | {"conditional": True}}


@pytest.mark.parametrize(
    "changes",
    [
        {"size": None},
        {"logsnr": ["x"]},
        {"network": {}},
        {"network": [1]},
        {"network": SAID["network"] | {"base_channels": 16}},
        {"network": SAID["network"] | {"base_channels": "x"}},
        {"num_classes": 3},
        {"num_classes": -7},
    ],
)
def test_a_network_that_is_not_the_one_that_its_file_describes_is_told_in_one_line(path: Path, changes: dict) -> None:
    weights = UNet(size=8, num_classes=2, **SAID["network"]).state_dict()
    checkpoint.save_tensors(path, weights, **SAID)
    assert load_network(path)[1] == SAID
    for said in (SAID | changes, {name: value for name, value in SAID.items() if name not in changes}):
        checkpoint.save_tensors(path, weights, **said)
        with pytest.raises(UserError, match=r"^\S+x\.safetensors is damaged [^\n]*; delete it and run `dvc repro`$"):
            load_network(path)
    checkpoint.save_tensors(path, {name: weights[name] for name in list(weights)[1:]}, **SAID)
    with pytest.raises(UserError, match="is damaged"):
        load_network(path)


def test_a_classifier_likewise(path: Path) -> None:
    weights = Classifier(size=16, num_classes=2).state_dict()
    checkpoint.save_tensors(path, weights, classifier={"size": 16, "num_classes": 2})
    checkpoint.load_classifier(path)
    for said in ({}, {"classifier": {}}, {"classifier": 3}, {"classifier": {"size": 16, "num_classes": 3}}):
        checkpoint.save_tensors(path, weights, **said)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load_classifier(path)
