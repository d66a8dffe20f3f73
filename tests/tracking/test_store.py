"""The local database: made whole or not at all, made anew when a kill left half of one, moved and copied with its folder."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cells import CELL, edit, followed, make_files, make_previews, publish, record, runs
from filelock import FileLock
from mlflow import MlflowClient

from stages.errors import UserError
from stages.tracking import mirror, mlflow_forms, patience, store

MAKE = "from stages.tracking import mirror\nprint('started', flush=True)\nmirror.sync()"


def client(tree: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tree / 'mlflow.db'}")


def query(path: Path, text: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute(text).fetchall()


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_two_who_find_no_database_make_one(tree: Path) -> None:
    (tree / "mlflow.db").unlink()
    two = [subprocess.Popen([sys.executable, "-c", MAKE], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in two] == ["", ""]
    assert len(client(tree).search_experiments(filter_string="name = 'naqsh'")) == 1
    assert not list(tree.glob("mlflow.db.[pb]*"))


def test_who_finds_no_database_waits_for_who_makes_it(tree: Path) -> None:
    def use(*, asked: bool = False) -> None:
        lock.acquire()
        timer = threading.Timer(0.5, lock.release)
        timer.start()
        try:
            with store.alone(patience.Watch(store.uri(), call=0.1), asked=asked):
                pass
        finally:
            timer.join()

    lock = FileLock(tree / "mlflow.db.lock", thread_local=False)
    with pytest.raises(patience.BusyError, match="another process writes to the store"):  # and may do so for long
        use()
    use(asked=True)
    (tree / "mlflow.db").unlink()
    use()


def test_a_store_that_another_process_uses_is_not_down(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that publish side by side wait for each other; that takes nothing from the time that a store may cost."""
    monkeypatch.setenv("NAQSH_REPRO", "one")
    monkeypatch.setattr(patience, "CALL", 0.6)
    with FileLock(tree / "mlflow.db.lock"):
        for _ in range(2):
            assert not mirror.sync()
    assert patience.left(store.uri()) == patience.BUDGET
    publish(CELL)
    assert len(runs(tree)) == 1


@pytest.mark.parametrize("tables", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 60))])
def test_a_kill_while_the_database_is_made_leaves_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tables: int
) -> None:
    """The kill comes as soon as there are so many tables."""
    database, partial = tree / "mlflow.db", tree / "mlflow.db.partial"
    database.unlink()
    with subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        while process.poll() is None and not database.exists():
            with contextlib.suppress(sqlite3.Error):
                if partial.exists() and len(query(partial, "select name from sqlite_master where type = 'table'")) >= tables:
                    break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not database.exists()
    publish(CELL)
    assert "not recorded" not in capsys.readouterr().err
    assert len(runs(tree)) == 1
    assert not list(tree.glob("mlflow.db.[pb]*"))


def test_a_failure_while_the_database_is_made_leaves_none(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "mlflow.db").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
        assert not mirror.sync()
    assert capsys.readouterr().err.startswith("MLflow: not recorded: No space left on device;")
    assert not list(tree.glob("mlflow.db*[!k]"))
    assert mirror.sync()


def half(path: Path, how: str) -> None:
    """What a kill may leave of a database that was made in place, or what was never one."""
    if how == "nothing":
        path.write_bytes(b"")
    elif how == "no database":
        path.write_bytes(b"not a database" * 100)
    else:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
            if how == "no version":
                database.execute("drop table alembic_version")
            elif how == "empty version":
                database.execute("delete from alembic_version")
            elif how == "old version":
                database.execute("update alembic_version set version_num = 'acf3f17fdcc7'")
            for name in (name for name in tables if name in ("logged_models", "trace_info")):
                database.execute(f"drop table {name}")


