"""The order of the stages, from what they read and write: dvc.yaml lists them as DVC shall walk them."""

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from stages.pipeline import params, paths


def depth_first(needs: Mapping[str, Iterable[str]]) -> list[str]:
    """The names, each after those that it needs, otherwise in their order. A circle, which DVC refuses, does no harm."""
    found: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for other in needs[name]:
                visit(other)
            found.append(name)

    for name in needs:
        visit(name)
    return found


def in_order(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sections of dvc.yaml, each after those whose outputs it reads."""
    made = Makers()
    for name, stage in stages.items():
        made.add(name, map(_any_item, paths.outs(stage)))
    return {name: stages[name] for name in depth_first({name: made.of(map(_any_item, s["deps"])) for name, s in stages.items()})}


def needs(stages: dict[str, dict[str, Any]], loaded: params.Params) -> dict[str, list[str]]:
    """All stages of the sweep by DVC's names, as train@mnist-cosine-200-0; of each those whose outputs it reads.

    `stages`: sections of dvc.yaml, in order. So is what returns: one kind of stage after the other.
    """
    made, found, values = Makers(), dict[str, list[str]](), loaded.model_dump()
    for kind, stage in stages.items():
        for item in items(stage, values):
            name = paths.stage_name(kind, item)
            found[name] = made.of(paths.deps(stage, item, values))
            made.add(name, (paths.of_item(out, item) for out in paths.outs(stage)))
    return found


def items(stage: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The keys of a stage's matrix, in DVC's order; one that is empty where it has none.

    `values`: the content of params.yaml, whose lists the matrix names.
    """
    axes = [values["sweep"][named.removeprefix("${sweep.").removesuffix("}")] for named in stage.get("matrix", {}).values()]
    return ["-".join(map(str, item)) for item in itertools.product(*axes)]


class Makers:
    """Who makes what: the outputs of stages, each a file, and the folders that they lie in."""

    def __init__(self) -> None:
        self._of: dict[str, list[str]] = {}

    def add(self, maker: str, outs: Iterable[str]) -> None:
        """Remember the outputs of a stage."""
        for out in outs:
            for place in (out, *map(str, PurePosixPath(out).parents)):
                self._of.setdefault(place, []).append(maker)

    def of(self, deps: Iterable[str]) -> list[str]:
        """Those who make what is read, each once."""
        return list(dict.fromkeys(maker for dep in deps for maker in self._of.get(dep, ())))


def _any_item(path: str) -> str:
    """An entry of dvc.yaml, the same whatever its ${...} stand for: what one stage calls ${key} another puts together of parts."""
    return re.sub(r"\$\{[\w.]+\}(-\$\{[\w.]+\})*", "*", path)
