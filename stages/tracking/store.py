"""Opening the MLflow store: a local database is made whole, mended where it was moved, never waited for too long."""

import contextlib
import itertools
import logging
import os
import platform
import shutil
import sqlite3
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout

from stages.errors import UserError, masked
from stages.pipeline import params
from stages.pipeline.dvc_forms import workspace
from stages.tracking import mlflow_forms, patience
from stages.tracking.patience import Watch

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # to which artifacts go from here, not through a server
WORKSPACE = "naqsh.workspace"  # the tag of a run and of an experiment that says where it was made
_BESIDE = ("", "-journal", "-wal", "-shm")  # the files of a database
_SETTINGS = {
    **mlflow_forms.QUIET,
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # an address may hold a password
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def uri() -> str:
    """MLFLOW_TRACKING_URI, else mlflow.db in the workspace; the path of a sqlite store is made absolute."""
    named = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return f"{SQLITE}{workspace() / named.removeprefix(SQLITE)}" if named.startswith(SQLITE) else named


def here() -> str:
    """This machine and workspace, as the tag `naqsh.workspace` has it."""
    return f"{platform.node()}:{workspace()}"


def load() -> None:
    """Import MLflow, set to be silent and not to repeat itself. It takes seconds, and waits for no store."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # errors are told here, in one line


@contextlib.contextmanager
def alone(watch: Watch, *, asked: bool = False) -> Iterator[None]:
    """Hold the lock of the store, for two creators break a new database. Raises BusyError when another process keeps it.

    Who finds no database waits for as long as another process may need to make it; who was `asked` by a person, for as long too.
    """
    file = _file()
    path, making = f"{file or workspace() / 'mlflow.db'}.lock", file is not None and not file.exists()
    lock, long = FileLock(path), making or asked
    try:
        watch.call(lock.acquire, timeout=patience.LOCAL if long else watch.limit(), may_take=patience.LOCAL if long else None)
    except Timeout:
        raise patience.BusyError(f"another process writes to the store, and holds {path}") from None
    try:
        yield
    finally:
        lock.release()


def client(watch: Watch) -> "MlflowClient":
    """A client of the store whose every call is watched; a local database is made, or mended, before. Call it `alone`."""
    from mlflow import MlflowClient

    file = _file()
    if file:
        _prepare(file, watch)
    else:
        _check_address()
    return watched(watch.call(MlflowClient, uri(), may_take=patience.LOCAL if file else None), watch)


def experiment(client: "MlflowClient") -> str:
    """The id of the experiment that `runtime.experiment` names, made where it is missing. Raises UserError when it was deleted."""
    name, file = params.load().runtime.experiment, _file()
    found = client.get_experiment_by_name(name)
    if not found:
        root = file.parent if file else workspace()
        folder = str(root / "mlruns") if uri().startswith(_DATABASES) else None  # None: where the server says
        return str(client.create_experiment(name, artifact_location=folder, tags={WORKSPACE: here()} if file else None))
    if not found.experiment_id:
        raise UserError(f"{masked(uri())} answers, but not as MLflow does")
    if found.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name} was deleted; `python -m stages.tracking restore` restores it and its runs")
    return str(found.experiment_id)


def restore(client: "MlflowClient") -> None:
    """Restore the experiment where it was deleted."""
    found = client.get_experiment_by_name(params.load().runtime.experiment)
    if found and found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)


def watched(client: "MlflowClient", watch: Watch) -> "MlflowClient":
    """The client, with its calls timed by a watch."""
    return cast("MlflowClient", _Watched(client, watch))


class _Watched:
    def __init__(self, client: "MlflowClient", watch: Watch) -> None:
        self.unwatched, self._watch = client, watch

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.unwatched, name)
        return lambda *arguments, **named: self._watch.call(method, *arguments, **named)


def _check_address() -> None:
    """Raises UserError where MLFLOW_TRACKING_URI is no address at all."""
    try:
        _ = urllib.parse.urlsplit(uri()).port
    except ValueError as error:
        raise UserError(f"MLFLOW_TRACKING_URI is no address: {error}") from None


def _file() -> Path | None:
    """The database file of a local store."""
    where = uri()
    return Path(where.removeprefix(SQLITE)) if where.startswith(SQLITE) and "?" not in where else None


def _prepare(file: Path, watch: Watch) -> None:
    """Make sure that a database is whole, can be written, and holds paths of this workspace; MLflow would try for minutes.

    One that a kill left unfinished is set aside and made anew; one with the runs of an older MLflow is upgraded, and kept as it
    was. Raises UserError where a person has to decide.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder where the database of MLflow should be; move it away")
    state = watch.call(_state, file, watch.limit())
    if state == "unfinished":
        _set_aside(file)
        partial = file.with_name(f"{file.name}.partial")
        try:
            watch.call(_make, partial, file.parent / "mlruns", may_take=patience.LOCAL)
            watch.call(_put, partial, file)
        finally:
            _remove(partial)
    elif state == "older":
        watch.call(_upgrade, file, watch.limit(), may_take=patience.UPGRADE)
    watch.call(_mend, file, watch.limit())


@contextlib.contextmanager
def _open(file: Path, timeout: float) -> Iterator[sqlite3.Connection]:
    """A connection that writes in one transaction. Raises UserError where it may not, or another process does."""
    with contextlib.closing(sqlite3.connect(file, timeout=0.8 * timeout, isolation_level=None)) as database:
        try:
            database.execute("begin immediate")
            yield database
        except sqlite3.OperationalError as error:
            if "readonly" in str(error):
                raise UserError(f"{file} is read-only; `chmod u+w {file}` makes it writable") from None
            if "locked" in str(error):
                raise UserError(f"{file} is locked: another process writes to it") from None
            raise UserError(f"{file}: {error}") from None


def _state(file: Path, timeout: float) -> str:
    """Whether a database is "current", "older" or "unfinished". Raises UserError where it is a newer MLflow's or foreign."""
    if not file.exists():
        return "unfinished"
    try:
        with _open(file, timeout) as database:
            state, version = mlflow_forms.state(database), mlflow_forms.version(database)
    except sqlite3.DatabaseError:  # no database at all
        return "unfinished"
    if state == "foreign":
        raise UserError(f"{file} is no database of MLflow; give MLFLOW_TRACKING_URI another name")
    if state == "newer":
        raise UserError(
            f"{file} is of a newer MLflow, whose tables (version {version}) the one installed here does not know; "
            "install that one, or give MLFLOW_TRACKING_URI another name"
        )
    return state


def _upgrade(file: Path, timeout: float) -> None:
    """Put an upgraded copy in the place of an older MLflow's database, which is kept under another name.

    A kill leaves the old one or the new one, whole. Raises UserError where the old one is in use, or cannot be upgraded.
    """
    new, old = file.with_name(f"{file.name}.partial"), file.with_name(f"{file.name}.before.partial")
    _settle(file, timeout)
    try:
        with _open(file, timeout) as database:  # meanwhile nobody else writes
            kept = _free_name(file, f"before-{mlflow_forms.version(database) or 'upgrade'}")
            _copy(file, new)
            try:
                mlflow_forms.upgrade_database(f"{SQLITE}{new}")
            except Exception as error:
                raise UserError(
                    f"{file} holds runs of an older MLflow, and a copy of it could not be upgraded ({patience.reason(error)}); "
                    "put one from before in its place if an upgrade was broken off, or give MLFLOW_TRACKING_URI another name"
                ) from None
            _copy(file, old)
            old.rename(kept)
            _put(new, file)
    finally:
        _remove(new)
        _remove(old)
    told = f"MLflow: {file.name} was an older MLflow's; it is upgraded, and kept as it was in {kept.name}"
    print(told, file=sys.stderr, flush=True)


def _settle(file: Path, timeout: float) -> None:
    """Bring what lies beside a database into its file: a journal of the old one would damage a new one. Raises UserError."""
    mlflow_forms.close(f"{SQLITE}{file}")
    with contextlib.closing(sqlite3.connect(file, timeout=0.8 * timeout, isolation_level=None)) as database:
        try:
            database.execute("pragma journal_mode=delete")
        except sqlite3.OperationalError as error:
            why = "another process has it open; end it first" if "locked" in str(error) else str(error)
            raise UserError(f"{file} is an older MLflow's, and cannot be upgraded: {why}") from None


def _copy(file: Path, copy: Path) -> None:
    """Copy a database as it was last committed; the copy is on the disk when this returns."""
    _remove(copy)
    with contextlib.closing(sqlite3.connect(file)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    shutil.copymode(file, copy)


def _make(file: Path, artifacts: Path) -> None:
    """Make a database that holds no run, and close it."""
    _remove(file)  # what a kill left
    file.parent.mkdir(parents=True, exist_ok=True)
    mlflow_forms.make_database(f"{SQLITE}{file}", artifacts)
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _put(partial: Path, file: Path) -> None:
    """Give a finished database its name; a connection to what was there before is closed."""
    partial.replace(file)
    mlflow_forms.close(f"{SQLITE}{file}")


def _remove(file: Path) -> None:
    for end in _BESIDE:
        Path(f"{file}{end}").unlink(missing_ok=True)


def _free_name(file: Path, why: str) -> Path:
    """A name beside a file's that nobody has: NAME.why-1, NAME.why-2 ..."""
    return next(name for n in itertools.count(1) if not (name := file.with_name(f"{file.name}.{why}-{n}")).exists())


def _set_aside(file: Path) -> None:
    """Rename an unfinished database, and the files beside it: a journal of the old one would damage the new one."""
    kept = _free_name(file, "broken")
    if file.exists() and file.stat().st_size:
        print(
            f"MLflow: {file.name} is not finished or damaged; it is kept as {kept.name}, and made anew", file=sys.stderr, flush=True
        )
        for end in _BESIDE:
            with contextlib.suppress(FileNotFoundError):
                Path(f"{file}{end}").rename(f"{kept}{end}")
    _remove(file)


def _mend(file: Path, timeout: float) -> None:
    """Let several read a database while one writes; where it is the workspace's own, let its paths lead to the mlruns/ here."""
    with _open(file, timeout) as database:
        if file.parent.resolve() == workspace():
            _mend_paths(database)
        database.execute("commit")
        database.execute("pragma journal_mode=wal")


def _mend_paths(database: sqlite3.Connection) -> None:
    """Replace the paths of a database that was moved or copied with its folder: the tags name it. Other paths stay."""
    for old in sorted({value.partition(":")[2] for value in mlflow_forms.tag_values(database, WORKSPACE)} - {str(workspace()), ""}):
        moved = mlflow_forms.move_paths(database, f"{old}/mlruns", str(workspace() / "mlruns"), tag=WORKSPACE, value=here())
        if moved:
            told = f"MLflow: the store was moved or copied from {old}; its {moved} paths now lead to {workspace()}"
            print(told, file=sys.stderr, flush=True)
