"""All that is known here of MLflow's private forms: the tables of its database, names of pictures, the state of a view of its UI.

Written for MLflow 3.17. tests/tracking/test_mlflow_forms.py compares each with what the installed MLflow does, tests/test_ui.py
with what its UI shows.
"""

import base64
import colorsys
import itertools
import json
import re
import sqlite3
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.pipeline.params import Cell, Sweep

VERSION = "3.17"
TABLES = "dc11669786a5"  # the version of the tables that it makes; quicker than to ask for it
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR"}  # MLflow reads them when it is imported

PATHS = (  # columns that hold absolute paths of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

# A view of the UI, which calls it shared: which columns, which charts, in which order. It is kept as a tag of the experiment, in
# the form that the UI itself writes; a person's own changes to it are kept.
KEY = "cells"
TAG = f"mlflow.sharedViewState.{KEY}"
LINK = f"viewStateShareKey={KEY}"  # of the page that opens with it

_COLUMNS = ("tags.`dataset`", "tags.`schedule`", "tags.`T`", "metrics.`fid`", "metrics.`accuracy`", "metrics.`confident_ratio`")
_BARS = ("fid", "accuracy", "confident_ratio")
_LINES = ("train_loss", "val_loss")
_SHOWN, _FOLDED = ("scores", "pictures", "training"), ("Model metrics", "System metrics")
_LINE = {
    "lineSmoothness": 0,
    "xAxisScaleType": "linear",
    "scaleType": "linear",
    "range": {},
    "xAxisKey": "step",
    "selectedXAxisMetricKey": "",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "ignoreOutliers": False,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}


def color(cell: "Cell", sweep: "Sweep") -> str:
    """The colour of a cell's run, #rrggbb: a hue for each dataset and schedule, darker at smaller T. MLflow's own may coincide."""
    kinds, T = list(itertools.product(sweep.datasets, sweep.schedules)), sorted(sweep.timesteps)
    hue = kinds.index((cell.dataset, cell.schedule)) / len(kinds)
    lightness = 0.36 + 0.32 * T.index(cell.T) / max(len(T) - 1, 1)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.6))


def tag(sections: list[str], last_report: int, before: str | None) -> str:
    """The value of the tag: scores as bars, the pictures at the last report of training, losses; all else folded away.

    Args:
        sections: of the other metrics.
        last_report: where the slider of the pictures stands at first.
        before: the tag that is there; it stays when a person has saved changes to it.
    """
    if before and _is_changed(before):
        return before
    charts = [_chart(name, "scores", "BAR", metricKey=name, displayName=name) for name in _BARS]
    charts += [_chart("preview", "pictures", "IMAGE", imageKeys=["preview"], step=last_report, showRunParams=False)]
    charts += [_chart(name, "training", "LINE", metricKey=name, displayName=name, **_LINE) for name in _LINES]
    state = {
        "searchFilter": "tags.current = 'true'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": _COLUMNS,
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOWALL",
        "compareRunCharts": charts,
        "compareRunSections": [_section(name, name in _SHOWN) for name in (*_SHOWN, *sections, *_FOLDED)],
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()  # a tag holds 5,000 characters
    return json.dumps({"name": "Cells", "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})


def _is_changed(before: str) -> bool:
    """Whether a person has saved changes to a tag; what is no view at all is not kept."""
    try:
        held = json.loads(before)
    except ValueError:
        return False
    return isinstance(held, dict) and bool(held.get("updatedAt"))


def _chart(name: str, section: str, kind: str, **more: Any) -> dict[str, Any]:
    shown = {"runsCountToCompare": 100, "deleted": False, "isGenerated": True}
    return {"uuid": f"naqsh-{name}", "type": kind, "metricSectionId": f"naqsh-{section}", **shown, **more}


def _section(name: str, shown: bool) -> dict[str, Any]:
    place: dict[str, Any] = {"isReordered": True, "deleted": False, "isGenerated": True}
    if name == "pictures":
        place |= {"columns": 1, "cardHeight": 720}  # room for several runs side by side
    return {"uuid": f"naqsh-{name}", "name": name, "display": shown, **place}


def state(database: sqlite3.Connection) -> str:
    """What a database is to this MLflow: "current", "newer", "older" (if it holds runs), "unfinished" (if none), or "foreign"."""
    tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
    if tables and not tables & {"experiments", "alembic_version"}:
        return "foreign"
    found = version(database)
    if found and (found == TABLES or found == newest_tables()):
        return "current"
    if found and not _is_known(found):
        return "newer"
    return "older" if "runs" in tables and database.execute("select 1 from runs limit 1").fetchone() else "unfinished"


def version(database: sqlite3.Connection) -> str:
    """The version of a database's tables; empty where it tells none."""
    named = database.execute("select 1 from sqlite_master where name = 'alembic_version'").fetchone()
    return "".join(version for (version,) in database.execute("select version_num from alembic_version")) if named else ""


def newest_tables() -> str:
    """The version of the tables that this MLflow makes."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())


def _is_known(version: str) -> bool:
    """Whether this MLflow or an earlier one makes tables of a version."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    return any(script.revision == version for script in ScriptDirectory.from_config(_get_alembic_config("")).walk_revisions())


def upgrade_database(address: str) -> None:
    """Bring the tables of a database to the newest version, in place, and close it. A failure leaves it half upgraded."""
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(address)
    try:
        _upgrade_db(engine)
    finally:
        engine.dispose()


def make_database(address: str, artifacts: Path) -> None:
    """Make a database that holds no run, and close it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        SqlAlchemyStore(address, str(artifacts)).engine.dispose()
    finally:
        SqlAlchemyStore._engine_map.pop(address, None)  # the next to be made has the same name


def close(address: str) -> None:
    """Close the connections that this process has to a database."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if engine := SqlAlchemyStore._engine_map.get(address):
        engine.dispose()


def tag_values(database: sqlite3.Connection, key: str) -> set[str]:
    """The values that a tag has in runs and experiments."""
    tags = "select value from tags where key = :key union select value from experiment_tags where key = :key"
    return {value for (value,) in database.execute(tags, {"key": key})}


def move_paths(database: sqlite3.Connection, old: str, new: str, *, tag: str, value: str) -> int:
    """Replace the folder at the start of all paths, and a tag of the runs and experiments that had it; the number of paths."""
    return sum(
        _move(database, table, column, {"old": old, "new": new, "n": len(old), "here": value, "key": tag})
        for table, column in PATHS
    )


def _move(database: sqlite3.Connection, table: str, column: str, names: dict[str, Any]) -> int:
    had = f"({column} = :old or substr({column}, 1, :n + 1) = :old || '/')"
    kind = {"runs": ("tags", "run_uuid"), "experiments": ("experiment_tags", "experiment_id")}.get(table)
    if kind:
        tags, ident = kind
        chosen = f"select {ident} from {table} where {had}"
        database.execute(f"update {tags} set value = :here where key = :key and {ident} in ({chosen})", names)
    return database.execute(f"update {table} set {column} = :new || substr({column}, :n + 1) where {had}", names).rowcount


def preview_step(path: str) -> int | None:
    """The step of a logged preview, by the path of the smaller of its two files, a WebP beside a PNG; None for other files."""
    found = re.fullmatch(r"images/preview\+step\+(\d+)\+.*\.webp", path)
    return int(found[1]) if found else None
