"""What decides a cell's results, and what DVC records of them: the run key, the digest of the raw data, the parameters."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.diffusion import by_name
from stages.errors import UserError, masked
from stages.pipeline import dvc_forms, params, paths
from stages.pipeline.files import content_hash
from stages.pipeline.params import Cell

Machines = dict[str, list[dict[str, str]]]
"""Of each stage whose bits they decide, `checkpoint.machine()` of the machines that took part: see `here`."""


def here() -> Machines:
    """The machines of a cell that is made on this one alone."""
    from stages.pipeline import checkpoint  # it imports torch

    machine = checkpoint.machine()
    return {stage: [machine] for stage in ("extractor", "reference", "train", "sample", "evaluate")}


@dataclass(frozen=True)
class Tree:
    """The working tree, read once: the stages that lead to a cell's scores, what dvc.lock says of them, the parameters.

    `lock` holds the text of each stage's entry.
    """

    stages: dict[str, Any]
    lock: dict[str, str]
    params: params.Params

    @classmethod
    def read(cls) -> "Tree":
        """The tree in the current folder."""
        stages = {name: stage for name, stage in dvc_forms.stages().items() if name != "compare"}
        return cls(stages, dvc_forms.read_lock(), params.load())

    def key(self, cell: Cell, machines: Machines) -> str:
        """The run key: a hash of all that decides a cell's results; known before training starts, the same in every clone.

        It covers the cell, the parameters and the code of every stage that leads to its scores, the digests of the raw data and of
        the weights to begin with, and what machines made it; no other output, nor line endings, nor a schedule or sampler that it
        does not use. Raises UserError when DVC did not fetch the raw data.

        Args:
            machines: as the cell's scores tell them, or `here()` where it is not made yet.
        """
        values = self.params.model_dump()
        deps = {dep for stage in self.stages.values() for dep in paths.deps(stage, paths.item_of(stage, str(cell)), values)}
        others = {f"stages/diffusion/schedules/{name}.py" for name in by_name.names("schedules") if name != cell.schedule}
        code = {dep for dep in deps - others if dep.endswith(".py")}  # prepare reads others, for a picture alone
        text = {path: Path(path).read_bytes().replace(b"\r\n", b"\n").decode() for path in code}
        flat = self._chain(cell)
        decisive = {name: value for name, value in flat.items() if not _decides_no_pixel(name)}
        return content_hash([decisive, text, self.raw_digest(cell.dataset), self._init_digest(), machines])[:32]

    def raw_digest(self, dataset: str) -> str:
        """MD5 that DVC gave the raw data of a dataset."""
        for out in dvc_forms.recorded(self.lock, f"fetch@{dataset}").get("outs", []):
            if out["path"] == str(paths.raw(dataset)):
                return str(out["md5"])
        raise UserError(f"dvc.lock does not record {paths.raw(dataset)}; `dvc repro fetch@{dataset}` does")

    def _init_digest(self) -> str | None:
        """MD5 that DVC gave the weights that trainings begin with; None where they begin with random ones."""
        if not self.params.train.init:
            return None
        for out in dvc_forms.recorded(self.lock, "init").get("outs", []):
            return str(out["md5"])
        raise UserError(f"dvc.lock does not record {paths.INIT}; `dvc repro init` does")

    def chain_params(self, cell: Cell) -> dict[str, Any]:
        """The parameters that lead to a cell's scores, by dotted name, as its dataset sees them, and what makes the cell.

        For the record: secrets in them are masked.
        """
        return {name: masked(value) if isinstance(value, str) else value for name, value in self._chain(cell).items()}

    def _chain(self, cell: Cell) -> dict[str, Any]:
        flat: dict[str, Any] = {"dataset": cell.dataset, "schedule": cell.schedule, "T": cell.T, "seed": cell.seed}
        seen = self.params.model_copy(update={"train": self.params.train.of(cell.dataset)})
        for stage in self.stages.values():
            for name, value in dvc_forms.params_of(stage, paths.item_of(stage, str(cell)), seen).items():
                flat |= _flatten(name, value)
        return flat

    def without_last_phase(self) -> "Tree | None":
        """The tree as it would be with one phase of training less; None where there is but one."""
        train = self.params.train
        if len(train.images) == 1:
            return None
        shorter = train.model_copy(update={"images": train.images[:-1]})
        return replace(self, params=self.params.model_copy(update={"train": shorter}))

    def is_recorded(self, cell: Cell, *, before: str | None = None) -> bool:
        """Whether, by dvc.lock, the cell's files come from the code, the parameters and the data that are here now.

        `before`: a stage; it and those after it do not count.
        """
        return dvc_forms.is_recorded(self.stages, self.lock, cell, self.params, before=before)


def _decides_no_pixel(name: str) -> bool:
    """Whether a parameter says from where raw data or weights came, whose digests say what they are, or how they are licensed."""
    source = name.startswith("data.") and name.rpartition(".")[2] in ("path", "url", "drive", "sha256", "licence", "strict")
    return source or name == "train.init"


def _flatten(dotted: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {dotted: value}
    return {name: leaf for part, inner in value.items() for name, leaf in _flatten(f"{dotted}.{part}", inner).items()}
