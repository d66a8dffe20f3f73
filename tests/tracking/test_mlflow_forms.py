"""MLflow's private forms are what this version of MLflow makes: its tables, the names of its pictures, the view of its UI."""

import shutil
import sqlite3
from pathlib import Path

import mlflow
import numpy as np
from mlflow import MlflowClient

from stages.tracking import mlflow_forms

RECHECK = "stages/tracking/mlflow_forms.py was written for MLflow {}, and here is {}: see what these tests say, then change VERSION"


def test_this_is_the_version_that_they_were_looked_at_in() -> None:
    assert mlflow.__version__.startswith(f"{mlflow_forms.VERSION}."), RECHECK.format(mlflow_forms.VERSION, mlflow.__version__)
    pinned = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"mlflow=={mlflow_forms.VERSION}.*"' in pinned, "`make lock` would bring another"


def test_a_database_is_known_by_its_tables(tmp_path: Path, empty_store: Path) -> None:
    assert mlflow_forms.newest_tables() == mlflow_forms.TABLES
    with sqlite3.connect(empty_store) as database:
        assert mlflow_forms.version(database) == mlflow_forms.TABLES
        assert mlflow_forms.state(database) == "current"
        columns = {
            (table, column)
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall()
            for _, column, *_ in database.execute(f"pragma table_info({table})").fetchall()
        }
    assert set(mlflow_forms.PATHS) <= columns
    named_so = {pair for pair in columns if pair[1] in ("artifact_location", "artifact_uri", "storage_location")}
    assert named_so <= set(mlflow_forms.PATHS)  # no other column holds the folder of artifacts
    with sqlite3.connect(tmp_path / "half.db") as database:
        assert mlflow_forms.state(database) == "unfinished"
        database.execute("create table alembic_version (version_num text)")
        assert mlflow_forms.state(database) == "unfinished"
        database.execute("insert into alembic_version values ('acf3f17fdcc7')")
        assert mlflow_forms.state(database) == "unfinished"
        database.execute("create table runs (x text)")
        database.execute("insert into runs values ('a run')")
        assert mlflow_forms.state(database) == "older"
        database.execute("update alembic_version set version_num = '0123456789ab'")
        assert mlflow_forms.state(database) == "newer"
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("create table mine (x text)")
        assert mlflow_forms.state(database) == "foreign"


def test_the_step_of_a_picture_is_in_its_name(tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("pictures", artifact_location=str(tmp_path / "mlruns"))
    run = client.create_run(experiment)
    client.log_image(run.info.run_id, np.zeros((4, 4), np.uint8), key="preview", step=17, synchronous=True)
    names = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert sorted(filter(None, map(mlflow_forms.preview_step, names))) == [17]
    assert len(names) == 2