@pytest.mark.parametrize("how", ["nothing", "no database", "no version", "empty version", "old version"])
def test_an_unfinished_database_is_made_anew(
    tree: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    half(tree / "mlflow.db", how)
    monkeypatch.setattr(store, "_make", lambda file, _: shutil.copy(empty_store, file))  # quicker
    (tree / "mlflow.db-journal").write_bytes(b"of the unfinished one")
    before = (tree / "mlflow.db").read_bytes()
    publish(CELL)
    assert len(runs(tree)) == 1
    kept = list(tree.glob("mlflow.db.broken-*[0-9]"))
    assert [path.read_bytes() for path in kept] == ([before] if before else [])
    assert "not recorded" not in capsys.readouterr().err


def copy(source: Path, target: Path) -> Path:
    with contextlib.closing(sqlite3.connect(source)) as database, contextlib.closing(sqlite3.connect(target)) as written:
        database.backup(written)
    return target


def test_what_is_half_upgraded_newer_or_somebody_elses_stays(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(CELL)
    half(copy(tree / "mlflow.db", tree / "half.db"), "old version")
    for name, change in (
        ("newer.db", "update alembic_version set version_num = '0123456789ab'"),
        ("other.db", "create table mine (x)"),
    ):
        if name == "newer.db":
            copy(tree / "mlflow.db", tree / name)
        with contextlib.closing(sqlite3.connect(tree / name, isolation_level=None)) as database:
            database.execute(change)
    before = [query(tree / name, "select * from sqlite_master") for name in ("half.db", "newer.db", "other.db")]
    for name, says in (
        ("half.db", "holds runs of an older MLflow, and a copy of it could not be upgraded ((sqlite3.OperationalError) "),
        ("newer.db", "is of a newer MLflow, whose tables (version 0123456789ab) the one installed here does not know; install"),
        ("other.db", "is no database of MLflow"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{name}")
        publish(CELL)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"MLflow: not recorded: {tree / name} {says}")
    assert [query(tree / name, "select * from sqlite_master") for name in ("half.db", "newer.db", "other.db")] == before
    assert len(query(tree / "half.db", "select * from runs")) == len(query(tree / "newer.db", "select * from runs")) == 1
    assert not [path.name for path in tree.glob("*.db.*") if not path.name.endswith((".lock", "-shm", "-wal"))]


OLDER = "b7e4c1a90f23"  # the version of the tables of an MLflow that had fewer


def make_older(tree: Path) -> str:
    """Let a database be as an older MLflow would have left it, with a run and in the midst of being written; the run's id."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    publish(CELL)
    (run,) = runs(tree)
    mlflow_forms.close(f"sqlite:///{tree / 'mlflow.db'}")
    command.downgrade(_get_alembic_config(f"sqlite:///{tree / 'mlflow.db'}"), OLDER)
    return str(run.info.run_id)


def test_an_older_database_is_upgraded_on_a_copy(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = make_older(tree)
    (tree / "mlflow.db").chmod(0o600)
    tables = query(tree / "mlflow.db", "select name from sqlite_master order by name")
    metrics = f"select key, value, step from metrics where run_uuid = '{run_id}' order by key, step"
    before = query(tree / "mlflow.db", metrics)
    capsys.readouterr()

    with contextlib.closing(sqlite3.connect(tree / "mlflow.db", isolation_level=None)) as other:  # such as a UI
        other.execute("select * from runs").fetchall()
        publish(CELL)
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be upgraded: another process has it open" in line
    edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    publish(CELL)
    kept = tree / f"mlflow.db.before-{OLDER}-1"
    assert capsys.readouterr().err.splitlines() == [
        f"MLflow: mlflow.db was an older MLflow's; it is upgraded, and kept as it was in {kept.name}"
    ]
    old, new = runs(tree)
    assert (old.info.run_id, old.data.tags["current"], new.data.tags["current"]) == (run_id, "false", "true")
    assert query(tree / "mlflow.db", metrics) == before
    assert query(tree / "mlflow.db", "select version_num from alembic_version") == [(mlflow_forms.TABLES,)]
    assert query(kept, "select name from sqlite_master order by name") == tables
    assert query(kept, metrics) == before
    assert (tree / "mlflow.db").stat().st_mode & 0o777 == kept.stat().st_mode & 0o777 == 0o600
    assert {path.name.removeprefix(kept.name) for path in tree.glob("mlflow.db.[!l]*")} <= {"", "-wal", "-shm"}
    publish(CELL)
    assert not capsys.readouterr().err


KILLED = """
import contextlib, os, pathlib, signal, sqlite3
from alembic.runtime.migration import HeadMaintainer
from stages.tracking import mirror, mlflow_forms, store

def deadly(function):
    def call(*arguments):
        global left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments)
    return call

for place, name in ((store, "_copy"), (store, "_put"), (mlflow_forms, "upgrade_database"), (store.shutil, "copymode"),
                    (HeadMaintainer, "update_to_step"), (pathlib.Path, "rename")):
    setattr(place, name, deadly(getattr(place, name)))
store.load()
for left in range(100):
    if not os.fork():
        mirror.sync()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        print(code, mlflow_forms.version(database), *database.execute("select run_uuid from runs").fetchone())
    if not code:
        break
"""


@pytest.mark.slow
def test_a_kill_while_a_database_is_upgraded_leaves_the_old_one(tree: Path) -> None:
    """The kill comes at each of: a copy, its end, the upgrade, each step of it, the copy that is kept, its name, the new one's."""
    run_id = make_older(tree)
    older = copy(tree / "mlflow.db", tree / "older.db")
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    told = [line.split() for line in done.stdout.splitlines() if not line.startswith("MLflow")]
    assert told == [[str(-signal.SIGKILL), OLDER, run_id]] * (len(told) - 1) + [["0", mlflow_forms.TABLES, run_id]]
    assert len(told) > 12
    for kept in [tree / f"mlflow.db.before-{OLDER}-1", *tree.glob("mlflow.db.before-*")]:
        assert query(kept, "select * from metrics") == query(older, "select * from metrics")
    assert not list(tree.glob("mlflow.db.*partial*"))


def test_a_database_that_cannot_be_written_is_one_line(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connect = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda path, **named: connect(f"file:{path}?mode=ro", uri=True, **named))
        publish(CELL)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tree / 'mlflow.db'} is read-only; `chmod u+w" in line


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_moved_or_copied_folder_writes_into_itself(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    publish(CELL)
    (old,) = runs(tree)
    client(tree).set_tag(old.info.run_id, "note", "mine")
    elsewhere = client(tree).create_experiment("elsewhere", artifact_location="/somewhere/mlruns")
    new = tree.with_name(f"{tree.name}-new")
    monkeypatch.chdir(tree.parent)
    (shutil.move if how == "moved" else shutil.copytree)(tree, new)
    before = digests(tree)
    monkeypatch.chdir(new)
    edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    capsys.readouterr()
    publish(CELL)
    assert f"moved or copied from {tree}" in capsys.readouterr().err
    assert digests(tree) == before
    assert tree.exists() == (how == "copied")
    first, second = runs(new)
    assert first.info.run_id == old.info.run_id
    for run in (first, second):
        assert (new / "mlruns") in Path(run.info.artifact_uri).parents
        assert "samples/grid.png" in [file.path for file in client(new).list_artifacts(run.info.run_id, "samples")]
        assert run.data.tags["naqsh.workspace"].endswith(f":{new}")
    assert client(new).get_experiment(elsewhere).artifact_location == "/somewhere/mlruns"
    assert client(new).get_experiment_by_name("naqsh").artifact_location == str(new / "mlruns")
    assert f"{tree}/" not in str(
        [query(new / "mlflow.db", f"select {column} from {table}") for table, column in mlflow_forms.PATHS]
    )
    publish(CELL)
    assert not capsys.readouterr().err


def test_a_folder_that_is_moved_before_its_first_run_writes_into_itself(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirror.sync()
    new = tree.with_name("new")
    shutil.move(tree, new)
    monkeypatch.chdir(new)
    publish(CELL)
    (run,) = runs(new)
    assert (new / "mlruns") in Path(run.info.artifact_uri).parents
    assert not tree.exists()


def test_sync_draws_removed_pictures_again(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_previews(CELL, 1)
    record(CELL, last="evaluate")
    assert mirror.sync()
    assert "1 of 12 cells have results, 1 of them" in capsys.readouterr().out
    assert mirror.sync()
    assert "1 of 12 cells have results, 0 of them" in capsys.readouterr().out
    before = {Path(path).name.partition("+timestamp")[0] for path in digests(tree / "mlruns")}
    shutil.rmtree(tree / "mlruns")
    assert mirror.sync()
    assert {Path(path).name.partition("+timestamp")[0] for path in digests(tree / "mlruns")} == before
    (run,) = runs(tree)
    (Path(run.info.artifact_uri) / "samples/chain.png").unlink()
    assert mirror.sync()
    assert "1 of 12 cells have results, 1 of them" in capsys.readouterr().out
    assert (Path(run.info.artifact_uri) / "samples/chain.png").exists()


def test_a_deleted_experiment_is_restored_when_told(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(CELL)
    client(tree).delete_experiment("1")
    publish(CELL)
    assert "the experiment naqsh was deleted; `python -m stages.tracking restore`" in capsys.readouterr().err
    assert client(tree).get_experiment("1").lifecycle_stage == "deleted"
    assert mirror.restore()
    publish(CELL)
    assert not capsys.readouterr().err
    assert len(runs(tree)) == 1


def test_a_deleted_run_stays_deleted_and_its_cell_gets_a_new_one(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(CELL)
    (deleted,) = runs(tree)
    client(tree).delete_run(deleted.info.run_id)
    publish(CELL)
    (run,) = runs(tree)
    assert run.info.run_id != deleted.info.run_id
    assert client(tree).get_run(deleted.info.run_id).info.lifecycle_stage == "deleted"
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["naqsh.key", "naqsh.cell", "current", "naqsh.workspace", "naqsh.scores"])
def test_a_run_without_one_of_its_tags_stops_nothing(tree: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    publish(CELL)
    client(tree).delete_tag(runs(tree)[0].info.run_id, name)
    record(CELL, last="evaluate")
    mirror.publish(CELL)
    mirror.fail([CELL], "no memory")
    assert mirror.sync()
    assert not capsys.readouterr().err
    assert [run.info.status for run in runs(tree) if run.data.tags.get("current") == "true"].count("FINISHED") >= 1


def test_pictures_of_others_stop_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_previews(CELL, 1)
    publish(CELL)
    (run,) = runs(tree)
    for name in ("mine.webp", "preview+step+x+y.webp", "other+step+1+z.webp"):
        (Path(run.info.artifact_uri) / "images" / name).write_bytes(b"")
    make_files(CELL, fid=21.0)
    publish(CELL)
    assert not capsys.readouterr().err
    assert len(list((Path(run.info.artifact_uri) / "images").glob("preview+step+1+*.webp"))) == 1


def test_nothing_is_filed_under_the_key_of_later_settings(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(CELL, last="sample")
    edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
    mirror.publish(CELL)
    assert not runs(tree)
    assert capsys.readouterr().err.startswith(f"MLflow: {CELL} not recorded yet: params.yaml, the code or the data changed")
    edit("params.yaml", lambda text: text.replace("grad_clip: 2.0", "grad_clip: 1.0"))
    edit("stages/networks/unet.py", lambda text: text + "# changed\n")
    mirror.publish(CELL)
    assert not runs(tree)
    publish(CELL)
    assert len(runs(tree)) == 1


def test_a_failure_is_told_of_the_run_that_was_begun(tree: Path) -> None:
    with contextlib.suppress(UserError), followed(CELL):
        edit("params.yaml", lambda text: text.replace("grad_clip: 1.0", "grad_clip: 2.0"))
        raise UserError("the loss became nan")
    (run,) = runs(tree)
    assert (run.info.status, run.data.tags["error"], run.data.params["train.grad_clip"]) == (
        "FAILED",
        "train: the loss became nan",
        "1.0",
    )


@pytest.mark.parametrize("port", ["abc", "99999", "0", "-1", "٥", "in use"])
def test_a_port_that_cannot_be_had_is_one_line(tree: Path, port: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        command = [sys.executable, "-m", "stages.tracking", "ui", f"--port={taken if port == 'in use' else port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"MLflow: port {taken} is in use; `make ui PORT={int(taken) + 1}`"
        if port == "in use"
        else f"MLflow: port {port} is no number from 1 to 65535; `make ui PORT=5001`"
    ]
