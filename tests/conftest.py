"""One thread a process, for tests run side by side; a working tree with a store, for the tests of the mirror in MLflow."""

import os
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


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A working tree with the code and the parameters of the project, raw data that DVC knows, and the files of one cell."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "NAQSH_REPRO"):
        monkeypatch.delenv(name, raising=False)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "stages").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    monkeypatch.chdir(tmp_path)
    make_files(CELL)
    record(CELL, last="fetch")
    return tmp_path
