"""What `make repro` runs at a time: the stages of a dataset, a training, the drawing and scoring of a cell, the comparison."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from stages.pipeline import graph, params


class Unit(NamedTuple):
    """Stages that one `dvc repro` runs one after another.

    Args:
        name: data@DATASET, train@NETWORK, compare, or the name of a cell.
        stages: in order, as DVC names them.
        needs: the names of the units that must be done before.
    """

    name: str
    stages: tuple[str, ...]
    needs: tuple[str, ...]

    def is_cell(self) -> bool:
        """Whether it draws and scores a cell."""
        return "@" not in self.name and "-" in self.name


def units(loaded: params.Params, stages: dict[str, Any]) -> list[Unit]:
    """All units of the sweep, each after what it needs, in the order in which the first cell is done as soon as it can be.

    `stages`: the sections of dvc.yaml, in order. What a cell's stages read tells which training it needs.
    """
    needs, members = graph.needs(stages, loaded), dict[str, list[str]]()
    for stage in needs:
        members.setdefault(_unit_of(stage), []).append(stage)
    between = {
        name: tuple(dict.fromkeys(unit for stage in within for other in needs[stage] if (unit := _unit_of(other)) != name))
        for name, within in members.items()
    }
    cells = {str(cell): between[str(cell)] for cell in loaded.sweep.cells()}
    return [Unit(name, tuple(members[name]), between[name]) for name in graph.depth_first(cells | between)]


def _unit_of(stage: str) -> str:
    kind, _, item = stage.partition("@")
    return stage if kind == "train" or not item else item if "-" in item else f"data@{item}"


def leading_to(cell: str, every: list[Unit]) -> list[Unit]:
    """The unit of a cell, and those that it needs."""
    wanted = {cell}
    for unit in reversed(every):
        wanted |= set(unit.needs) if unit.name in wanted else set()
    return [unit for unit in every if unit.name in wanted]


def only(stages: Collection[str], every: list[Unit]) -> list[Unit]:
    """The units with these of their stages alone, without those that have none."""
    kept = [unit._replace(stages=tuple(stage for stage in unit.stages if stage in stages)) for unit in every]
    names = {unit.name for unit in kept if unit.stages}
    return [unit._replace(needs=tuple(name for name in unit.needs if name in names)) for unit in kept if unit.stages]


def one_training_first(todo: list[Unit], loaded: params.Params) -> list[Unit]:
    """The same, where networks are shared with the trainings of a dataset and seed waiting for the first: they take its network."""
    first, waits, names = dict[tuple[str, int], str](), dict[str, tuple[str, ...]](), {unit.name for unit in todo}
    for cell in loaded.sweep.cells() if loaded.train.shared else ():
        if (name := f"train@{cell.training}") in names and name != first.setdefault((cell.dataset, cell.seed), name):
            waits[name] = (first[cell.dataset, cell.seed],)
    return [unit._replace(needs=unit.needs + waits.get(unit.name, ())) for unit in todo]


def ready(waiting: list[Unit], undone: Collection[str]) -> list[Unit]:
    """Those that can start: nothing that they need is undone."""
    return [unit for unit in waiting if not any(name in undone for name in unit.needs)]


def ends(every: list[Unit], jobs: int, seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds until each unit ends, where each takes so many and `jobs` run at a time, the first that can before the others."""
    now, waiting, running, found = 0.0, list(every), dict[str, float](), dict[str, float]()
    while waiting or running:
        undone = {unit.name for unit in waiting} | running.keys()
        for unit in ready(waiting, undone)[: jobs - len(running)]:
            running[unit.name] = now + seconds[unit.name]
            waiting.remove(unit)
        now = min(running.values())
        for name in [name for name, end in running.items() if end <= now]:
            found[name] = running.pop(name)
    return found
