"""One thread a process, for tests run side by side; a working tree with a store, for the tests of the mirror in MLflow."""

import os
import shutil
from pathlib import Path

import pytest
from cells import CELL, ROOT, make_files, record

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in every process below


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without experiments; to copy one is quicker than to make one."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def one_cell(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """What `tree` is a copy of."""
    folder = tmp_path_factory.mktemp("one_cell")
    for name in ("dvc.yaml", "params.yaml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(ROOT / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mlflow.db").write_bytes(empty_store.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files(CELL)
        record(CELL, last="fetch")
    return folder


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_cell: Path) -> Path:
    """A working tree with the code and the parameters of the project, raw data that DVC knows, and the files of one cell."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "NAQSH_REPRO"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(one_cell, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no process waits for another at the end."""
    longest = ("test_pipeline.py", "test_train.py", "test_store.py", "test_evaluate.py", "test_patience.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
