from pathlib import Path

import pytest


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
