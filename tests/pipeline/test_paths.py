"""An entry of dvc.yaml for one cell."""

import pytest

from stages.pipeline import paths

STAGE = {
    "deps": ["data/${item.dataset}.x", "w/${key}/a", "s/${item.schedule}.py", "p/${sample.fast.sampler}.py", "p/${sample.other}.py"]
}


def test_deps_are_those_of_the_cell_and_of_what_the_parameters_choose() -> None:
    values = {"sample": {"fast": {"sampler": "heun"}, "other": "ddpm"}}
    cell = "mnist-linear_unscaled-200-0"
    expected = ["data/mnist.x", f"w/{cell}/a", "s/linear_unscaled.py", "p/heun.py", "p/ddpm.py"]
    assert paths.deps(STAGE, cell, values) == expected
    values["sample"]["other"] = "heun"
    assert paths.deps(STAGE, cell, values) == expected[:-1], "each once"
    assert paths.deps({"deps": ["data/${item.dataset}.x"]}, "mnist", {}) == ["data/mnist.x"]
    network = "w/${item.dataset}-${item.schedule}-${item.seed}/${key}"
    assert paths.of_item(network, cell) == f"w/mnist-linear_unscaled-0/{cell}"
    assert paths.of_item(network, "mnist-cosine-7") == "w/mnist-cosine-7/mnist-cosine-7"
    with pytest.raises(KeyError, match="fast"):
        paths.deps(STAGE, cell, {"sample": {}})
