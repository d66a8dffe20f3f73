from pathlib import Path

import pytest

from stages.datasets import enough


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The empty folder that fetch fills."""
    (tmp_path / "raw").mkdir()
    return tmp_path / "raw"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The folder of the user."""
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


@pytest.fixture(autouse=True)
def few_are_enough(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets as small as tests make them are no mistake, but where it is about that."""
    if "enough" not in request.module.__name__:
        monkeypatch.setattr(enough, "LEAST_OF_CLASS", 0)
        monkeypatch.setattr(enough, "LEAST_WITHOUT", 0)
