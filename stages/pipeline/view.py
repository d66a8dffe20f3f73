"""What the MLflow UI shows of the cells: which columns, which charts, in which order. The UI calls it a shared view.

It is kept as a tag of the experiment, in the form that the UI itself writes; a person's own changes to it are kept.
"""

import base64
import colorsys
import itertools
import json
import zlib
from typing import Any

from stages.pipeline.params import Cell, Sweep

KEY = "cells"
TAG = f"mlflow.sharedViewState.{KEY}"
LINK = f"viewStateShareKey={KEY}"  # of the page that opens with it

_COLUMNS = ("tags.`dataset`", "tags.`schedule`", "tags.`T`", "metrics.`fid`", "metrics.`accuracy`", "metrics.`confident_ratio`")
_BARS = ("fid", "accuracy", "confident_ratio")
_LINES = ("train_loss", "val_loss", "snapshot_fid")
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


def color(cell: Cell, sweep: Sweep) -> str:
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
