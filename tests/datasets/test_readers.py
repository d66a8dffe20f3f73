"""The table of readers, and the mix of several."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stages.datasets import readers
from stages.datasets.readers import READERS
from stages.errors import UserError

PICTURES = {"licence": "mine", "size": 8, "invert": False, "pad": False, "group": None, "strict": False}
PICTURES |= {"validation_share": 0.25, "test_share": 0.5, "seed": 0}


def section(root: Path, classes: dict[str, int], seed: int) -> dict[str, Any]:
    """A folder of so many random images for each class, and the section of params.yaml for it."""
    rng = np.random.default_rng(seed)
    for name, n in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(root / name / f"{i}.png")
    return {"reader": "folder", "path": str(root), **PICTURES}


def test_every_reader_tells_its_licence_itself_or_asks_for_it() -> None:
    assert {name for name, reader in READERS.items() if reader.licence is None} == {"archive", "auto", "folder", "mix"}
    assert {name for name, reader in READERS.items() if reader.synthetic} == {"glyphs"}


@pytest.fixture
def mix(tmp_path: Path) -> dict[str, Any]:
    one = section(tmp_path / "one", {"a": 20, "b": 20}, seed=0)
    two = section(tmp_path / "two", {"b": 10, "c": 10}, seed=1)
    return {"reader": "mix", "of": {"one": one, "two": two}}


def raw(tmp_path: Path, options: dict[str, Any]) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    readers.fetch(folder, options)
    return folder


def test_a_mix_is_its_parts_with_classes_of_one_name_as_one(tmp_path: Path, mix: dict[str, Any]) -> None:
    folder = raw(tmp_path, mix)
    found = readers.read(folder, mix)
    parts = [readers.read(folder / name, options) for name, options in mix["of"].items()]
    assert found.class_names == ["a", "b", "c"]
    assert found.sources is not None
    for (name, (images, labels)), origin in zip(found.splits.items(), found.sources, strict=True):
        assert origin.dtype == torch.int64
        for i, part in enumerate(parts):
            of_part = part.splits[name]
            assert torch.equal(images[origin == i], of_part[0])
            names = [found.class_names[y] for y in labels[origin == i].tolist()]
            assert names == [part.class_names[y] for y in of_part[1].tolist()]
    assert readers.licence(mix) == "one: mine; two: mine"
    assert not readers.is_synthetic(mix)
    assert readers.is_synthetic({"reader": "mix", "of": {"one": {"reader": "glyphs"}, "two": mix["of"]["two"]}})


def test_an_image_of_two_splits_is_tested_on_else_validated_on(tmp_path: Path, mix: dict[str, Any]) -> None:
    again = tmp_path / "one again"
    (tmp_path / "one").rename(again)
    mix["of"]["one"]["path"] = str(again)
    mix["of"]["two"] = mix["of"]["one"] | {"seed": 1}  # the same images, divided otherwise
    found = readers.read(raw(tmp_path, mix), mix)
    pixels = {name: {image.numpy().tobytes() for image in images} for name, (images, _) in found.splits.items()}
    assert len(set.union(*pixels.values())) == sum(map(len, pixels.values())) == 40
    for seed in (0, 1):
        part = readers.read(tmp_path / "raw" / "one", mix["of"]["one"] | {"seed": seed})
        assert {image.numpy().tobytes() for image in part.test[0]} <= pixels["test"]
    assert sum(found.report["dropped"].values()) == 80 - sum(len(y) for _, y in found.splits.values()) > 0


def test_an_error_names_the_part(tmp_path: Path, mix: dict[str, Any]) -> None:
    mix["of"]["two"]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^of\.two: path = .*nowhere"):
        raw(tmp_path, mix)
